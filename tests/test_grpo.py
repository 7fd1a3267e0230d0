"""GRPO as maths: advantages, KL, the clipped loss, and an exact check of the policy gradient."""

import math
from itertools import product

import pytest
import torch
from conftest import tiny_model

from argrpo import group_advantages, group_statistics, grpo_loss, kl_exact, kl_k3, token_logp

# --- advantages ------------------------------------------------------------------------------


def test_advantages_by_hand():
    """Group (1, 2, 3): mean 2, unbiased std 1.  Group (0, 0, 6): mean 2, std sqrt(12)."""
    A = group_advantages(torch.tensor([1.0, 2.0, 3.0, 0.0, 0.0, 6.0]), 3)
    s, t = 1 + 1e-4, math.sqrt(12) + 1e-4
    torch.testing.assert_close(A, torch.tensor([-1 / s, 0.0, 1 / s, -2 / t, -2 / t, 4 / t]))


def test_advantages_without_scale_only_centre():
    A = group_advantages(torch.tensor([1.0, 2.0, 3.0, 0.0, 0.0, 6.0]), 3, scale=False)
    torch.testing.assert_close(A, torch.tensor([-1.0, 0.0, 1.0, -2.0, -2.0, 4.0]))


def test_equal_rewards_give_exactly_zero():
    """The float32 mean of 0.1s is not 0.1: over an eps of 1e-4, that would be an advantage."""
    assert (group_advantages(torch.full((14,), 0.1), 7) == 0).all()


def test_tiny_spreads_are_damped_by_eps():
    """Rewards that differ by 2e-6 have a std of 1.4e-6: advantages of a percent, not of one."""
    A = group_advantages(torch.tensor([0.0, 2e-6]), 2)
    expected = 1e-6 / (math.sqrt(2) * 1e-6 + 1e-4)
    torch.testing.assert_close(A, torch.tensor([-expected, expected]))


def test_a_missing_reward_is_left_out():
    """Of (1, missing, 3, 5) the known ones have mean 3 and standard deviation 2."""
    A = group_advantages(torch.tensor([1.0, math.nan, 3.0, 5.0]), 4, eps=0.0)
    torch.testing.assert_close(A, torch.tensor([-1.0, 0.0, 0.0, 1.0]))
    nothing = torch.tensor(
        [math.nan, math.nan, 7.0, math.nan] + [math.nan] * 4
    )  # one known reward, and none
    assert group_advantages(nothing, 4).tolist() == [0.0] * 8
    mean, std, flat = group_statistics(
        torch.tensor([1.0, math.nan, 3.0, 5.0, 2.0, 2.0, math.nan, 2.0]), 4
    )
    assert (
        mean.tolist() == [[3.0], [2.0]]
        and std.tolist() == [[2.0], [0.0]]
        and flat.tolist() == [[False], [True]]
    )


def test_groups_do_not_see_each_other():
    a, b = torch.randn(8), torch.randn(8) * 100
    torch.testing.assert_close(group_advantages(torch.cat([a, b]), 8)[:8], group_advantages(a, 8))


@pytest.mark.parametrize(
    "rewards, group_size", [(torch.zeros(4), 1), (torch.zeros(5), 2), (torch.zeros(2, 2), 2)]
)
def test_advantages_need_whole_groups(rewards, group_size):
    with pytest.raises(ValueError, match="group_size"):
        group_advantages(rewards, group_size)


# --- KL --------------------------------------------------------------------------------------


def test_k3_by_hand():
    """pi = 0.5, pi_ref = 0.25: k3 = 1/2 - log(1/2) - 1."""
    kl = kl_k3(torch.tensor(0.5).log(), torch.tensor(0.25).log())
    torch.testing.assert_close(kl, torch.tensor(0.5 - math.log(0.5) - 1))


