"""Pretraining of the toy: toy/pretraining.py, and the conditions of toy/models.py.  On tiny models.

Shapes: M pictures in all, b of them in a batch, N tokens a picture, V codes.
"""

import random
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from conftest import Spy, same

import toy
from argrpo import Prompts, Transformer
from toy import models, pretraining
from toy.pretraining import (
    GROUND_CODE,
    choose_texts,
    draw_scenes,
    ground_patches,
    learning_rate_factor,
    pretrain,
    pretrain_gpt,
    pretrain_vq,
    restart_dead_codes,
)
from vqgan import VQModel

# --- the loop of all three ---------------------------------------------------------------------

def test_the_learning_rate_warms_up_and_falls_to_zero():
    """(step + 1) / warmup, times half a cosine."""
    rates = [learning_rate_factor(step, 100, warmup=20) for step in (0, 9, 50, 99, 100)]
    assert rates[0] == pytest.approx(1 / 20), "the first step is one twentieth of the way up"
    assert rates[1] == pytest.approx(0.5 * 0.5 * (1 + 0.960293), rel=1e-3), (
        "half of the warm-up, on the cosine")
    assert rates[2] == pytest.approx(0.5), "half way down"
    assert rates[3] == pytest.approx(0.000247, rel=1e-2) and rates[4] == pytest.approx(0.0), (
        "half a cosine, which ends at 0")


def test_a_step_of_pretraining(monkeypatch):
    """Loss of a batch without repetitions, gradient from zero, clipped to 1, AdamW at the step's
    rate, then after_step."""
    model, events = torch.nn.Linear(3, 1, bias=False), []

    class Recorder(torch.optim.AdamW):
        def step(self):
            gradient = model.weight.grad
            events.append((self.param_groups[0]["lr"], gradient.norm().item(), gradient.clone()))
            super().step()
    monkeypatch.setattr(torch.optim, "AdamW", Recorder)
    batches = []

    def loss_of(index):
        batches.append(index.tolist())
        return 3.0 * model.weight[0, len(batches) % 3]           # the gradient's norm is 3
    after = []
    pretrain(model, loss_of, random.Random(0), name="x", steps=5, data_size=6, batch_size=4, lr=0.1,
             weight_decay=0.0, after_step=after.append)
    assert [rate for rate, _, _ in events] == pytest.approx(
        [0.1 * learning_rate_factor(step, 5) for step in range(5)]), "each step's own learning rate"
    for step, (_, norm, gradient) in enumerate(events, start=1):
        assert norm == pytest.approx(1.0, rel=1e-4), "clipped to norm 1"
        same(gradient, torch.eye(3)[[step % 3]], "the gradient of this step's batch alone")
    assert after == [0, 1, 2, 3, 4], "after_step is told each step"
    assert all(len(set(batch)) == 4 and max(batch) < 6 for batch in batches), (
        "a batch has no picture twice")
    assert len({tuple(batch) for batch in batches}) > 1, "every step has another batch"


# --- the transformers --------------------------------------------------------------------------

TINY = replace(models.GPT_CONFIG, dim=16, n_layer=1, n_head=2, vocab_size=11, block_size=4)
TINY = {"c2i": replace(TINY, num_classes=3),
        "t2i": replace(TINY, model_type="t2i", cls_token_num=4, caption_dim=6)}


def tiny_data(task):
    """Pictures of three prompts, 40 of each: those of prompt k are nothing but code k."""
    k = torch.arange(120) % 3
    tokens = k[:, None].expand(120, 4)
    if task == "c2i":
        return tokens, Prompts([f"{i}" for i in k.tolist()], k)
    cond = torch.zeros(120, 4, 6)
    cond[range(120), 3, k] = 4.0
    mask = torch.tensor([[False, True, True, True]]).expand(120, 4)
    return tokens, Prompts([f"{i}" for i in k.tolist()], cond, mask)


