"""Part 2, the maths: log-probabilities and entropy, advantages, k3, the clipped loss."""

from math import nan

import torch

from checks import CAPTIONS, check, conditions, raises, transformer, with_gradients

# --- 2.1: log-probabilities and entropy -------------------------------------------------------


def scored(m, d, cfg_scale=1.0, temperature=1.0, **changes):
    """token_logp of drawn images, each with a condition of its own: logp and entropy."""
    model, B = transformer(m, d, **changes), d.size(1, 3)
    tokens, (cond, mask) = d.codes(5, B, 4), conditions(d, model, B)
    return m.token_logp(model, tokens, cond, mask, cfg_scale=cfg_scale, temperature=temperature)


@check("2.1", "log-probability of each given code, and entropy of each choice, in nats: (B, N)")
def _(m, d):
    return scored(m, d)


@check("2.1", "the logits are guided as they are in `generate`")
def _(m, d):
    return scored(m, d, cfg_scale=d.number(1.5, 4))


@check("2.1", "the guided logits are divided by the temperature")
def _(m, d):
    return scored(m, d, cfg_scale=2.0, temperature=d.number(0.3, 0.8))


@check("2.1", "captions keep their masks, in both branches")
def _(m, d):
    return scored(m, d, cfg_scale=d.number(1.5, 3), **CAPTIONS)


@check("2.1", "logp and entropy have gradients, which reach both branches")
def _(m, d):
    model, B = transformer(m, d), d.size(1, 3)
    weights = model.cls_embedding.embedding_table.weight, model.output.weight
    how = dict(cfg_scale=d.number(1.5, 3))
    return [torch.autograd.grad(x.square().mean(), weights, retain_graph=True)
            for x in m.token_logp(model, d.codes(5, B, 4), d.codes(3, B), **how)]


@check("2.1", "very large logits give no NaN")
def _(m, d):
    model, B = transformer(m, d), d.size(1, 3)
    model.output.weight.data *= 1000
    logp, entropy = m.token_logp(model, d.codes(5, B, 4), d.codes(3, B))
    return logp, entropy.isfinite().all()


@check("2.1", "a temperature of 0 and a scale of NaN are refused with a ValueError")
def _(m, d):
    model, tokens, cond = transformer(m, d), d.codes(5, 1, 4), d.codes(3, 1)
    return [raises(m.token_logp, model, tokens, cond, **how)
            for how in (dict(temperature=0.0), dict(cfg_scale=nan))]


# --- 2.2 and 2.3: statistics and advantages ---------------------------------------------------


def groups(d):
    """Rewards of P groups, and G.  Groups differ much in mean and scale."""
    P, G = d.size(2, 4), d.size(2, 6)
    return (d.normal(P, G) * (0.2 + torch.arange(P)[:, None]) + 4 * d.normal(P, 1)).flatten(), G


def with_missing(d):
    """The same with missing rewards, and a group that has one known reward, and one with none."""
    rewards, G = groups(d)
    rewards = torch.cat([rewards, d.normal(2 * G)])
    rewards[d.codes(G, 1) + G] = nan
    rewards[-2 * G + 1:] = nan
    return rewards, G


@check("2.2", "mean and unbiased standard deviation of each group: (P, 1)")
def _(m, d):
    return m.group_statistics(*groups(d))[:2]


@check("2.2", "missing rewards, NaN, are left out of mean and standard deviation")
def _(m, d):
    rewards, G = with_missing(d)
    mean, std, _ = m.group_statistics(rewards, G)
    known = rewards.view(-1, G).isnan().logical_not().sum(1)
    return mean[known > 0], std[known > 1]       # of others nothing is asked


@check("2.2", "a group is flat if its known rewards are equal, or fewer than two")
def _(m, d):
    rewards, G = with_missing(d)
    equal = torch.full((2 * G,), 0.1)
    equal[-1] = nan
    return m.group_statistics(torch.cat([rewards, equal]), G)[2]


@check("2.2", "almost equal is not flat")
def _(m, d):
    rewards = 1.0 + torch.tensor([0.0, 2e-6]).repeat(d.size(1, 3))
    return m.group_statistics(rewards, 2)[2]


@check("2.2", "groups of one, parts of groups and matrices are refused with a ValueError")
def _(m, d):
    f = m.group_statistics
    return [raises(f, torch.zeros(4), 1), raises(f, torch.zeros(5), 2), raises(f, torch.eye(2), 2)]


@check("2.3", "step 4: how much better an image did than its own group, relative to the spread")
def _(m, d):
    return m.group_advantages(*groups(d))


@check("2.3", "scale=False leaves the division by the spread out, and nothing else")
def _(m, d):
    return m.group_advantages(*groups(d), scale=False)


@check("2.3", "tiny spreads, and eps, count as the docstring says")
def _(m, d):
    rewards, G = groups(d)
    return m.group_advantages(rewards * 1e-4, G), m.group_advantages(rewards, G, eps=0.5)


