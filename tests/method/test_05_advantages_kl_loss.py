"""GRPO as maths: advantages, KL, the clipped loss, and an exact check of the policy gradient.

argrpo.py, section 3.  One idea a test, with numbers worked out by hand.
"""

import math
from itertools import product

import pytest
import torch
from conftest import same, tiny_model

from argrpo import group_advantages, group_statistics, grpo_loss, kl_exact, kl_k3, token_logp

# --- advantages ------------------------------------------------------------------------------

TWO_GROUPS = torch.tensor([1.0, 2.0, 3.0, 0.0, 0.0, 6.0])


def test_a_better_image_has_a_positive_advantage():
    A = group_advantages(torch.tensor([0.0, 1.0, 1.0, 0.0]), 4)
    assert (A > 0).tolist() == [False, True, True, False], "more reward, more advantage"


def test_groups_do_not_see_each_other():
    a, b = torch.randn(8), torch.randn(8) * 100
    same(group_advantages(torch.cat([a, b]), 8)[:8], group_advantages(a, 8),
         "an image is compared with its own group: G neighbours, not every P-th image")


def test_advantages_by_hand():
    """Group (1, 2, 3): mean 2, unbiased std 1.  Group (0, 0, 6): mean 2, std sqrt(12)."""
    s, t = 1 + 1e-4, math.sqrt(12) + 1e-4
    same(group_advantages(TWO_GROUPS, 3), [-1 / s, 0.0, 1 / s, -2 / t, -2 / t, 4 / t],
         "A = (r - mean) / (std + 1e-4), with the unbiased std, G - 1 in its denominator",
         rtol=1e-5)


def test_advantages_without_scale_only_centre():
    """Dr. GRPO."""
    same(group_advantages(TWO_GROUPS, 3, scale=False), [-1.0, 0.0, 1.0, -2.0, -2.0, 4.0],
         "without scale A is r - mean")


def test_equal_rewards_give_exactly_zero():
    """The float32 mean of 0.1s is not 0.1: over an eps of 1e-4, that would be an advantage."""
    assert (group_advantages(torch.full((14,), 0.1), 7) == 0).all(), "a flat group teaches nothing"


def test_tiny_spreads_are_damped_by_eps():
    """Rewards that differ by 2e-6 have a std of 1.4e-6: advantages of a percent, not of one."""
    right = 1e-6 / (math.sqrt(2) * 1e-6 + 1e-4)
    same(group_advantages(torch.tensor([0.0, 2e-6]), 2), [-right, right], "eps is added to the std",
         atol=1e-6)


def test_the_eps_that_is_given_stands_beside_the_standard_deviation():
    """Of 0 and 2 the mean is 1 and the std, unbiased, the root of 2."""
    ours = group_advantages(torch.tensor([0.0, 2.0]), 2, eps=1.0)
    same(ours, torch.tensor([-1.0, 1.0]) / (2 ** 0.5 + 1), "(r - mean) / (std + eps)")


def test_the_scale_of_rewards_cancels_between_eps_and_overflow():
    """Only there: above 1e19 a square is more than float32 holds, and advantages are 0."""
    rewards, right = torch.tensor([0.0, 1.0, 1.0, 2.0]), None
    for scale in (1.0, 1e3, 1e15):
        A = group_advantages(rewards * scale, 4)
        right = A if right is None else right
        same(A, right, f"times {scale:g}, the same advantages", rtol=1e-3)
    assert group_advantages(rewards * 1e-6, 4).abs().max() < 0.02, "far below eps they vanish"
    assert (group_advantages(rewards * 1e30, 4) == 0).all(), "the standard deviation is infinite"


def test_a_missing_reward_is_left_out():
    """Of (1, missing, 3, 5) the known ones have mean 3 and standard deviation 2."""
    rewards = torch.tensor([1.0, math.nan, 3.0, 5.0])
    same(group_advantages(rewards, 4, eps=0.0), [-1.0, 0.0, 0.0, 1.0],
         "NaN counts neither in mean nor std, and its advantage is 0")
    one_or_none = torch.tensor([math.nan, math.nan, 7.0, math.nan] + [math.nan] * 4)
    assert group_advantages(one_or_none, 4).tolist() == [0.0] * 8, "one reward is no comparison"


def test_statistics_of_groups_with_missing_rewards():
    rewards = torch.tensor([1.0, math.nan, 3.0, 5.0, 2.0, 2.0, math.nan, 2.0])
    mean, std, flat = group_statistics(rewards, 4)
    assert mean.tolist() == [[3.0], [2.0]], "means of what is known"
    assert std.tolist() == [[2.0], [0.0]], "unbiased: one less than are known"
    assert flat.tolist() == [[False], [True]], "equal as far as known is flat"
    _, _, flat = group_statistics(torch.tensor([0.0, 1e-9, math.nan, math.nan]), 2)
    assert flat.tolist() == [[False], [True]], "flat is exactly equal, or nothing known"