def test_k3_averages_to_the_exact_kl():
    logits, ref_logits = torch.randn(4, 7), torch.randn(4, 7)
    logp, ref_logp = logits.log_softmax(-1), ref_logits.log_softmax(-1)
    k3 = kl_k3(logp, ref_logp)
    assert (k3 >= 0).all()
    torch.testing.assert_close((logp.exp() * k3).sum(-1), kl_exact(logits, ref_logits))
    torch.testing.assert_close(kl_exact(logits, logits), torch.zeros(4))


def test_the_exact_kl_by_brute_force():
    """Value and gradient against a loop over the vocabulary."""
    logits, ref_logits = torch.randn(3, 5, requires_grad=True), torch.randn(3, 5)
    p, q = logits.softmax(-1), ref_logits.softmax(-1)
    brute = torch.stack(
        [sum(p[i, v] * (p[i, v] / q[i, v]).log() for v in range(5)) for i in range(3)]
    )
    kl = kl_exact(logits, ref_logits)
    torch.testing.assert_close(kl, brute)
    for a, b in zip(
        torch.autograd.grad(kl.sum(), logits), torch.autograd.grad(brute.sum(), logits)
    ):
        torch.testing.assert_close(a, b)


# --- the loss --------------------------------------------------------------------------------


def one_token(ratio, A, **settings):
    """Loss, stats and gradient of a single token with the given ratio and advantage."""
    logp = torch.tensor([[math.log(ratio)]], requires_grad=True)
    loss, stats = grpo_loss(
        logp, torch.zeros(1, 1), torch.zeros(1, 1), torch.tensor([A]), **settings
    )
    loss.backward()
    return loss.item(), stats, logp.grad.item()


@pytest.mark.parametrize(
    "ratio, A, loss, gradient",
    [
        (1.0, 2.0, -2.0, -2.0),  # inside: -ratio A, and so is the gradient
        (1.1, 2.0, -2.2, -2.2),
        (1.5, 2.0, -2.4, 0.0),  # a good sample that is already 20% likelier: no more gain
        (0.5, 2.0, -1.0, -1.0),  # a good sample that became less likely is never clipped
        (0.5, -2.0, 1.6, 0.0),  # a bad sample that is already 20% less likely
        (1.5, -2.0, 3.0, 3.0),  # a bad sample that became likelier is never clipped
    ],
)
def test_clip_on_both_sides(ratio, A, loss, gradient):
    value, stats, slope = one_token(ratio, A, clip_eps=0.2)
    assert value == pytest.approx(loss) and slope == pytest.approx(gradient)
    assert stats["clip_frac"] == (gradient == 0)
    assert stats["ratio"] == stats["ratio_max"] == pytest.approx(ratio)


def test_clip_higher():
    assert one_token(1.25, 1.0, clip_eps=0.2, clip_eps_high=0.28)[2] == pytest.approx(-1.25)
    assert one_token(1.35, 1.0, clip_eps=0.2, clip_eps_high=0.28)[2] == 0


def test_kl_is_added_with_its_weight():
    logp, ref_logp = torch.full((2, 3), -1.0), torch.full((2, 3), -1.5)
    loss, stats = grpo_loss(logp, logp, ref_logp, torch.tensor([1.0, -1.0]), kl_beta=0.3)
    kl = math.exp(-0.5) + 0.5 - 1
    assert stats["kl"] == pytest.approx(kl) and loss.item() == pytest.approx(0.3 * kl)
    assert all(isinstance(value, float) for value in stats.values())


def test_without_reference_there_is_no_kl():
    logp = torch.zeros(2, 3)
    loss, stats = grpo_loss(logp, logp, None, torch.tensor([1.0, 1.0]))
    assert loss == -1 and "kl" not in stats
    with pytest.raises(ValueError, match="kl_beta"):
        grpo_loss(logp, logp, None, torch.tensor([1.0, 1.0]), kl_beta=0.1)