@check("2.3", "a flat group gets exactly zero")
def _(m, d):
    G = d.size(3, 9)
    advantages = m.group_advantages(torch.full((2 * G,), d.number(0.1, 0.9)), G, eps=1e-9)
    return (advantages == 0).all(), str(list(advantages.shape))


@check("2.3", "a missing reward gets zero, and the others of its group do without it")
def _(m, d):
    return m.group_advantages(*with_missing(d))


# --- 2.4: k3 ----------------------------------------------------------------------------------


def two_logps(d):
    return -d.normal(d.size(1, 3), d.size(1, 4)).abs(), -d.normal(d.size(1, 3), 1).abs()[:1]


@check("2.4", "where policy and reference agree it is zero, and so is its gradient")
def _(m, d):
    logp, _ = two_logps(d)
    return with_gradients(lambda x: m.kl_k3(x, logp), logp.clone())


@check("2.4", "where the policy is likelier than the reference it is positive")
def _(m, d):
    logp, gap = two_logps(d)
    return m.kl_k3(logp, logp + gap)


@check("2.4", "where the policy is less likely it is positive, too")
def _(m, d):
    logp, gap = two_logps(d)
    return m.kl_k3(logp, logp - gap)


@check("2.4", "its mean over the policy's samples estimates KL(pi || pi_ref); it is never negative")
def _(m, d):
    logp, ref_logp = (d.normal(d.size(2, 6)).log_softmax(-1) for _ in range(2))
    n = min(len(logp), len(ref_logp))
    logp, ref_logp = logp[:n].log_softmax(-1), ref_logp[:n].log_softmax(-1)
    return (logp.exp() * m.kl_k3(logp, ref_logp)).sum(), (m.kl_k3(logp, ref_logp) >= 0).all()


@check("2.4", "its gradient pulls the policy back to the reference")
def _(m, d):
    logp, gap = two_logps(d)
    return with_gradients(lambda x: m.kl_k3(x, logp + gap), logp.clone())


# --- 2.5: the loss ----------------------------------------------------------------------------


def loss_inputs(d):
    """logp, old_logp, ref_logp (B, N) and advantages (B,): ratios from 0.3 to 3."""
    B, N = d.size(2, 6), d.size(2, 6)
    logp = -d.normal(B, N).abs()
    return logp, logp + 0.5 * d.normal(B, N), logp + 0.5 * d.normal(B, N), d.normal(B)


def loss_and_gradient(m, d, **settings):
    logp, old_logp, ref_logp, advantages = loss_inputs(d)
    return with_gradients(lambda x: m.grpo_loss(x, old_logp, ref_logp, advantages, **settings)[0],
                          logp)


@check("2.5", "the gradient where pi is pi_old: that of -A log pi, averaged over tokens")
def _(m, d):
    logp, _, _, advantages = loss_inputs(d)
    return with_gradients(lambda x: m.grpo_loss(x, x.detach(), None, advantages)[0], logp)


@check("2.5", "the clip stops what goes too far the right way, and never what went the wrong way")
def _(m, d):
    return loss_and_gradient(m, d)


@check("2.5", "clip_eps sets the range, and clip_eps_high its upper side alone")
def _(m, d):
    return (loss_and_gradient(m, d, clip_eps=d.number(0.3, 0.5)),
            loss_and_gradient(m, d, clip_eps=0.1, clip_eps_high=d.number(0.4, 0.6)))


@check("2.5", "the KL penalty is added with the weight kl_beta")
def _(m, d):
    logp, old_logp, ref_logp, _ = loss_inputs(d)
    zero, how = torch.zeros(len(logp)), dict(kl_beta=d.number(0.1, 2))
    return with_gradients(lambda x: m.grpo_loss(x, old_logp, ref_logp, zero, **how)[0], logp)


@check("2.5", "advantages may be (B, N), one for each token")
def _(m, d):
    logp = loss_inputs(d)[0]
    advantages = d.normal(*logp.shape)
    return with_gradients(lambda x: m.grpo_loss(x, x.detach(), None, advantages)[0], logp)


@check("2.5", "the stats: ratio, ratio_max, clip_frac, kl and loss, as floats")
def _(m, d):
    _, stats = m.grpo_loss(*loss_inputs(d), kl_beta=0.5, clip_eps=0.3)
    names = ("ratio", "ratio_max", "clip_frac", "kl", "loss")
    return [stats.get(k, f"no {k}") for k in names], [type(stats.get(k)).__name__ for k in names]


@check("2.5", "ref_logp may be None without a penalty; with one, that is a ValueError")
def _(m, d):
    logp, old_logp, _, advantages = loss_inputs(d)
    loss, stats = m.grpo_loss(logp, old_logp, None, advantages)
    return loss, "kl" in stats, raises(m.grpo_loss, logp, old_logp, None, advantages, kl_beta=0.1)