@pytest.mark.parametrize("rewards, group_size",
                         [(torch.zeros(4), 1), (torch.zeros(5), 2), (torch.zeros(2, 2), 2)])
def test_advantages_need_whole_groups(rewards, group_size):
    with pytest.raises(ValueError, match="group_size"):
        group_advantages(rewards, group_size)


# --- KL --------------------------------------------------------------------------------------

def test_k3_by_hand():
    """pi = 0.5, pi_ref = 0.25: k3 = pi_ref / pi - log(pi_ref / pi) - 1 = 1/2 - log(1/2) - 1."""
    kl = kl_k3(torch.tensor(0.5).log(), torch.tensor(0.25).log())
    same(kl, 0.5 - math.log(0.5) - 1, "k3 is e^d - d - 1 with d = ref_logp - logp")


def test_k3_averages_to_the_exact_kl():
    """Over samples of pi, the first argument: KL(pi || pi_ref), not the other way round."""
    logits, ref_logits = torch.randn(4, 7), torch.randn(4, 7)
    logp, ref_logp = logits.log_softmax(-1), ref_logits.log_softmax(-1)
    k3 = kl_k3(logp, ref_logp)
    assert (k3 >= 0).all(), "k3 is never negative"
    same((logp.exp() * k3).sum(-1), kl_exact(logits, ref_logits), "E_pi[k3] = KL(pi || pi_ref)")
    same(kl_exact(logits, logits), torch.zeros(4), "the KL to oneself is 0")


def test_the_gradient_of_k3_is_that_of_the_other_direction():
    """Over samples of pi, with the samples held fixed as in a loss: its value estimates
    KL(pi || pi_ref), but its gradient is on average that of KL(pi_ref || pi)."""
    logits, ref_logits = torch.randn(7, requires_grad=True), torch.randn(7)
    logp, ref_logp = logits.log_softmax(-1), ref_logits.log_softmax(-1)
    expected = (logp.exp().detach() * kl_k3(logp, ref_logp)).sum()   # all 7 samples, as often as
    forward, backward = kl_exact(ref_logits, logits), kl_exact(logits, ref_logits)   # pi draws them
    ours, right, other = (torch.autograd.grad(x, logits, retain_graph=True)[0]
                          for x in (expected, forward, backward))
    same(ours, right, "E_pi[grad k3] = grad KL(pi_ref || pi)")
    assert not torch.allclose(ours, other, atol=0.01), "and not grad KL(pi || pi_ref)"


def test_the_exact_kl_by_brute_force():
    """Value and gradient against a loop over the vocabulary."""
    logits, ref_logits = torch.randn(3, 5, requires_grad=True), torch.randn(3, 5)
    p, q = logits.softmax(-1), ref_logits.softmax(-1)
    brute = torch.stack([sum(p[i, v] * (p[i, v] / q[i, v]).log() for v in range(5))
                         for i in range(3)])
    kl = kl_exact(logits, ref_logits)
    same(kl, brute, "sum of p log(p / q)")
    ours, right = (torch.autograd.grad(x.sum(), logits)[0] for x in (kl, brute))
    same(ours, right, "the exact KL's gradient")


def test_the_kl_penalty_pulls_back_to_the_reference():
    """The gradient of e^d - d - 1 by logp is 1 - e^d: uphill where pi is likelier than pi_ref."""
    logp = torch.tensor([[-1.0, -3.0]], requires_grad=True)
    ref_logp = torch.tensor([[-2.0, -2.0]])
    loss, _ = grpo_loss(logp, logp.detach(), ref_logp, torch.tensor([0.0]), kl_beta=2.0)
    loss.backward()
    right = 2.0 / 2 * (1 - (ref_logp - logp.detach()).exp())
    same(logp.grad, right, "beta times the mean KL: down with what pi overrates, up with the rest")


# --- the loss --------------------------------------------------------------------------------

def one_token(ratio, A, **settings):
    """Loss, stats and gradient of a single token with the given ratio and advantage."""
    logp = torch.tensor([[math.log(ratio)]], requires_grad=True)
    loss, stats = grpo_loss(logp, torch.zeros(1, 1), torch.zeros(1, 1), torch.tensor([A]),
                            **settings)
    loss.backward()
    return loss.item(), stats, logp.grad.item()


@pytest.mark.parametrize("ratio, A, loss, gradient, idea", [
    (1.0, 2.0, -2.0, -2.0, "at ratio 1 the loss is -A, its gradient -A grad log pi"),
    (1.1, 2.0, -2.2, -2.2, "inside the clip range the loss is -ratio A"),
    (1.5, 2.0, -2.4, 0.0, "good, and already 20% likelier: no more gain"),
    (0.5, 2.0, -1.0, -1.0, "good, but less likely than before: never clipped"),
    (0.5, -2.0, 1.6, 0.0, "bad, and already 20% less likely: no more gain"),
    (1.5, -2.0, 3.0, 3.0, "bad, but likelier than before: never clipped")])
