"""The loop as a whole: that it learns, continues, has seams.  test_07_wiring.py has its stages."""

import copy
import math

import pytest
import torch
from conftest import (
    Blocks,
    Loop,
    Spy,
    brightness,
    gradient,
    same,
    tiny_model,
    tiny_run,
    tiny_vq,
    weights,
)

import argrpo
from argrpo import GRPOConfig, Prompts

# --- what a step is, in a few numbers --------------------------------------------------------

def test_first_pass_over_a_rollout_is_on_policy():
    _, metrics, _ = tiny_run(cfg_scale=2.0)
    assert metrics[0]["ratio_max"] == metrics[0]["ratio"] == 1, "no update yet: the ratio is 1"
    assert metrics[0]["clip_frac"] == 0, "and nothing is clipped"
    assert metrics[0]["kl"] == pytest.approx(0, abs=1e-6), "the policy starts at its reference"
    assert metrics[0]["mismatch"] < 1e-4, "sampler and learner are one policy"


def test_more_update_epochs_leave_the_old_policy():
    _, metrics, _ = tiny_run(steps=1, update_epochs=4, lr=0.03, warmup_steps=1)
    assert metrics[0]["ratio_max"] > 1, "pi_old must stay, while pi_theta moves"
    assert metrics[0]["clip_frac"] > 0, "and then the clip matters"


def test_logprob_cfg_none_trains_the_unguided_policy():
    """The official behaviour: rollouts with guidance, log-probabilities without."""
    _, metrics, _ = tiny_run(steps=1, cfg_scale=3.0, logprob_cfg="none")
    assert metrics[0]["mismatch"] > 0.1 and metrics[0]["ratio_max"] == 1, (
        "the sampler is guided, pi_old is the unguided learner itself")


def test_equal_rewards_without_kl_change_nothing():
    start = tiny_model()
    model, metrics, _ = tiny_run(
        reward_fn=lambda images, texts: (torch.full((8,), 0.1), {}), kl_beta=0.0,
        model=copy.deepcopy(start))
    assert metrics[0]["flat_groups"] == 1 and metrics[0]["grad_norm"] == 0, (
        "equal rewards: every group is flat, and no gradient is left")
    assert torch.equal(weights(model), weights(start)), "a flat group teaches nothing"


def test_a_missing_reward_teaches_nothing_and_is_counted():
    """Half of the images are not judged: they are in no mean, and have advantage 0."""
    def half_blind(images, texts):
        scores, _ = brightness(images, texts)
        scores = scores.masked_fill(torch.arange(8) % 2 == 0, math.nan)
        return scores, {"half": scores}
    _, metrics, _ = tiny_run(steps=1, reward_fn=half_blind)
    assert metrics[0]["missing"] == 0.5, "the share of images without a reward"
    assert 0 < metrics[0]["reward"] < 1 and metrics[0]["reward/half"] == metrics[0]["reward"], (
        "the mean of the known rewards")
    assert math.isfinite(metrics[0]["grad_norm"]) and metrics[0]["grad_norm"] > 0, (
        "the images that were judged still teach")


def test_a_bad_reward_stops_before_the_weights_change():
    start = tiny_model()
    model = copy.deepcopy(start)
    with pytest.raises(FloatingPointError, match="step 0"):
        tiny_run(model=model,
                 reward_fn=lambda images, texts: (torch.tensor([math.inf] + [0.0] * 7), {}))
    assert torch.equal(weights(model), weights(start)), "a gradient that is not finite is not taken"


def test_a_plain_reward_is_told_to_become_a_reward_set():
    """reward.py's rewards return (B,), `train` wants (total, parts): RewardSet is the bridge."""
    with pytest.raises(TypeError, match="RewardSet"):
        tiny_run(reward_fn=lambda images, texts: images.mean(dim=(1, 2, 3)))


def test_processes_that_cannot_share_a_steps_prompts_are_refused():
    """Not silently given fewer."""
    with pytest.raises(ValueError, match="2 prompts cannot be shared by 3 processes"):
        tiny_run(seams=dict(shard=(0, 3)))


# --- what must not matter --------------------------------------------------------------------

