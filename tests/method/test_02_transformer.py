"""The transformer as a whole: who sees whom, the cache, the conditions, guidance.

argrpo.py, the rest of section 1 and the beginning of section 2.  One idea a test; a failure names
it.  Shapes: T condition positions, N tokens, V codes.
"""

import math

import pytest
import torch
from conftest import same, tiny_condition, tiny_model

import argrpo
from argrpo import GPTConfig, both_branches, generate, guide

BOTH = pytest.mark.parametrize("model_type", ["c2i", "t2i"])


# --- the embedders -----------------------------------------------------------------------------

def test_no_class_is_one_more_class():
    """Label num_classes, the table's last row.  See LabelEmbedder and null_cond."""
    model, labels = tiny_model(), torch.tensor([0, 4, 2])
    assert model.cls_embedding.embedding_table.num_embeddings == 6, "num_classes + 1 rows"
    assert model.null_cond(labels).tolist() == [5, 5, 5], "the null class is number num_classes"
    embedded = model.cls_embedding(labels)
    assert embedded.shape == (3, 1, 16), "a class is one condition token"
    same(embedded[:, 0], model.cls_embedding.embedding_table.weight[labels], "a row of the table")


def test_a_caption_goes_through_a_small_mlp():
    """fc2(gelu(fc1(features))), with gelu's tanh form.  See CaptionEmbedder."""
    embedder, features = tiny_model("t2i").cls_embedding, torch.randn(2, 4, 6)
    h = features @ embedder.cap_proj["fc1"].weight.T
    h = 0.5 * h * (1 + torch.tanh(math.sqrt(2 / math.pi) * (h + 0.044715 * h ** 3)))
    right = h @ embedder.cap_proj["fc2"].weight.T
    same(embedder(features), right, "fc2(gelu(fc1(x))), gelu approximated by tanh",
         rtol=1e-5, atol=1e-6)


def test_no_caption_is_one_block_of_features_for_every_row():
    """Random ones, which are never trained: LlamaGen's uncond_embedding is a buffer."""
    model, features = tiny_model("t2i"), torch.randn(2, 4, 6)
    null = model.null_cond(features)
    assert null.shape == features.shape and null.dtype == features.dtype
    for row in null:
        same(row, model.cls_embedding.uncond_embedding, "no caption is uncond_embedding")
    assert "cls_embedding.uncond_embedding" in model.state_dict(), "checkpoints hold it"
    assert not null.requires_grad and "cls_embedding.uncond_embedding" not in dict(
        model.named_parameters()), "no optimizer moves it"


def test_captions_of_another_shape_are_refused():
    with pytest.raises(ValueError, match=r"captions must be \(B, 4, 6\), not \(2, 3, 6\)"):
        tiny_model("t2i").cls_embedding(torch.randn(2, 3, 6))


def test_an_untrained_model_finds_all_codes_equally_likely():
    """The output layer starts at zero, other matrices at one over the root of what they read."""
    model = argrpo.Transformer(GPTConfig(dim=64, n_layer=1, n_head=2, vocab_size=32, block_size=4))
    logits = model(torch.zeros(1, 4, dtype=torch.long), torch.tensor([3]))
    assert (logits == 0).all(), "the output layer starts at zero"
    ffn = model.layers[0].feed_forward
    for weight, std in ((ffn.w1.weight, 64 ** -0.5), (ffn.w2.weight, ffn.w2.in_features ** -0.5),
                        (model.cls_embedding.embedding_table.weight, 1.0)):
        assert weight.std().item() == pytest.approx(std, rel=0.1), "std is 1 / sqrt(fan in)"


@pytest.mark.parametrize("bad, message", [
    (dict(model_type="i2t"), "model_type must be"), (dict(dim=20), "multiple of 4"),
    (dict(block_size=8), "square number"), (dict(cls_token_num=2), "must be 1 for c2i")])
def test_configurations_that_make_no_model_are_refused(bad, message):
    with pytest.raises(ValueError, match=message):
        GPTConfig(**(dict(dim=16, n_layer=1, n_head=2) | bad))


# --- guidance ----------------------------------------------------------------------------------

