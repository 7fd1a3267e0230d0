"""What makes a run fast or saves its memory leaves the policy as it is."""

import copy
import math
import resource
import sys

import pytest
import torch
from conftest import tiny_condition, tiny_model, tiny_run, weights

import argrpo
from argrpo import GRPOConfig, generate, token_logp
from harness import device as speed
from harness.device import PackedLinear, Sampler, checkpoint_layers, frozen_copy, packed, refresh
from harness.doctor import allowed_mismatch
from harness.processes import pick_device

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


def on_a_gpu(monkeypatch, answer=True):
    """Lets harness/device.py take the CPU for a GPU."""
    monkeypatch.setattr(speed, "on_gpu", lambda model: answer)


def test_what_draws_on_a_gpu_depends_on_what_it_computes_in(monkeypatch):
    """In bfloat16 it is a copy; the model itself is no slower where all is float32."""
    model = tiny_model()
    on_a_gpu(monkeypatch)
    assert Sampler()(model) is model
    monkeypatch.setattr(speed, "matrix_dtype", lambda device: torch.bfloat16)
    assert Sampler()(model).output.weight.dtype == torch.bfloat16


def test_attention_leaves_out_cudnn():
    torch.backends.cuda.enable_cudnn_sdp(True)
    pick_device("cpu")
    assert not torch.backends.cuda.cudnn_sdp_enabled()
    assert torch.backends.cuda.flash_sdp_enabled()


# --- devices ---------------------------------------------------------------------------------

@pytest.mark.parametrize("there, name, kind", [
    (None, "", "cpu"), (None, "cpu", "cpu"), ("cuda", "", "cuda"), ("cuda", "cpu", "cpu"),
    ("mps", "", "cpu"), ("mps", "mps", "mps"), ("xpu", "xpu:0", "xpu")])
def test_any_accelerator_that_is_named(there, name, kind, monkeypatch):
    """The default is cuda, then the CPU: nobody has tried another one."""
    fake_accelerator(monkeypatch, there)
    assert pick_device(name).type == kind


@pytest.mark.parametrize("there, name", [
    (None, "cuda"), (None, "mps"), ("mps", "cuda"), ("cuda", "gpu"), ("cuda", "cuda:x")])
def test_a_device_that_is_not_there_is_named(there, name, monkeypatch):
    fake_accelerator(monkeypatch, there)
    kinds = ", ".join(["cpu"] + [there] * bool(there))
    with pytest.raises(ValueError, match=f"--device {name}: .*, but {kinds};"):
        pick_device(name)


def fake_accelerator(monkeypatch, kind):
    if not hasattr(torch, "accelerator"):
        pytest.skip("torch before 2.6 knows no accelerator but cuda")
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: kind is not None)
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda: torch.device(kind))


@pytest.mark.skipif(not hasattr(torch, "accelerator"), reason="it takes torch's own away")
def test_before_torch_2_6_there_is_cuda_alone(monkeypatch):
    monkeypatch.delattr(torch, "accelerator")
    for there, kind in ((False, "cpu"), (True, "cuda")):
        monkeypatch.setattr(torch.cuda, "is_available", lambda there=there: there)
        assert pick_device("").type == kind


@pytest.mark.slow
@BOTH
def test_one_compilation_serves_all_positions(model_type, monkeypatch):
    """With a compiler that only counts: a step that has the position built in is compiled anew at
    every token, until torch gives up and runs all others uncompiled."""
    counted, compile = [], torch.compile

    def count(graph, inputs):
        counted.append(graph)
        return graph

    on_a_gpu(monkeypatch)
    monkeypatch.setattr(torch, "compile", lambda *args, **how: compile(*args, **how, backend=count))
    model, (cond, mask) = tiny_model(model_type), tiny_condition(model_type)
    with torch.autocast("cpu", torch.bfloat16):
        generate(Sampler(compile=True)(model), cond, mask, cfg_scale=2.0)
    assert len(counted) == 1


