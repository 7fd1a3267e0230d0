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


def tiny_run(
    model_type="c2i",
    model=None,
    reward_fn=brightness,
    first_step=0,
    optimizer=None,
    reference=None,
    seams=None,
    **changes,
):
    """Trains a tiny model: (model, list of metrics, optimizer)."""
    torch.manual_seed(0)
    model = tiny_model(model_type) if model is None else model
    cond, mask = tiny_condition(model_type, rows=5)
    settings = dict(
        steps=2, prompts_per_step=2, group_size=4, micro_batch=8, lr=1e-2, lr_end=1.0, kl_beta=0.05
    )
    config = GRPOConfig(**(settings | changes))
    optimizer = optimizer or argrpo.make_optimizer(model, config)
    reference = reference or copy.deepcopy(model)
    prompts = Prompts([f"prompt {i}" for i in range(5)], cond, mask)
    steps = argrpo.train(
        model,
        reference,
        Blocks(),
        prompts,
        reward_fn,
        config,
        optimizer,
        first_step,
        **(seams or {}),
    )
    return model, [step.metrics for step in steps], optimizer


def weights(model):
    return torch.cat([p.detach().flatten() for p in model.parameters()])


@pytest.mark.parametrize("model_type", ["c2i", "t2i"])
def test_micro_batch_size_never_changes_the_result(model_type):
    whole, metrics, _ = tiny_run(model_type, micro_batch=8, cfg_scale=2.0)
    for size in (3, 1):  # 3 does not divide 8
        parts, same, _ = tiny_run(model_type, micro_batch=size, cfg_scale=2.0)
        torch.testing.assert_close(weights(parts), weights(whole), rtol=1e-4, atol=1e-5)
        for name in ("loss", "kl", "entropy", "grad_norm", "ratio", "clip_frac"):
            assert same[-1][name] == pytest.approx(metrics[-1][name], rel=1e-3, abs=1e-5)


def test_first_pass_over_a_rollout_is_on_policy():
    _, metrics, _ = tiny_run(cfg_scale=2.0)
    assert metrics[0]["ratio_max"] == metrics[0]["ratio"] == 1 and metrics[0]["clip_frac"] == 0
    assert metrics[0]["kl"] == pytest.approx(0, abs=1e-6)  # the policy starts at its reference
    assert metrics[0]["mismatch"] < 1e-4


def test_chunks_of_logits_change_nothing(monkeypatch):
    """Logits in chunks of three positions, and of one, give the same step up to rounding."""
    how = dict(cfg_scale=2.0, update_epochs=2, micro_batch=4)
    plain, metrics, _ = tiny_run("t2i", **how)
    for chunk in (2 * 4 * 11 * 3, 1):
        monkeypatch.setattr(argrpo, "CHUNK", chunk)
        saved, same, _ = tiny_run("t2i", **how)
        torch.testing.assert_close(weights(saved), weights(plain), rtol=1e-4, atol=1e-5)
        assert same[-1]["kl"] == pytest.approx(metrics[-1]["kl"], rel=1e-3)
        assert same[-1]["entropy"] == pytest.approx(metrics[-1]["entropy"], rel=1e-4)


def test_no_more_than_a_chunk_of_logits_at_a_time(monkeypatch):
    seen, model, (cond, mask) = [], tiny_model(), tiny_condition("c2i")
    model.output.register_forward_hook(lambda module, given, logits: seen.append(logits.numel()))
    monkeypatch.setattr(
        argrpo, "CHUNK", 200
    )  # 2 branches x 3 rows x 11 codes: 3 positions at a time
    logp, _ = argrpo.token_logp(model, torch.randint(11, (3, 16)), cond, mask, cfg_scale=2.0)
    logp.sum().backward()
    assert (
        max(seen) == 2 * 3 * 3 * 11 and len(seen) == 2 * 6
    )  # once forwards, and once more in the backward pass