def test_guidance_walks_from_the_null_branch_through_the_prompted_one():
    """null + scale (prompted - null): the first half of the rows is prompted.  See guide."""
    both = torch.tensor([[3.0, 0.0], [1.0, 1.0], [1.0, 2.0], [0.0, 1.0]])    # 2 prompted, 2 null
    same(guide(both, 2.0), [[5.0, -2.0], [2.0, 1.0]], "null + scale * (prompted - null)")
    same(guide(both, 0.0), both[2:], "scale 0 is the null branch")
    assert torch.equal(guide(both[:2], 1.0), both[:2]), "scale 1 has no null branch"


def test_both_branches_come_one_after_the_other():
    """All prompted rows, then all null rows, each with its own caption's mask."""
    model, (cond, mask) = tiny_model("t2i"), tiny_condition("t2i")
    both, masks = both_branches(model, cond, mask, 2.0)
    same(both, torch.cat([cond, model.null_cond(cond)]), "first the conditions, then the null ones")
    assert torch.equal(masks, torch.cat([mask, mask])), "row i of the null branch has mask i"
    alone, its_mask = both_branches(model, cond, mask, 1.0)
    assert alone is cond and its_mask is mask, "at scale 1 the null branch is left out"


# --- the mask ----------------------------------------------------------------------------------

def test_the_mask_by_hand():
    """A caption of two words, padded on the left to three, and two image tokens.  See
    Transformer.attention_mask."""
    mask = tiny_model("t2i", cls_token_num=3).attention_mask(torch.tensor([[False, True, True]]), 5)
    wanted = [[1, 0, 0, 0, 0],                   # padding sees itself: no softmax over nothing
              [0, 1, 0, 0, 0],
              [0, 1, 1, 0, 0],
              [0, 1, 1, 1, 0],                   # an image token sees the words, and no padding
              [0, 1, 1, 1, 1]]
    assert mask.shape == (1, 1, 5, 5) and mask.dtype == torch.bool
    assert mask[0, 0].int().tolist() == wanted, (
        "a position sees the words and tokens before it, itself, and no padding; got\n"
        f"{mask[0, 0].int()}")


# --- what a position predicts from -------------------------------------------------------------

@BOTH
def test_a_token_changes_only_the_predictions_after_it(model_type):
    """logits[:, i] predicts token i, from the tokens before it.  See Transformer.forward."""
    model, (cond, mask) = tiny_model(model_type), tiny_condition(model_type)
    tokens = torch.randint(11, (3, 16))
    with torch.no_grad():
        before = model(tokens, cond, mask)
        for j in (0, 7, 14):
            other = tokens.clone()
            other[:, j] = (tokens[:, j] + 1) % 11
            moved = (model(other, cond, mask) - before).abs().amax(dim=(0, 2)) > 1e-6
            assert not moved[:j + 1].any(), f"token {j} must not reach its own prediction: a leak"
            assert moved[j + 1], f"token {j} must reach the prediction of token {j + 1}"


@BOTH
def test_the_condition_reaches_every_prediction(model_type):
    """Also the first: the last condition position predicts token 0."""
    model, (cond, mask) = tiny_model(model_type), tiny_condition(model_type)
    tokens = torch.randint(11, (1, 16)).expand(3, 16)
    with torch.no_grad():
        logits = model(tokens, cond, mask)
    assert logits.shape == (3, 16, 11)
    moved = (logits[0] - logits[1]).abs().amax(dim=1) > 1e-6
    assert moved.all(), "another condition, and a prediction that stays the same"


def test_logits_are_of_normed_states():
    """The last layer's output goes through one more RMSNorm.  See Transformer.forward."""
    model, seen = tiny_model(), []
    model.output.register_forward_pre_hook(lambda module, given: seen.append(given[0]))
    model(torch.randint(11, (2, 16)), torch.arange(2))
    [hidden] = seen
    same(hidden.square().mean(-1), torch.ones(2, 16), "the final norm is missing", rtol=1e-3)



# --- the cache ---------------------------------------------------------------------------------

def check_cache(model_type):
    """prefill gives the first code's logits, decode_step(token i) those of code i + 1."""
    model, (cond, mask) = tiny_model(model_type), tiny_condition(model_type)
    tokens = torch.randint(11, (3, 16))
    with torch.no_grad():
        right = model(tokens, cond, mask)
        logits, cache = model.prefill(cond, mask)
        same(logits, right[:, 0], "prefill's logits are those of token 0", atol=1e-4)
        for i in range(15):
            logits = model.decode_step(tokens[:, i], i, cache, mask)
            same(logits, right[:, i + 1], f"after token {i} comes the prediction of token {i + 1}",
                 atol=1e-4)