@pytest.mark.parametrize("model_type", ["c2i", "t2i"])
def test_micro_batch_size_never_changes_the_result(model_type):
    whole, metrics, _ = tiny_run(model_type, micro_batch=8, cfg_scale=2.0)
    for size in (3, 1):                          # 3 does not divide 8
        parts, again, _ = tiny_run(model_type, micro_batch=size, cfg_scale=2.0)
        same(weights(parts), weights(whole),
             f"micro-batches of {size} are no other algorithm: weigh each by b / B")
        for name in ("loss", "kl", "entropy", "grad_norm", "ratio", "clip_frac"):
            assert again[-1][name] == pytest.approx(metrics[-1][name], rel=1e-3, abs=1e-5), name


def test_continuing_equals_never_stopping():
    straight, metrics, _ = tiny_run(steps=4)
    model, first, optimizer = tiny_run(steps=2)
    torch.manual_seed(0)
    model, second, _ = tiny_run(steps=4, model=model, optimizer=optimizer, reference=tiny_model(),
                                first_step=2)
    assert torch.equal(weights(model), weights(straight)), "a step depends on its number alone"
    assert metrics == first + second, "the log goes on as if the run had never stopped"


# --- that it learns --------------------------------------------------------------------------

def test_reward_rises_on_the_tiny_model():
    """30 steps towards brightness.  The first step's mean over 16 images of 4 pixels has a standard
    error of about 0.3 / sqrt(16 * 4) < 0.04, so the rise is no accident."""
    _, metrics, _ = tiny_run(model=tiny_model(block_size=4), steps=30, prompts_per_step=4, lr=2e-2)
    last = sum(m["reward"] for m in metrics[-5:]) / 5
    assert metrics[0]["reward"] < 0.6 and last > 0.8, "GRPO must raise the reward"
    assert metrics[-1]["kl"] > 0.01, "and so leave the reference"


def test_an_entropy_bonus_through_the_loss_raises_entropy():
    """Another loss_fn may train the entropy: `train` keeps its gradient for it."""
    bonus = dict(loss_fn=lambda logp, old, ref, A, entropy: (-entropy.mean(), {}))
    _, metrics, _ = tiny_run(steps=10, seams=bonus)
    assert metrics[-1]["entropy"] > metrics[0]["entropy"] + 0.01, (
        "ten steps up the entropy raise it")


def test_images_are_from_0_to_1():
    vq = tiny_vq()
    images = argrpo.to_images(vq, torch.randint(5, (5, 16)), micro_batch=2)
    assert images.shape == (5, 3, 8, 8) and images.min() >= 0 and images.max() <= 1, (
        "images are cut to [0, 1]")


# --- the seams -------------------------------------------------------------------------------

def test_every_seam_has_a_default_that_is_the_plain_method():
    """What the defaults do, handed in from outside, gives the same weights to the bit."""
    plain, _, _ = tiny_run()
    seams = dict(
        sampler=copy.deepcopy,
        extra_loss=lambda model, index, step: {},
        advantage_fn=lambda rewards, *_: argrpo.group_advantages(rewards, 4),
        loss_fn=lambda *given: argrpo.grpo_loss(*given[:4], kl_beta=0.05),
        sync=lambda model: None)
    for name, seam in seams.items():
        model, _, _ = tiny_run(seams={name: seam})
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
        assert any(p.grad is not None for p in model.parameters())   # after the loss's own gradient
        return {"extra": 5.0}

    def sync(model):
        for p in model.parameters():
            p.grad.zero_()

    _, metrics, _ = tiny_run(steps=1, micro_batch=3, seams=dict(
        advantage_fn=advantage_fn, loss_fn=loss_fn, extra_loss=extra_loss, sync=sync))
    assert seen["advantage_fn"] == ((8,), (8, 3, 4, 4), (8, 16), (2,), 0), (
        "rewards (B,), images, tokens (B, N), index (P,), and the step")
    assert set(seen["loss_fn"]) == {(8, 16)}, (  # the last call is for the log, on all images
        "loss_fn gets log-probs, and what advantage_fn has returned")
    assert metrics[0]["mine"] == 7.0 and metrics[0]["extra"] == 5.0, (
        "what loss_fn and extra_loss report is logged")
    assert metrics[0]["grad_norm"] == 0, "sync comes before the norm is taken"


