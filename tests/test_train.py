"""The loop: what it computes, and that it learns."""

import copy
import math

import pytest
import torch
from conftest import tiny_condition, tiny_model

import argrpo
from argrpo import GRPOConfig, Prompts
from vqgan import VQConfig, VQModel


class Blocks:
    """A tokenizer without a network: code k of 11 is a grey pixel of brightness k / 10."""

    def decode(self, tokens):
        return (tokens.float() / 5 - 1).view(-1, 1, 4, 4).expand(-1, 3, -1, -1)


def brightness(images, texts):
    scores = images.mean(dim=(1, 2, 3))
    return scores, {"brightness": scores}


def tiny_run(model_type="c2i", model=None, reward_fn=brightness, first_step=0, optimizer=None, reference=None, **changes):
    """Trains a tiny model: (model, list of metrics, optimizer)."""
    torch.manual_seed(0)
    model = tiny_model(model_type) if model is None else model
    cond, mask = tiny_condition(model_type, rows=5)
    settings = dict(steps=2, prompts_per_step=2, group_size=4, micro_batch=8, lr=1e-2, lr_end=1.0, kl_beta=0.05) | changes
    config = GRPOConfig(**settings)
    optimizer = optimizer or argrpo.make_optimizer(model, config)
    reference = reference or argrpo.frozen_copy(model)
    prompts = Prompts([f"prompt {i}" for i in range(5)], cond, mask)
    metrics = list(argrpo.train(model, reference, Blocks(), prompts, reward_fn, config, optimizer, first_step))
    return model, metrics, optimizer


def weights(model):
    return torch.cat([p.detach().flatten() for p in model.parameters()])


@pytest.mark.parametrize("model_type", ["c2i", "t2i"])
def test_micro_batch_size_never_changes_the_result(model_type):
    whole, metrics, _ = tiny_run(model_type, micro_batch=8, cfg_scale=2.0)
    for size in (3, 1):                                          # 3 does not divide 8
        parts, same, _ = tiny_run(model_type, micro_batch=size, cfg_scale=2.0)
        torch.testing.assert_close(weights(parts), weights(whole), rtol=1e-4, atol=1e-5)
        for name in ("loss", "kl", "entropy", "grad_norm", "ratio", "clip_frac"):
            assert same[-1][name] == pytest.approx(metrics[-1][name], rel=1e-3, abs=1e-5)


def test_first_pass_over_a_rollout_is_on_policy(recwarn):
    _, metrics, _ = tiny_run(cfg_scale=2.0)
    assert metrics[0]["ratio_max"] == metrics[0]["ratio"] == 1 and metrics[0]["clip_frac"] == 0
    assert metrics[0]["kl"] == pytest.approx(0, abs=1e-6)        # the policy starts at its reference
    assert metrics[0]["mismatch"] < 1e-4 and not recwarn.list


def test_memory_savers_change_nothing(monkeypatch):
    """Recomputed layers, and logits in chunks of three positions and less, give the same step up to rounding."""
    plain, metrics, _ = tiny_run("t2i", cfg_scale=2.0, kl="exact", inner_epochs=2, micro_batch=4)
    for chunk, checkpointing in ((argrpo.CHUNK, True), (2 * 4 * 11 * 3, False), (1, True)):
        monkeypatch.setattr(argrpo, "CHUNK", chunk)
        saved, same, _ = tiny_run("t2i", cfg_scale=2.0, kl="exact", inner_epochs=2, micro_batch=4, checkpointing=checkpointing)
        torch.testing.assert_close(weights(saved), weights(plain), rtol=1e-4, atol=1e-5)
        assert same[-1]["kl"] == pytest.approx(metrics[-1]["kl"], rel=1e-3)
        assert same[-1]["entropy"] == pytest.approx(metrics[-1]["entropy"], rel=1e-4)


def test_no_more_than_a_chunk_of_logits_at_a_time(monkeypatch):
    seen, model, (cond, mask) = [], tiny_model(), tiny_condition("c2i")
    model.output.register_forward_hook(lambda module, given, logits: seen.append(logits.numel()))
    monkeypatch.setattr(argrpo, "CHUNK", 200)                    # 2 branches x 3 rows x 11 codes: 3 positions at a time
    logp, _ = argrpo.token_logp(model, torch.randint(11, (3, 16)), cond, mask, cfg_scale=2.0)
    logp.sum().backward()
    assert max(seen) == 2 * 3 * 3 * 11 and len(seen) == 2 * 6    # once forwards, and once more in the backward pass