def test_clip_on_both_sides(ratio, A, loss, gradient, idea):
    value, stats, slope = one_token(ratio, A, clip_eps=0.2)
    assert value == pytest.approx(loss), f"{idea}: loss"
    assert slope == pytest.approx(gradient), f"{idea}: gradient"
    assert stats["clip_frac"] == (gradient == 0), "clip_frac counts the tokens that get no gradient"
    assert stats["ratio"] == stats["ratio_max"] == pytest.approx(ratio), "ratio is pi / pi_old"


def test_clip_higher():
    """clip_eps_high is for the upper side alone (DAPO)."""
    higher = dict(clip_eps=0.2, clip_eps_high=0.28)
    assert one_token(1.25, 1.0, **higher)[2] == pytest.approx(-1.25), "1.25 is within 1 + 0.28"
    assert one_token(1.35, 1.0, **higher)[2] == 0, "1.35 is not"
    assert one_token(0.75, -1.0, **higher)[2] == 0, "the lower side is still 1 - 0.2"
    assert one_token(1.05, 1.0, clip_eps=0.2, clip_eps_high=0.0)[2] == 0, "0 is a value, not 'none'"


def test_the_loss_is_a_mean_over_images_and_tokens():
    """So it does not grow with the number of tokens or images."""
    logp, A = torch.zeros(2, 3), torch.tensor([1.0, -3.0])
    loss, _ = grpo_loss(logp, logp, None, A)
    assert loss.item() == pytest.approx(1.0), "the mean: -(1 - 3) / 2"


def test_kl_is_added_with_its_weight():
    logp, ref_logp = torch.full((2, 3), -1.0), torch.full((2, 3), -1.5)
    loss, stats = grpo_loss(logp, logp, ref_logp, torch.tensor([1.0, -1.0]), kl_beta=0.3)
    kl = math.exp(-0.5) + 0.5 - 1
    assert stats["kl"] == pytest.approx(kl), "the statistic is the KL itself, without its weight"
    assert loss.item() == pytest.approx(0.3 * kl), "the loss gets kl_beta times the KL"
    assert stats["loss"] == pytest.approx(loss.item()), "the logged loss has the penalty in it"
    assert all(isinstance(value, float) for value in stats.values()), (
        "statistics are floats, without a graph")


def test_without_reference_there_is_no_kl():
    logp = torch.zeros(2, 3)
    loss, stats = grpo_loss(logp, logp, None, torch.tensor([1.0, 1.0]))
    assert loss == -1 and "kl" not in stats, (
        "without a reference the loss is -A, and there is no KL")
    with pytest.raises(ValueError, match="kl_beta"):
        grpo_loss(logp, logp, None, torch.tensor([1.0, 1.0]), kl_beta=0.1)


def test_an_advantage_of_each_token():
    """Advantages (B, N) weigh each token by itself; one column for all is (B,)."""
    logp, old = torch.randn(2, 3), torch.randn(2, 3)
    A = torch.tensor([1.0, -2.0])
    each, _ = grpo_loss(logp, old, None, A[:, None].expand(2, 3))
    same(each, grpo_loss(logp, old, None, A)[0], "an image's advantage is that of all its tokens")
    first_only = torch.tensor([[1.0, 0.0, 0.0], [0.0, 0.0, 0.0]])
    right = -torch.minimum((logp - old).exp()[0, 0], torch.tensor(1.2)) / 6
    same(grpo_loss(logp, old, None, first_only)[0], right, "a token's own advantage")


def test_on_policy_gradient_is_minus_A_grad_log_p():
    model, tokens, cond = tiny_model(), torch.randint(11, (4, 16)), torch.arange(4)
    A = torch.tensor([1.0, -0.5, 0.3, -0.8])
    logp, _ = token_logp(model, tokens, cond, cfg_scale=2.0)
    loss, stats = grpo_loss(logp, logp.detach(), None, A)
    ours = torch.autograd.grad(loss, model.parameters(), retain_graph=True)
    right = torch.autograd.grad(-(A[:, None] * logp).mean(), model.parameters())
    assert stats["ratio"] == stats["ratio_max"] == 1 and stats["clip_frac"] == 0, (
        "before an update the policy is the old one")
    for a, b in zip(ours, right):
        same(a, b, "where the ratio is 1, the gradient is that of -A log pi: REINFORCE")


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
    assert p.sum().item() == pytest.approx(1), "the probabilities of all images add up to one"
    # The chain rule of entropy: per-token entropies, averaged over images, sum to the image's.
    whole = -(p * p.log()).sum().item()
    assert (p * entropy.sum(dim=1)).sum().item() == pytest.approx(whole), "the entropy's chain rule"
    true = torch.autograd.grad((p * reward).sum(), model.parameters(), retain_graph=True)
    weighted = [weight * grpo_loss(row[None], row[None].detach(), None, r[None])[0]
                for weight, row, r in zip(p.detach(), logp, reward)]
    ours = torch.autograd.grad(sum(weighted), model.parameters())
    for a, b in zip(ours, true):                 # logits are float32
        same(a, -b / 4, "the loss goes downhill where the expected reward goes uphill", atol=1e-6)