@pytest.mark.parametrize("task", ["c2i", "t2i"])
def test_pretraining_learns_each_prompts_pictures(task):
    """100 steps: each prompt's own code, and without a prompt a third each."""
    torch.manual_seed(0)
    tokens, prompts = tiny_data(task)
    gpt = pretrain_gpt(Transformer(TINY[task]), tokens, prompts, random.Random(0), steps=100)
    cond, mask = prompts.pick(torch.arange(3), "cpu")
    with torch.no_grad():
        p = gpt(tokens[:3], cond, mask)[:, 0].softmax(-1)            # of the first code
        null = gpt(tokens[:1], gpt.null_cond(cond[:1]), None if mask is None else mask[:1])
        null = null[0, 0].softmax(-1)
    assert p.diagonal().min() > 0.5, f"prompt k must be followed by its code k: {p[:, :3]}"
    assert null[:3].min() > 0.1 and null[:3].sum() > 0.6, (
        f"without a prompt, all three codes: was the condition ever dropped? {null[:3]}")


@pytest.mark.parametrize("task", ["c2i", "t2i"])
def test_the_condition_is_dropped_a_tenth_of_the_time(task, monkeypatch):
    """Whole prompts, each picture for itself, so that guidance has a null branch."""
    tokens, prompts = torch.randint(11, (120, 4)), tiny_data(task)[1]
    shares, seen = [], []

    def pretrain(gpt, loss_of, rng, **how):
        given = []
        torch.nn.init.normal_(gpt.output.weight)             # so that predictions differ
        gpt.register_forward_pre_hook(lambda module, args: given.append(args))
        for _ in range(40):
            index = torch.randperm(120)[:32]
            loss = loss_of(index)
            x, cond, *mask = given[-1]
            null = (cond == gpt.null_cond(cond)).view(32, -1).all(dim=1)
            shares.append(null.float().mean().item())
            right = prompts.cond[index]
            assert torch.equal(cond[~null], right[~null]), "a picture has another's condition"
            assert torch.equal(x, tokens[index]), "tokens and conditions must be of one picture"
            if task == "t2i":
                assert torch.equal(mask[0], prompts.cond_mask[index]), "the mask is lost"
            seen.append(loss.item())
        logits = gpt(x, cond, *mask)
        same(loss, F.cross_entropy(logits.flatten(0, 1), x.flatten()), "the mean over all tokens")
    monkeypatch.setattr(pretraining, "pretrain", pretrain)
    pretrain_gpt(Transformer(TINY[task]), tokens, prompts, random.Random(0), steps=1)
    share = sum(shares) / len(shares)            # of 1280: a standard error of 0.0084
    assert 0.06 < share < 0.14, f"the null condition stood in for {share:.1%}, not for a tenth"
    mixed = sum(0 < share < 1 for share in shares)       # 39 of 40 expected: 1 - 0.9^32 of them
    assert mixed > 30, f"{mixed} of 40 batches are mixed: each picture is dropped for itself"


# --- the tokenizer -----------------------------------------------------------------------------

def small_scenes(n, seed=0):
    rng = random.Random(seed)
    return toy.render([toy.make_scene(toy.CLASSES[k % 27], rng) for k in range(n)])


def test_patches_of_nothing_but_ground():
    """4 x 4 pixels, row by row: one deviating pixel is enough."""
    images = toy.GROUND.view(1, 3, 1, 1).repeat(1, 1, 24, 24)
    assert ground_patches(images).all(), "a picture of nothing but ground"
    images[0, 1, 5, 9] = 0.5                     # pixel row 5, column 9: patch row 1, column 2
    ground = ground_patches(images)
    assert ground.shape == (1, 36), "a verdict for each of 6 x 6 patches"
    assert (~ground[0]).nonzero().flatten().tolist() == [1 * 6 + 2], (
        "one pixel off the ground, and its patch, in row 1 and column 2, is none")