@pytest.mark.parametrize("model_type", ["c2i", "t2i"])
def test_a_copy_in_half_the_memory_computes_the_same_under_autocast(model_type):
    """The copies of the GPU, tried on the CPU: autocast rounds matrices to what they hold already."""
    model, (cond, mask) = tiny_model(model_type), tiny_condition(model_type)
    lean, tokens = argrpo.frozen_copy(model, torch.bfloat16), torch.randint(11, (3, 16))

    @torch.no_grad()
    def both(run):
        with torch.autocast("cpu", torch.bfloat16):              # a block each time, for it remembers rounded weights
            return run(lean), run(model)

    assert torch.equal(*both(lambda m: m(tokens, cond, mask)))
    with torch.no_grad():
        for p in model.parameters():
            p += 0.1
    assert not torch.equal(*both(lambda m: m(tokens, cond, mask)))
    argrpo.refresh(lean, model)
    assert torch.equal(*both(lambda m: m(tokens, cond, mask)))
    for ours, theirs in zip(*both(lambda m: argrpo.generate(m, cond, mask, generator=torch.Generator().manual_seed(0)))):
        assert torch.equal(ours, theirs)                         # tokens, and their log-probabilities
    assert lean.layers[0].attention.wqkv.weight.dtype == torch.bfloat16 and lean.rope.dtype == torch.float32
    assert not any(p.requires_grad for p in lean.parameters())


def test_the_samplers_copy_follows_the_model(monkeypatch):
    """The loop of the GPU, where a copy draws the rollouts, without a compiler: nothing changes."""
    plain, metrics, _ = tiny_run(steps=3)
    monkeypatch.setattr(torch, "compile", lambda function, **how: function)
    copied, same, _ = tiny_run(steps=3, compile=True)
    assert torch.equal(weights(copied), weights(plain)) and max(m["mismatch"] for m in same) < 1e-4


def test_chunks_add_up_their_gradients_in_float32(monkeypatch):
    """Under autocast, each chunk's gradient of the output layer is rounded to bfloat16, but not their sum: with a thousandth
    of a gradient's size as its step, a sum of many chunks would be off by more than a few roundings of single ones."""
    monkeypatch.setattr(argrpo, "autocast", lambda device: torch.autocast("cpu", torch.bfloat16))
    model, labels, tokens = tiny_model(block_size=64), torch.arange(4), torch.randint(11, (4, 64))

    def gradient(chunk):
        monkeypatch.setattr(argrpo, "CHUNK", chunk)
        model.zero_grad()
        with argrpo.autocast(None):
            logp, _ = argrpo.token_logp(model, tokens, labels)
        logp.mean().backward()
        return model.output.weight.grad.clone()

    whole, pieces = gradient(2 ** 23), gradient(4 * 11)          # a position at a time
    assert whole.dtype == torch.float32 and not torch.equal(whole, pieces)
    assert (pieces - whole).norm() < 0.003 * whole.norm()


def test_a_sampler_that_disagrees_is_reported(monkeypatch):
    honest = argrpo.generate
    monkeypatch.setattr(argrpo, "generate", lambda *a, temperature, **kw: honest(*a, temperature=1.5, **kw))
    with pytest.warns(UserWarning, match="the ratio should be 1"):
        tiny_run(steps=1)


def test_logprob_cfg_none_trains_the_unguided_policy(recwarn):
    """The official behaviour: rollouts with guidance, log-probabilities without."""
    _, metrics, _ = tiny_run(steps=1, cfg_scale=3.0, logprob_cfg="none")
    assert metrics[0]["mismatch"] > 0.1 and metrics[0]["ratio_max"] == 1
    assert not recwarn.list                                      # asked for, so nothing to warn of


def test_the_exact_kl_and_the_bonus_in_the_loop():
    """Both train; the micro-batch's size still does not matter, and the exact KL is what k3 estimates."""
    whole, metrics, _ = tiny_run(steps=3, kl="exact", diversity_bonus=0.5, kl_beta=0.5)
    parts, same, _ = tiny_run(steps=3, kl="exact", diversity_bonus=0.5, kl_beta=0.5, micro_batch=3)
    torch.testing.assert_close(weights(parts), weights(whole), rtol=1e-4, atol=1e-5)
    assert metrics[0]["kl"] == pytest.approx(0, abs=1e-6) and metrics[2]["kl"] == pytest.approx(same[2]["kl"], rel=1e-3)
    plain, k3, _ = tiny_run(steps=3)
    assert not torch.equal(weights(plain), weights(whole))
    many = dict(steps=2, kl_beta=0.0, group_size=100, micro_batch=400)   # the same pictures, 3200 tokens, measured both ways
    exact, estimate = (tiny_run(**many, kl=kl)[1][1]["kl"] for kl in ("exact", "k3"))
    assert exact == pytest.approx(estimate, rel=0.2)


def test_inner_epochs_leave_the_old_policy():
    _, metrics, _ = tiny_run(steps=1, inner_epochs=4, lr=0.03, warmup_steps=1)
    assert metrics[0]["ratio_max"] > 1 and metrics[0]["clip_frac"] > 0