def test_chunks_add_up_their_gradients_in_float32(monkeypatch):
    """Under autocast, each chunk's gradient of the output layer is rounded to bfloat16, but not
    their sum, which would be off by more than a few roundings of single ones."""
    monkeypatch.setattr(
        argrpo,
        "autocast",
        lambda device: torch.autocast("cpu", torch.bfloat16, cache_enabled=False),
    )
    model, labels, tokens = tiny_model(block_size=64), torch.arange(4), torch.randint(11, (4, 64))

    def gradient(chunk):
        monkeypatch.setattr(argrpo, "CHUNK", chunk)
        model.zero_grad()
        with argrpo.autocast(None):
            logp, _ = argrpo.token_logp(model, tokens, labels)
        logp.mean().backward()
        return model.output.weight.grad.clone()

    whole, pieces = gradient(2**23), gradient(4 * 11)  # a position at a time
    assert whole.dtype == torch.float32 and not torch.equal(whole, pieces)
    assert (pieces - whole).norm() < 0.003 * whole.norm()


def test_logprob_cfg_none_trains_the_unguided_policy():
    """The official behaviour: rollouts with guidance, log-probabilities without."""
    _, metrics, _ = tiny_run(steps=1, cfg_scale=3.0, logprob_cfg="none")
    assert metrics[0]["mismatch"] > 0.1 and metrics[0]["ratio_max"] == 1


def test_more_update_epochs_leave_the_old_policy():
    _, metrics, _ = tiny_run(steps=1, update_epochs=4, lr=0.03, warmup_steps=1)
    assert metrics[0]["ratio_max"] > 1 and metrics[0]["clip_frac"] > 0


def test_equal_rewards_without_kl_change_nothing():
    start = tiny_model()
    model, metrics, _ = tiny_run(
        reward_fn=lambda images, texts: (torch.full((8,), 0.1), {}),
        kl_beta=0.0,
        model=copy.deepcopy(start),
    )
    assert torch.equal(weights(model), weights(start))
    assert metrics[0]["flat_groups"] == 1 and metrics[0]["grad_norm"] == 0


def test_a_bad_reward_stops_before_the_weights_change():
    start = tiny_model()
    model = copy.deepcopy(start)
    with pytest.raises(FloatingPointError, match="step 0"):
        tiny_run(
            model=model, reward_fn=lambda images, texts: (torch.tensor([math.inf] + [0.0] * 7), {})
        )
    assert torch.equal(weights(model), weights(start))


def test_continuing_equals_never_stopping():
    straight, metrics, _ = tiny_run(steps=4)
    model, first, optimizer = tiny_run(steps=2)
    torch.manual_seed(0)
    reference = tiny_model()
    model, second, _ = tiny_run(
        steps=4, model=model, optimizer=optimizer, reference=reference, first_step=2
    )
    assert torch.equal(weights(model), weights(straight))
    for a, b in zip(metrics, first + second):
        assert {k: v for k, v in a.items() if "seconds" not in k} == {
            k: v for k, v in b.items() if "seconds" not in k
        }


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
    assert len(argrpo.pick_prompts(2, 1, 7, seed=0)) == 7  # more per step than there are


def test_images_are_from_0_to_1():
    vq = VQModel(
        VQConfig(ch=8, ch_mult=(1, 1), z_channels=8, codebook_size=5, codebook_embed_dim=4)
    )
    images = argrpo.to_images(vq, torch.randint(5, (5, 16)), micro_batch=2)
    assert images.shape == (5, 3, 8, 8) and images.min() >= 0 and images.max() <= 1


def test_reward_rises_on_the_tiny_model():
    """40 steps towards brightness.  The first step's mean over 16 images of 16 pixels has a
    standard error of about 0.3 / sqrt(16 * 16) < 0.02, so the rise is no accident."""
    _, metrics, _ = tiny_run(steps=40, prompts_per_step=4, lr=1e-2)
    assert metrics[0]["reward"] < 0.6 and sum(m["reward"] for m in metrics[-5:]) / 5 > 0.8
    assert metrics[-1]["kl"] > 0.01


# --- the seams ------------------------------------------------------------------------------


def test_every_seam_has_a_default_that_is_the_plain_method():
    """What the defaults do, handed in from outside, gives the same weights to the bit."""
    plain, _, _ = tiny_run(steps=3)
    seams = dict(
        sampler=copy.deepcopy,
        extra_loss=lambda model, index, step: {},
        advantage_fn=lambda rewards, *_: argrpo.group_advantages(rewards, 4),
        loss_fn=lambda *given: argrpo.grpo_loss(*given, kl_beta=0.05),
        sync=lambda model: None,
    )
    for name, seam in seams.items():
        model, _, _ = tiny_run(steps=3, seams={name: seam})
        assert torch.equal(weights(model), weights(plain)), name