def test_rounding_to_bfloat16_is_no_mismatch():
    """Sampler and learner as on a GPU, but with the CPU's autocast, of a model of four layers.
    What rounding does grows with guidance; another condition is more than that."""
    model = tiny_model(dim=64, n_layer=4, n_head=4, vocab_size=128, num_classes=8)
    lean, labels, means = frozen_copy(model, torch.bfloat16), torch.arange(4), []
    for cfg_scale in (1.0, 2.0, 4.0):
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
            tokens, drawn = generate(lean, labels, cfg_scale=cfg_scale)
            logp, wrong = (token_logp(lean, tokens, some, cfg_scale=cfg_scale)[0]
                           for some in (labels, labels + 4))
        means.append((logp - drawn).abs().mean().item())
        allowed = allowed_mismatch(True, cfg_scale)
        assert means[-1] < allowed, "what rounding does is not reported"
        assert allowed < (wrong - drawn).abs().mean(), "another condition is"
    assert means[0] <= means[1] <= means[2], "it grows with guidance (torch 2.5 rounds both alike)"


def test_the_allowed_mismatch_by_hand():
    """Two branches round on their own: at guidance 4 the error is that of one, 5 times."""
    for rough, scale, allowed in ((False, 1, 1e-3), (True, 0, 0.05), (True, 1, 0.05),
                                  (True, 4, 0.25)):
        assert allowed_mismatch(rough, scale) == pytest.approx(allowed)


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


# --- time and memory -------------------------------------------------------------------------

def test_the_update_begins_with_its_first_pass_and_not_with_its_last(monkeypatch):
    """By a clock that is one later whenever it is asked."""
    ticks, model = iter(range(9)), tiny_model()
    monkeypatch.setattr(speed, "clock", lambda device: next(ticks))
    watch = speed.Stopwatch(model)
    watch.start()
    watch.timed(lambda images, texts: None)(None, None)
    for _ in range(2):                           # micro-batches
        model(torch.zeros(1, 16, dtype=torch.long), torch.tensor([0]))
    assert watch.seconds() == {"seconds": 4, "seconds_rollout": 1, "seconds_reward": 1,
                               "seconds_reference": 1, "seconds_update": 1}


def test_memory_is_not_known_everywhere(monkeypatch):
    """Windows has no module `resource`."""
    for module, known in ((resource, True), (None, False)):
        monkeypatch.setitem(sys.modules, "resource", module)
        result, seconds, peak = speed.measured(torch.device("cpu"), lambda: "result")
        assert result == "result" and seconds > 0
        assert (peak > 1e6) if known else math.isnan(peak)


# --- the optimizer ---------------------------------------------------------------------------

def test_the_fused_optimizer_takes_the_same_steps(monkeypatch):
    """And each continues from a checkpoint of the other."""
    models, optimizers = [tiny_model()], []
    models.append(copy.deepcopy(models[0]))
    config, labels, tokens = GRPOConfig(lr=1e-3), torch.arange(3), torch.randint(11, (3, 16))
    for gpu, model in enumerate(models):
        on_a_gpu(monkeypatch, bool(gpu))
        optimizers.append(speed.optimizer_of_device(model, config))
    plain, fused = optimizers
    assert fused.param_groups[0]["fused"] and not plain.param_groups[0]["fused"]

    def take_steps():
        for model, optimizer in zip(models, optimizers):
            for _ in range(3):
                optimizer.zero_grad()
                token_logp(model, tokens, labels)[0].mean().backward()
                optimizer.step()
        torch.testing.assert_close(weights(models[1]), weights(models[0]), rtol=1e-5, atol=1e-6)

    take_steps()
    states = [optimizer.state_dict() for optimizer in optimizers]
    plain.load_state_dict(states[1])
    fused.load_state_dict(states[0])
    take_steps()


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