def test_equal_rewards_without_kl_change_nothing():
    start = tiny_model()
    model, metrics, _ = tiny_run(reward_fn=lambda images, texts: (torch.full((8,), 0.1), {}), kl_beta=0.0,
                                 model=copy.deepcopy(start))
    assert torch.equal(weights(model), weights(start))
    assert metrics[0]["flat_groups"] == 1 and metrics[0]["grad_norm"] == 0


def test_a_bad_reward_stops_before_the_weights_change():
    start = tiny_model()
    model = copy.deepcopy(start)
    with pytest.raises(FloatingPointError, match="step 0"):
        tiny_run(model=model, reward_fn=lambda images, texts: (torch.tensor([math.inf] + [0.0] * 7), {}))
    assert torch.equal(weights(model), weights(start))


def test_continuing_equals_never_stopping():
    straight, metrics, _ = tiny_run(steps=4)
    model, first, optimizer = tiny_run(steps=2)
    torch.manual_seed(0)
    reference = argrpo.frozen_copy(tiny_model())
    model, second, _ = tiny_run(steps=4, model=model, optimizer=optimizer, reference=reference, first_step=2)
    assert torch.equal(weights(model), weights(straight))
    for a, b in zip(metrics, first + second):
        assert {k: v for k, v in a.items() if "seconds" not in k} == {k: v for k, v in b.items() if "seconds" not in k}


def test_learning_rate_warms_up_and_decays():
    def rates(**settings):
        config = GRPOConfig(steps=4, lr=0.1, **settings)
        return [argrpo.learning_rate(config, step) for step in range(4)]

    assert rates(warmup_steps=3, lr_end=1.0) == pytest.approx([0.1 / 3, 0.2 / 3, 0.1, 0.1])
    assert rates(warmup_steps=1, lr_end=0.0) == pytest.approx([0.1, 0.075, 0.05, 0.025])
    assert rates(warmup_steps=1, lr_end=0.6) == pytest.approx([0.1, 0.09, 0.08, 0.07])


def test_the_optimizer_gets_the_steps_learning_rate():
    _, _, optimizer = tiny_run(steps=2, warmup_steps=4, lr=0.1)
    assert optimizer.param_groups[0]["lr"] == pytest.approx(0.05)


def test_prompts_come_in_endless_shuffled_passes():
    picked = torch.cat([argrpo.pick_prompts(5, step, 3, seed=7) for step in range(10)]).view(6, 5)
    for one_pass in picked:
        assert sorted(one_pass.tolist()) == [0, 1, 2, 3, 4]
    assert len({tuple(one_pass.tolist()) for one_pass in picked}) > 1
    assert len(argrpo.pick_prompts(2, 1, 7, seed=0)) == 7        # more per step than there are


def test_diversity_by_hand():
    """Two groups of two: black and white differ by 1 everywhere, two equal pictures by 0."""
    images = torch.stack([torch.zeros(3, 2, 2), torch.ones(3, 2, 2), torch.ones(3, 2, 2), torch.ones(3, 2, 2)])
    assert argrpo.group_diversity(images, 2).tolist() == [1.0, 0.0]


def test_paint_gives_pictures_from_0_to_1():
    vq = VQModel(VQConfig(ch=8, ch_mult=(1, 1), z_channels=8, codebook_size=5, codebook_embed_dim=4))
    images = argrpo.paint(vq, torch.randint(5, (5, 16)), micro_batch=2)
    assert images.shape == (5, 3, 8, 8) and images.min() >= 0 and images.max() <= 1


def test_reward_rises_on_the_tiny_model():
    """40 steps towards brightness.  The first step's mean over 16 images of 16 pixels has a standard error of about
    0.3 / sqrt(16 * 16) < 0.02, so from below 0.6 to above 0.8, over the last five steps, is no accident."""
    _, metrics, _ = tiny_run(steps=40, prompts_per_step=4, lr=1e-2)
    assert metrics[0]["reward"] < 0.6 and sum(m["reward"] for m in metrics[-5:]) / 5 > 0.8
    assert metrics[-1]["kl"] > 0.01


@pytest.mark.parametrize("bad, message", [
    (dict(group_size=1), "group_size must be at least 2"),
    (dict(steps=0), "steps must be at least 1, not 0"),
    (dict(lr=math.nan), "lr must be a finite number"),
    (dict(kl_beta=-1.0), "kl_beta must be a finite number of at least 0, not -1"),
    (dict(temperature=0.0), "temperature must be a finite number above 0"),
    (dict(logprob_cfg="both"), "logprob_cfg must be"),
])
def test_settings_are_checked(bad, message):
    with pytest.raises(ValueError, match=message):
        GRPOConfig(**bad)