def test_reading_through_the_cache_is_reading_at_once():
    check_cache("c2i")


@BOTH
def test_the_cache_has_room_for_every_position_but_the_last_tokens(model_type):
    model, (cond, mask) = tiny_model(model_type), tiny_condition(model_type)
    T = model.config.cls_token_num
    _, cache = model.prefill(cond, mask, copies=2)
    assert len(cache) == 2, "keys and values for each layer"
    for part in (part for keys_values in cache for part in keys_values):
        assert part.shape == (6, 2, T + 15, 8)
        assert (part[:, :, T:] == 0).all(), "the tokens' places are still empty"


def test_copies_of_a_condition_are_neighbours_and_do_not_share_memory():
    """Two images of a prompt start alike, and then go separate ways.  See prefill."""
    model = tiny_model()
    cond = torch.arange(3)
    with torch.no_grad():
        alone, _ = model.prefill(cond)
        logits, cache = model.prefill(cond, copies=2)
        same(logits, alone.repeat_interleave(2, dim=0), "copies of one condition are neighbours")
        tokens = torch.randint(11, (6, 16))
        for i in range(15):
            logits = model.decode_step(tokens[:, i], i, cache)
        right = model(tokens, cond.repeat_interleave(2))[:, 15]
    same(logits, right, "each image of a prompt has keys and values of its own", atol=1e-4)


def test_a_cache_is_not_touched_by_another_call():
    """The model keeps nothing between calls: two rollouts can take turns."""
    model, cond, tokens = tiny_model(), torch.arange(3), torch.randint(11, (3, 16))
    with torch.no_grad():
        right = model(tokens, cond)
        _, cache = model.prefill(cond)
        for i in range(15):
            logits = model.decode_step(tokens[:, i], i, cache)
            if i == 7:                           # another rollout, and a pass of training, between
                generate(model, cond.flip(0))
                model(tokens[:1], cond[:1])
    same(logits, right[:, 15], "a call in between has changed the cache", atol=1e-4)


def test_the_first_code_is_predicted_at_the_last_word():
    """By forward and by prefill alike, of captions that fill all T positions."""
    model, cond, mask = tiny_model("t2i"), torch.randn(3, 4, 6), torch.ones(3, 4, dtype=torch.bool)
    with torch.no_grad():
        whole = model(torch.zeros(3, 16, dtype=torch.long), cond, mask)
        same(model.prefill(cond, mask)[0], whole[:, 0], "of T condition positions the last one "
             "predicts token 0: it has read all others", atol=1e-4)


# --- padding ---------------------------------------------------------------------------------

@pytest.mark.parametrize("way", ["forward", "sampler"])
@pytest.mark.parametrize("cfg_scale", [1.0, 3.0])
def test_what_stands_in_the_padding_changes_nothing(way, cfg_scale):
    """With guidance, too: the null branch has the caption's mask.  See both_branches."""
    model, (cond, mask) = tiny_model("t2i"), tiny_condition("t2i")
    junk = torch.where(mask[..., None], cond, 100.0)
    tokens = torch.randint(11, (6, 16))

    def logp(cond):
        if way == "sampler":
            return generate(model, cond, mask, samples_per_prompt=2, cfg_scale=cfg_scale,
                            prefix=tokens)[1]
        with torch.no_grad():
            return argrpo.token_logp(model, tokens[::2], cond, mask, cfg_scale=cfg_scale)[0]
    same(logp(junk), logp(cond), f"padding must be invisible: the {way} lost the mask")


def test_the_null_branch_is_masked_as_its_caption():
    """The null features of padded positions are invisible, too."""
    model, (cond, mask) = tiny_model("t2i"), tiny_condition("t2i")
    tokens = torch.randint(11, (3, 16))
    null = model.null_cond(cond)
    with torch.no_grad():
        c, u = model(tokens, cond, mask), model(tokens, null, mask)
        right = (u + 3 * (c - u)).log_softmax(-1).gather(-1, tokens[..., None])[..., 0]
        ours, _ = argrpo.token_logp(model, tokens, cond, mask, cfg_scale=3.0)
    same(ours, right, "the null branch uses the same mask as the caption")
    assert (model(tokens, null)[1] - u[1]).abs().max() > 1e-3        # so it matters here


def test_reading_captions_through_the_cache_is_reading_at_once():
    check_cache("t2i")