def test_on_policy_gradient_is_minus_A_grad_log_p():
    model, tokens, cond = tiny_model(), torch.randint(11, (4, 16)), torch.arange(4)
    A = torch.tensor([1.0, -0.5, 0.3, -0.8])
    logp, _ = token_logp(model, tokens, cond, cfg_scale=2.0)
    loss, stats = grpo_loss(logp, logp.detach(), None, A)
    got = torch.autograd.grad(loss, model.parameters(), retain_graph=True)
    expected = torch.autograd.grad(-(A[:, None] * logp).mean(), model.parameters())
    assert stats["ratio"] == stats["ratio_max"] == 1 and stats["clip_frac"] == 0
    for a, b in zip(got, expected):
        torch.testing.assert_close(a, b)


# --- the whole thing, by enumeration ---------------------------------------------------------


@pytest.mark.parametrize("cfg_scale, temperature", [(1.0, 1.0), (2.5, 0.8)])
def test_every_image_of_a_tiny_model(cfg_scale, temperature):
    """2 x 2 tokens from 3 codes make 81 images.  Their probabilities sum to one, and the loss's
    gradient, averaged over them, is 1/N of the gradient of the expected reward, downhill."""
    model = tiny_model(block_size=4, vocab_size=3).double()
    images = torch.tensor(list(product(range(3), repeat=4)))  # (81, 4)
    cond, reward = torch.full((81,), 2), torch.randn(81, dtype=torch.double)
    logp, entropy = token_logp(model, images, cond, cfg_scale=cfg_scale, temperature=temperature)
    p = logp.sum(dim=1).exp()  # (81,)
    assert p.sum().item() == pytest.approx(1)
    # The chain rule of entropy: per-token entropies, averaged over images, sum to the image's.
    assert (p * entropy.sum(dim=1)).sum().item() == pytest.approx(-(p * p.log()).sum().item())
    true = torch.autograd.grad((p * reward).sum(), model.parameters(), retain_graph=True)
    weighted = [
        (weight * grpo_loss(row[None], row[None].detach(), None, r[None])[0])
        for weight, row, r in zip(p.detach(), logp, reward)
    ]
    got = torch.autograd.grad(sum(weighted), model.parameters())
    for a, b in zip(got, true):
        torch.testing.assert_close(a, -b / 4, rtol=1e-4, atol=1e-6)  # logits are float32


def test_guidance_by_hand():
    """softmax((null + 3 (cond - null)) / 2), gathered at the given tokens; and its entropy."""
    model, tokens, cond = tiny_model(), torch.randint(11, (2, 16)), torch.arange(2)
    c, u = model(tokens, cond), model(tokens, model.null_cond(cond))
    expected = ((u + 3 * (c - u)) / 2).log_softmax(-1)
    logp, entropy = token_logp(model, tokens, cond, cfg_scale=3.0, temperature=2.0)
    torch.testing.assert_close(logp, expected.gather(-1, tokens[..., None])[..., 0])
    torch.testing.assert_close(entropy, -(expected.exp() * expected).sum(-1))


def test_an_advantage_of_each_token():
    """Advantages (B, N) weigh each token by itself; one column for all is (B,)."""
    logp, old = torch.randn(2, 3), torch.randn(2, 3)
    A = torch.tensor([1.0, -2.0])
    same, _ = grpo_loss(logp, old, None, A[:, None].expand(2, 3))
    torch.testing.assert_close(same, grpo_loss(logp, old, None, A)[0])
    first_only = torch.tensor([[1.0, 0.0, 0.0], [0.0, 0.0, 0.0]])
    expected = -torch.minimum((logp - old).exp()[0, 0], torch.tensor(1.2)) / 6
    torch.testing.assert_close(grpo_loss(logp, old, None, first_only)[0], expected)


def test_the_entropy_can_be_trained():
    """token_logp's entropy has a gradient, unless it is told not to keep one."""
    model, tokens, cond = tiny_model(), torch.randint(11, (2, 16)), torch.arange(2)
    entropy = token_logp(model, tokens, cond)[1]
    assert any(
        g.abs().max() > 0 for g in torch.autograd.grad(entropy.mean(), model.layers.parameters())
    )
    assert not token_logp(model, tokens, cond, entropy_grad=False)[1].requires_grad