def test_seams_are_asked_in_every_epoch_and_told_the_step():
    """extra_loss(model, index, step) and loss_fn's arguments, row by row."""
    extra, pieces = Spy(lambda model, index, step: {}), []

    def loss_fn(logp, old_logp, ref_logp, advantages, entropy):
        pieces.append([x.detach().clone() for x in (logp, old_logp, ref_logp, advantages, entropy)])
        return argrpo.grpo_loss(logp, old_logp, ref_logp, advantages, kl_beta=0.3)
    loop = Loop(steps=3, first_step=1, seams=dict(extra_loss=extra, loss_fn=loss_fn))
    for step in loop.steps:
        *epochs, log = pieces                    # two micro-batches an epoch, then the log's call
        for k, piece in enumerate(epochs):
            rows = torch.arange(9).split(5)[k % 2]
            for name, ours, whole in (("old_logp", piece[1], step.logp),
                                      ("ref_logp", piece[2], step.ref_logp),
                                      ("advantages", piece[3], step.advantages)):
                same(ours, whole[rows], f"loss_fn's {name} are those of the micro-batch's rows")
        for given, whole in zip(log[1:4], (step.logp, step.ref_logp, step.advantages)):
            same(given, whole, "the log's statistics are of all images of the step")
        for number in (0, 4):                    # log-probs and entropy
            last = torch.cat([piece[number] for piece in epochs[2:]])
            same(log[number], last, "and of the policy in the last epoch")
        pieces.clear()
        for (model, index, number), _ in extra.calls:
            assert model is loop.model and torch.equal(index, step.index), (
                "extra_loss gets the policy and the prompts of its step")
            assert number == step.metrics["step"], "extra_loss is told the step's number"
        assert len(extra.calls) == 2, "extra_loss adds its gradient in every epoch"
        extra.calls.clear()


def test_shares_of_a_step_add_up_to_it():
    """Two processes' mean gradient is that of one process with all prompts: the same images, and
    b / B within a share.  See shard and sync in argrpo.train."""
    seen = {}
    for shard in ((0, 1), (0, 2), (1, 2)):
        gradients = []
        loop = Loop(prompts_per_step=4, rollout_prompts=1, update_epochs=1, seams=dict(
            shard=shard, sync=lambda model, into=gradients: into.append(gradient(model))))
        seen[shard] = loop.step(), gradients[0]
    (whole, right), (first, a), (second, b) = seen.values()
    assert torch.equal(whole.index, torch.cat([first.index, second.index])), (
        "process k takes the k-th part of the step's prompts")
    assert torch.equal(whole.tokens, torch.cat([first.tokens, second.tokens])), (
        "pass k of all processes has stream k")
    same((a + b) / 2, right, "the mean of the processes' gradients is the whole step's")


def test_the_sampler_seam_draws_and_the_model_learns():
    """What sampler(model) returns draws the rollout, and is asked anew in every step."""
    torch.manual_seed(1)
    other, asked = tiny_model(), []

    def sampler(model):
        asked.append(weights(model))
        return other
    model, metrics, _ = tiny_run(steps=2, seams=dict(sampler=sampler))
    assert all(m["mismatch"] > 0.1 for m in metrics), "the images were drawn by the other model"
    assert len(asked) == 2 and not torch.equal(*asked), "asked in each step, with its weights"
    assert not torch.equal(weights(model), asked[1]), "the model itself is trained"


def test_a_step_holds_what_its_metrics_were_computed_from():
    model, config = tiny_model(), GRPOConfig(steps=1, prompts_per_step=2, group_size=4)
    prompts = Prompts([f"prompt {i}" for i in range(5)], torch.arange(5))
    start = copy.deepcopy(model)
    step = next(argrpo.train(model, tiny_model(), Blocks(), prompts, brightness, config,
                             argrpo.make_optimizer(model, config)))
    assert step.texts == [f"prompt {i}" for i in step.index.tolist() for _ in range(4)], (
        "each prompt G times, neighbours as its images are")
    cond = step.index.repeat_interleave(4)
    logp, entropy = argrpo.token_logp(start, step.tokens, cond)
    same(step.logp, logp.detach(), "logp is of the weights before the update")
    same(step.entropy, entropy.detach(), "and so is the entropy")
    assert not torch.allclose(step.ref_logp, step.logp), (
        "the reference is another model, and says other things")
    same(step.images, argrpo.to_images(Blocks(), step.tokens), "images are those of the tokens")
    assert torch.equal(step.rewards, step.parts["brightness"]), (
        "rewards are what reward_fn returned")
    same(step.advantages, argrpo.group_advantages(step.rewards, 4), "advantages of the rewards")
    assert step.metrics["reward"] == pytest.approx(step.rewards.mean().item()), (
        "the logged reward is the mean of the rewards")
