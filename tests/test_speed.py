"""What makes a run fast or saves its memory leaves the policy as it is."""

import copy

import pytest
import torch
from conftest import tiny_condition, tiny_model
from test_train import tiny_run, weights

import argrpo
from argrpo import generate, token_logp
from harness.memory import checkpoint_layers
from harness.speed import PackedLinear, Sampler, frozen_copy, packed, refresh

BOTH = pytest.mark.parametrize("model_type", ["c2i", "t2i"])
ONEDNN = pytest.mark.skipif(not torch.backends.mkldnn.is_available(),
                            reason="packed weights need oneDNN")


@BOTH
def test_a_copy_in_half_the_memory_computes_the_same_under_autocast(model_type):
    """The copies of the GPU, tried on the CPU: autocast rounds matrices to what they hold."""
    model, (cond, mask) = tiny_model(model_type), tiny_condition(model_type)
    lean, tokens = frozen_copy(model, torch.bfloat16), torch.randint(11, (3, 16))

    @torch.no_grad()
    def both(run):
        with torch.autocast("cpu", torch.bfloat16):      # a block each time: it remembers weights
            return run(lean), run(model)

    assert torch.equal(*both(lambda m: m(tokens, cond, mask)))
    with torch.no_grad():
        for p in model.parameters():
            p += 0.1
    assert not torch.equal(*both(lambda m: m(tokens, cond, mask)))
    refresh(lean, model)
    assert torch.equal(*both(lambda m: m(tokens, cond, mask)))
    drawn = both(lambda m: generate(m, cond, mask, generator=torch.Generator().manual_seed(0)))
    for ours, theirs in zip(*drawn):                     # tokens, and their log-probabilities
        assert torch.equal(ours, theirs)
    assert lean.layers[0].attention.wqkv.weight.dtype == torch.bfloat16
    assert lean.rope.dtype == torch.float32
    assert not any(p.requires_grad for p in lean.parameters())


def test_the_samplers_copy_follows_the_model(monkeypatch):
    """The loop of the GPU, where a copy draws the rollouts, without a compiler: nothing changes."""
    plain, _, _ = tiny_run(steps=3)
    monkeypatch.setattr(torch, "compile", lambda function, **how: function)
    copied, metrics, _ = tiny_run(steps=3, seams=dict(sampler=Sampler(compile=True)))
    assert torch.equal(weights(copied), weights(plain))
    assert max(m["mismatch"] for m in metrics) < 1e-4


def test_a_small_model_draws_its_own_rollouts():
    model = tiny_model()
    assert Sampler()(model) is model


def wide_model():
    """Its five layer matrices are large enough to be packed, its output is not."""
    return tiny_model(dim=512, n_layer=1, n_head=8)


@ONEDNN
def test_packed_weights_are_the_same_policy():
    model, labels = wide_model(), torch.arange(3)
    twin = packed(model)
    names = [name for name, module in twin.named_modules() if isinstance(module, PackedLinear)]
    assert names == [f"layers.0.{name}" for name in (
        "attention.wqkv", "attention.wo", "feed_forward.w1", "feed_forward.w3", "feed_forward.w2")]
    tokens, sampled = generate(twin, labels, samples_per_prompt=4, cfg_scale=2.0)
    logp, _ = token_logp(model, tokens, labels.repeat_interleave(4), cfg_scale=2.0)
    torch.testing.assert_close(sampled, logp.detach(), rtol=1e-3, atol=1e-3)


@ONEDNN
def test_a_packed_twin_shares_the_other_weights_and_leaves_the_model_alone():
    model = wide_model()
    twin = packed(model)
    assert twin.output.weight is model.output.weight and twin.rope is model.rope
    assert twin.tok_embeddings.weight is model.tok_embeddings.weight
    assert not any(isinstance(module, PackedLinear) for module in model.modules())
    assert [type(layer) for layer in twin.layers] == [type(layer) for layer in model.layers]


@ONEDNN
def test_packed_rollouts_follow_the_model():
    """In the loop, where the weights change: sampler and learner agree in every step."""
    def largest_mismatch(sampler):
        _, metrics, _ = tiny_run(model=wide_model(), steps=3, lr=1e-3, seams=dict(sampler=sampler))
        return max(m["mismatch"] for m in metrics)

    assert largest_mismatch(Sampler()) < 1e-2
    twins = []

    def stale(model):
        """Packs once, and never again."""
        if not twins:
            twins.append(packed(model))
        return twins[0]

    assert largest_mismatch(stale) > 0.1


@pytest.mark.slow
def test_the_compiled_step_is_the_same_policy():
    model, (cond, mask) = tiny_model("t2i"), tiny_condition("t2i")
    plain, compiled = (
        generate(m, cond, mask, cfg_scale=2.0, generator=torch.Generator().manual_seed(0))
        for m in (model, Sampler(compile=True)(model)))
    assert torch.equal(plain[0], compiled[0])
    torch.testing.assert_close(plain[1], compiled[1], rtol=1e-4, atol=1e-4)


# --- recomputed layers -----------------------------------------------------------------------

def test_recomputed_layers_change_nothing():
    start = tiny_model("t2i")
    same = copy.deepcopy(start)
    checkpoint_layers(same)
    assert list(same.state_dict()) == list(start.state_dict())
    runs = [tiny_run("t2i", model=model, cfg_scale=2.0, update_epochs=2, micro_batch=4)
            for model in (start, same)]
    (plain, metrics, _), (saved, others, _) = runs
    torch.testing.assert_close(weights(saved), weights(plain), rtol=1e-4, atol=1e-5)
    for name in ("kl", "entropy"):
        assert others[-1][name] == pytest.approx(metrics[-1][name], rel=1e-3)


def test_a_layer_is_recomputed_in_the_backward_pass_only():
    """Each layer runs once in a pass that has no backward pass, and twice in one that has."""
    model, (cond, _) = tiny_model(), tiny_condition("c2i")
    calls, tokens = [], torch.randint(11, (3, 16))
    model.layers[0].attention.register_forward_hook(lambda *given: calls.append(0))
    checkpoint_layers(model)
    with torch.no_grad():
        model(tokens, cond)
        model.prefill(cond)
    assert len(calls) == 2
    token_logp(model, tokens, cond)[0].sum().backward()
    assert len(calls) == 4


def test_a_copy_of_a_recomputing_model_uses_its_own_weights():
    model, (cond, _) = tiny_model(), tiny_condition("c2i")
    checkpoint_layers(model)
    other, tokens = copy.deepcopy(model), torch.randint(11, (3, 16))
    before = token_logp(other, tokens, cond)[0].detach()
    with torch.no_grad():
        for p in model.layers.parameters():
            p += 1
    assert torch.equal(token_logp(other, tokens, cond)[0].detach(), before)
    assert not torch.equal(token_logp(model, tokens, cond)[0].detach(), before)


def test_frozen_copies_do_not_touch_the_model():
    model = tiny_model()
    before = weights(model).clone()
    copied = frozen_copy(model)
    with torch.no_grad():
        for p in copied.parameters():
            p.zero_()
    assert torch.equal(weights(model), before)
    assert all(p.requires_grad for p in model.parameters())
    assert argrpo.Transformer is type(copied)