def test_dead_codes_move_onto_features_of_pictures():
    """Those that are not among the last 8192 used, and only those; and not onto the ground."""
    vq = VQModel(models.VQ_CONFIG)
    images = small_scenes(4) * 2 - 1
    vq.quantize.codebook_used[:] = 5.0           # long ago
    vq.quantize.codebook_used[-8192:] = torch.arange(8192.0) % 100
    before = vq.quantize.embedding.weight.detach().clone()
    ground = ground_patches((images + 1) / 2)
    restart_dead_codes(vq, images, ground)
    after = vq.quantize.embedding.weight.detach()
    assert torch.equal(after[:100], before[:100]), "a code that is used stays where it is"
    with torch.no_grad():
        features = vq.features(images)[~ground]
    nearest = torch.cdist(after[100:], features).amin(dim=1)
    assert nearest.max() < 1e-2, "a dead code becomes a feature of a patch that shows something"


@pytest.fixture
def tokenizer(monkeypatch):
    """What `pretrain_vq` hands to `pretrain`, for 32 pictures: (vq, loss_of, how)."""
    monkeypatch.setattr(pretraining, "pretrain", lambda vq, loss_of, rng, **how: (vq, loss_of, how))
    return pretrain_vq(small_scenes(32), random.Random(0), steps=100)


def test_the_tokenizers_loss_by_hand(tokenizer):
    """Pixels (squared, and 0.3 times absolute), 0.1 of the codebook's loss, and 0.02 of a
    cross-entropy that gives all ground one code."""
    vq, loss_of, how = tokenizer
    assert how["data_size"] == 32 and how["weight_decay"] == 0, "all pictures, and no weight decay"
    index = torch.tensor([3, 9])
    images = small_scenes(32)[index]
    x, ground = images * 2 - 1, ground_patches(images)
    loss = loss_of(index)
    remembered = vq.quantize.codebook_used[-2 * 36:].view(2, 36)
    assert (remembered[ground] == GROUND_CODE).all(), "a patch of ground is written as GROUND_CODE"
    with torch.no_grad():
        features = vq.features(x)
        tokens = vq.quantize.nearest(features).masked_fill(ground, GROUND_CODE)
        codes, vq_loss = vq.straight_through(features, tokens)
        painted = vq.from_codes(codes, 6, 6)
        logp = (10 * features[ground] @ vq.quantize.codes().T).log_softmax(-1)[:, GROUND_CODE]
        right = (F.mse_loss(painted, x) + 0.3 * (painted - x).abs().mean()
                 + 0.1 * vq_loss - 0.02 * logp.mean())
    same(loss, right, "pixels in [-1, 1], the codebook's loss, one code for the ground")
    assert torch.equal(remembered, tokens.float()), (
        "the tokens that were trained on are remembered, in order")


def test_dead_codes_are_restarted_every_25_steps_of_the_first_70_percent(tokenizer, monkeypatch):
    vq, _, how = tokenizer
    restarted = Spy(lambda vq, pixels, ground: None)
    monkeypatch.setattr(pretraining, "restart_dead_codes", restarted)
    due = []
    for step in range(100):
        before = len(restarted.calls)
        how["after_step"](step)
        due += [step] * (len(restarted.calls) - before)
    assert due == [24, 49], "every 25th step, and none in the last 30 percent"
    for (its_vq, pixels, ground), _ in restarted.calls:
        assert its_vq is vq and pixels.min() < -0.5 and len(pixels) == 32, "32 pictures, in [-1, 1]"
        assert torch.equal(ground, ground_patches((pixels + 1) / 2)), "the pictures' own ground"


# --- prompts and pictures ----------------------------------------------------------------------

def test_texts_for_both_tasks():
    """c2i has all classes in turn; t2i half pairs, half counted, and nothing that is unseen."""
    texts = choose_texts(0, 400)
    assert texts["c2i"] == [toy.CLASSES[k % 27] for k in range(400)], "all classes in turn"
    assert not toy.UNSEEN & set(texts["t2i"]), "unseen compositions must stay unseen"
    assert sum(text in toy.SEEN_PAIRS for text in texts["t2i"]) == 200, (
        "half of the captions are pairs")
    assert len(set(texts["t2i"])) > 150, "many different ones"
    assert choose_texts(1, 400)["t2i"] != texts["t2i"] == choose_texts(0, 400)["t2i"], (
        "another seed, other texts; the same seed, the same")