def test_each_seam_is_given_what_it_is_promised():
    seen = {}

    def advantage_fn(rewards, images, tokens, index, step):
        seen["advantage_fn"] = rewards.shape, images.shape, tokens.shape, index.shape, step
        return torch.ones(8, 16)

    def loss_fn(logp, old_logp, ref_logp, advantages, entropy):
        seen["loss_fn"] = [x.shape for x in (logp, old_logp, ref_logp, advantages, entropy)]
        return -entropy.mean(), {"mine": 7.0}

    def extra_loss(model, index, step):
        assert any(p.grad is not None for p in model.parameters())  # after the loss's own gradient
        return {"extra": 5.0}

    def sync(model):
        for p in model.parameters():
            p.grad.zero_()

    model, metrics, _ = tiny_run(
        steps=1,
        micro_batch=3,
        seams=dict(advantage_fn=advantage_fn, loss_fn=loss_fn, extra_loss=extra_loss, sync=sync),
    )
    assert seen["advantage_fn"] == ((8,), (8, 3, 4, 4), (8, 16), (2,), 0)
    assert set(seen["loss_fn"]) == {(8, 16)}  # the last call is for the log, on all images
    assert metrics[0]["mine"] == 7.0 and metrics[0]["extra"] == 5.0
    assert metrics[0]["grad_norm"] == 0  # sync comes before the norm is taken


def test_an_entropy_bonus_through_the_loss_raises_entropy():
    bonus = dict(loss_fn=lambda logp, old, ref, A, entropy: (-entropy.mean(), {}))
    _, metrics, _ = tiny_run(steps=10, seams=bonus)
    assert metrics[-1]["entropy"] > metrics[0]["entropy"] + 0.01


def test_shares_of_a_step_are_the_step():
    """Two processes of one prompt each, their gradients averaged, are one process of two prompts.

    The random streams of the processes differ, so the rollouts are drawn prompt by prompt."""

    def rollouts(shard, **changes):
        model, config = (
            tiny_model(),
            GRPOConfig(steps=1, prompts_per_step=2, group_size=4, **changes),
        )
        prompts = Prompts([f"prompt {i}" for i in range(5)], torch.arange(5))
        step = next(
            argrpo.train(
                model,
                copy.deepcopy(model),
                Blocks(),
                prompts,
                brightness,
                config,
                argrpo.make_optimizer(model, config),
                shard=shard,
            )
        )
        return step.index, step.tokens

    torch.manual_seed(0)
    start = torch.get_rng_state()
    parts = []
    for shard in ((0, 1), (0, 2), (1, 2)):
        torch.set_rng_state(start)
        parts.append(rollouts(shard, rollout_prompts=1))
    for whole, first, second in zip(*parts):
        assert torch.equal(whole, torch.cat([first, second]))


def test_a_step_holds_what_its_metrics_were_computed_from():
    model, config = tiny_model(), GRPOConfig(steps=1, prompts_per_step=2, group_size=4)
    prompts = Prompts([f"prompt {i}" for i in range(5)], torch.arange(5))
    start = copy.deepcopy(model)
    step = next(
        argrpo.train(
            model,
            tiny_model(),
            Blocks(),
            prompts,
            brightness,
            config,
            argrpo.make_optimizer(model, config),
        )
    )
    assert step.texts == [f"prompt {i}" for i in step.index.tolist() for _ in range(4)]
    cond = step.index.repeat_interleave(4)
    logp, entropy = argrpo.token_logp(start, step.tokens, cond)  # of the weights before the update
    torch.testing.assert_close(step.logp, logp.detach())
    torch.testing.assert_close(step.entropy, entropy.detach())
    assert not torch.allclose(step.ref_logp, step.logp)
    torch.testing.assert_close(step.images, argrpo.to_images(Blocks(), step.tokens))
    assert torch.equal(step.rewards, step.parts["brightness"])
    torch.testing.assert_close(step.advantages, argrpo.group_advantages(step.rewards, 4))
    assert step.metrics["reward"] == pytest.approx(step.rewards.mean().item())