def test_scenes_are_those_of_their_texts_and_of_their_seed():
    texts = toy.CLASSES[:9]
    images = draw_scenes("c2i", texts, 0)
    assert toy.verify(images, texts).mean() == 1, "picture i shows text i"
    assert torch.equal(images, draw_scenes("c2i", texts, 0)), "the same whenever they are needed"
    for task, seed in (("t2i", 0), ("c2i", 1)):
        assert not torch.equal(images, draw_scenes(task, texts, seed)), "streams of their own"


def test_the_seed_decides_what_torch_draws_too():
    """Initial weights and dropped conditions, whatever was drawn before."""
    drawn = []
    for before, seed in ((1, 0), (2, 0), (1, 5)):
        torch.manual_seed(before)
        pretraining.random_stream(seed, "a purpose")
        drawn.append(torch.rand(3).tolist())
    assert drawn[0] == drawn[1] != drawn[2]


def test_conditions_are_those_of_their_texts():
    texts = ["two red circles", "one blue square"]
    assert toy.as_prompts("c2i", texts).cond.tolist() == [
        toy.CLASSES.index(text) for text in texts], "the label of each text"
    t2i = toy.as_prompts("t2i", texts)
    features, mask = toy.encode_captions(texts)
    assert t2i.texts == texts and torch.equal(t2i.cond, features), "the features of each caption"
    assert torch.equal(t2i.cond_mask, mask), "and its mask"


def test_a_words_feature_says_word_place_and_relation():
    """See encode_captions: block (relation, place), then the word."""
    features, mask = toy.encode_captions(["a red circle above a blue square"])
    context, n = models.CONTEXTS.index("above"), len(toy.WORDS)
    for place, word in enumerate("a red circle above a blue square".split()):
        block = context * toy.CAPTION_LENGTH + place
        assert features[0, 1 + place].nonzero().item() == block * n + toy.WORDS.index(word), (
            "the block says relation and place, the column in it the word")
    assert mask[0].tolist() == [False] + [True] * 7, "the real words are the last ones"


# --- all three ---------------------------------------------------------------------------------

def test_everything_fits_together(tmp_path, monkeypatch):
    """What each pretraining is given, and what is written, in half precision."""
    seen = {}

    def fake_vq(images, rng, steps):
        seen["vq"] = images, steps, rng.random()
        torch.manual_seed(0)
        return VQModel(models.VQ_CONFIG)

    def fake_gpt(gpt, tokens, prompts, rng, steps):
        seen[gpt.config.model_type] = tokens, prompts, steps, rng.random()
        assert not any(tmp_path.iterdir()), "new and old models do not go together"
        return gpt
    monkeypatch.setattr(pretraining, "pretrain_vq", fake_vq)
    monkeypatch.setattr(pretraining, "pretrain_gpt", fake_gpt)
    pretraining.pretrain_toy(tmp_path, seed=3, scenes=8)
    texts = choose_texts(3, 8)
    images = {task: draw_scenes(task, texts[task], 3) for task in texts}
    assert torch.equal(seen["vq"][0], torch.cat([images["c2i"], images["t2i"]])), (
        "the tokenizer sees the pictures of both tasks, in [0, 1]")
    for task, steps in pretraining.STEPS.items():
        assert seen[task][-2] == steps, "each model has its own number of steps"
    vq = toy.load("c2i", tmp_path)[1]
    for task in ("c2i", "t2i"):
        tokens, prompts, _, _ = seen[task]
        assert prompts.texts == texts[task], "each task has its own texts"
        assert torch.equal(tokens, vq.encode(images[task] * 2 - 1)), (
            "tokens are of the task's pictures in [-1, 1], by the tokenizer in half precision")
    assert len({seen[name][-1] for name in seen}) == 3, "each model's random stream is its own"
    gpt, vq = toy.load("c2i", tmp_path)
    assert not any(p.requires_grad for p in vq.parameters()), "the tokenizer is frozen"
    assert all(p.requires_grad for p in gpt.parameters()), "the transformer is to be trained"
    for path in tmp_path.glob("toy_*.pt"):
        saved = torch.load(path, weights_only=True)["model"]
        assert {tensor.dtype for tensor in saved.values()} == {torch.float16}, (
            "weights are saved in half precision")
