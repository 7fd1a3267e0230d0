# %% [markdown]
# # Lab 3: why groups, and why divide by the spread?
#
# A policy gradient is an average over drawn pictures, so it is noisy, and most of what a training
# run pays for is the averaging of that noise.  GRPO compares each picture with its own group of G,
#
#     A_i = (r_i - mean) / std,
#
# where Dr. GRPO (arXiv 2503.20783) leaves the division out, and leave-one-out (RLOO,
# arXiv 2402.14740) takes the mean of the *other* G - 1 pictures, with no division either.  What is
# G good for, and what does the division do?
#
# **You need**: section 3 of `argrpo.py`.  **Time**: three minutes.
#
#     python labs/lab3_variance.py

# %%
from math import comb

import lab
import torch
from lab import OTHERS, Tiny, plt

import argrpo
import toy

experiment = lab.Experiment("lab3_variance")
quick = experiment.quick                         # quick(small, full) is a size

# %% [markdown]
# ## 1. Exactly: how many pictures until the signal is as large as the noise?
#
# Take a prompt that the policy gets right with probability p, and a reward of 0 or 1.  In a group
# of G, k are right with probability Binomial(k; G, p), all right ones have one advantage and all
# wrong ones another.  Given k, the right pictures are independent draws of pi( . | right).  So mean
# and variance of the group's gradient are sums over k, with no sampling at all.  `Tiny` gives
# mean and variance of grad log pi(x) among its right and its wrong sequences.
#
# A batch of B pictures has B / G groups.  Their average has signal |E|^2 and noise G Var / B,
# with E and Var the expectation and the variance of one group's gradient.  They are equal at
#
#     B = G Var / |E|^2 pictures.
#
# The fewer, the better.  All of them are of one prompt.  A B below G is no batch that one could
# draw; only ratios of such numbers matter.  And they know nothing of the step size: an estimate and
# its double are equally good.

# %%
GROUPS = [2, 4, 8, 16, 32, 64]
RATES = [0.02, 0.1, 0.3, 0.5, 0.7, 0.9, 0.98]


def leave_one_out(rewards, group_size):
    return argrpo.group_advantages(rewards, group_size, scale=False) * group_size / (group_size - 1)


ADVANTAGES = {
    "GRPO": argrpo.group_advantages,
    "Dr. GRPO": lambda rewards, G: argrpo.group_advantages(rewards, G, scale=False),
    "leave-one-out": leave_one_out,
}


def of_a_group(p, G, advantage_of, mean_right, var_right, var_wrong):
    """Of one group's gradient: (its expectation as a multiple of grad p, B above).

    mean_right is E[grad log pi | right], which is grad p / p.  Since grad log pi is 0 on average
    over all sequences, the wrong ones have the mean -p / (1 - p) times that."""
    mean_wrong = -p / (1 - p) * mean_right
    first, second, noise = 0.0, 0.0, 0.0         # E, E |mean given k|^2, E [variance given k]
    for k in range(G + 1):
        chance = comb(G, k) * p ** k * (1 - p) ** (G - k)
        rewards = torch.tensor([1.0] * k + [0.0] * (G - k))
        A = advantage_of(rewards, G).double()
        right, wrong = A[:k], A[k:]
        mean = (right.sum() * mean_right + wrong.sum() * mean_wrong) / G
        first = first + chance * mean
        second = second + chance * mean.square().sum()
        noise = noise + chance * (right.square().sum() * var_right
                                  + wrong.square().sum() * var_wrong) / G ** 2
    signal = first.square().sum()
    gradient = p * mean_right                                        # of p, the expected reward
    multiple = (first @ gradient / gradient.square().sum()).item()
    return multiple, (G * (second - signal + noise) / signal).item()


def with_rate(prob, p):
    """Which sequences to call right, so that about p of the draws are: (the rate, a mask)."""
    order = torch.randperm(81, generator=torch.Generator().manual_seed(0)).tolist()
    right, rate = torch.zeros(81, dtype=torch.bool), 0.0
    for k in order:
        if rate + prob[k] <= p + 0.002:          # what would overshoot is left out
            right[k], rate = True, rate + prob[k].item()
    return rate, right


def exact(seed):
    """{advantage: {"G": [(rate, multiple, pictures), ...] over RATES}} of one Tiny."""
    tiny = Tiny(seed)
    prob, rows = tiny.scores()
    found = {name: {str(G): [] for G in GROUPS} for name in ADVANTAGES}
    for p in RATES:
        rate, right = with_rate(prob, p)
        moments = []
        for mask in (right, ~right):
            q = (prob * mask / prob[mask].sum())[:, None]            # pi( . | right), or wrong
            mean = (q * rows).sum(0)
            moments.append((mean, (q * (rows - mean).square()).sum()))
        (mean_right, var_right), (_, var_wrong) = moments
        for name, advantage_of in ADVANTAGES.items():
            for G in GROUPS:
                found[name][str(G)].append((rate, *of_a_group(rate, G, advantage_of, mean_right,
                                                         var_right, var_wrong)))
    return found


tinies = experiment.over_seeds(exact, range(quick(2, 10)))


def median(name, G, k, column):
    """Over the Tiny models, at RATES[k]: column 1 is the multiple, column 2 the pictures."""
    return torch.tensor([found[name][str(G)][k][column] for found in tinies]).median().item()


# %% [markdown]
# **Question 1.**  Leave-one-out and Dr. GRPO need exactly the same number of pictures.  Why?
#
# **Question 2.**  For one prompt and a reward of 0 or 1, GRPO's expected update is a positive
# multiple of the true gradient, whatever G is: the second panel shows the multiple.  So what has
# the division by the spread changed, if not the direction?  And why does it change nothing at all
# but the scale at G = 2?
#
# **Question 3.**  By what factor does G = 64 beat G = 2 at each p, and which share of the pictures
# that it saves does G = 8 save already?  A group that is all right or all wrong teaches nothing:
# why does that not make small groups hopeless?

# %% [markdown]
# ## 2. On the toy, at equal numbers of pictures
#
# The toy has 27 classes.  Every step has 128 pictures: 64 prompts of 2 (each class two or three
# times), 16 of 8 (more than half of the classes), or 4 of 32 (each class every seventh step).  So
# small groups bring what part 1 does not count, more prompts in a step.  There is no KL penalty,
# and one learning rate for all, tuned for none.  AdamW divides the gradient by its own size, so
# that leave-one-out would be Dr. GRPO here but for the clipping of long gradients; we train with
# GRPO and with Dr. GRPO.

# %%
STEPS, PICTURES = quick(2, 30), quick(32, 128)
TOY_GROUPS = quick([2, 8], [2, 8, 32])


def train_toy(seed):
    """{"advantage G": {"reward": of each step, "right": share at the end}}."""
    found = {}
    for scale in (True, False):
        for G in TOY_GROUPS:
            model, _ = toy.load("c2i")
            config = argrpo.GRPOConfig(steps=STEPS, prompts_per_step=PICTURES // G, group_size=G,
                                       lr=1.6e-3, seed=seed, kl_beta=0.0,
                                       scale_advantages=scale)
            rewards = [step.metrics["reward"] for step in lab.train(model, config)]
            right = lab.draw(model, quick(4, 20)).right.mean().item()
            found[f"{'GRPO' if scale else 'Dr. GRPO'}, G = {G}"] = {"reward": rewards,
                                                                    "right": right}
    return found


trained = experiment.over_seeds(train_toy)

# %% [markdown]
# **Question 4.**  Which group size learns most from equal numbers of pictures?  What do the others
# lack?  In pairs, GRPO and Dr. GRPO are the same but for a constant: what does the distance between
# their two curves tell you about the other distances?

# %%
fig, (left, middle, right) = plt.subplots(1, 3, figsize=(11, 3.6), layout="constrained")
rates = [sum(found["GRPO"]["2"][k][0] for found in tinies) / len(tinies) for k in range(len(RATES))]
for color, G in zip(OTHERS, (2, 8, 64)):
    for name, style in (("GRPO", "-"), ("Dr. GRPO", ":")):
        left.plot(rates, [median(name, G, k, 2) for k in range(len(RATES))], style, color=color,
                  label=f"{name}, G = {G}")
        multiples = torch.tensor([median(name, G, k, 1) for k in range(len(RATES))])
        middle.plot(rates, multiples / multiples[RATES.index(0.5)], style, color=color)
left.set(xlabel="p, how often the policy is right", ylabel="pictures until signal = noise",
         yscale="log", title=f"{len(tinies)} enumerated models, each exact: median")
left.legend(fontsize=7)
middle.set(xlabel="p", ylabel="weight of a prompt, 1 at p = 0.5", ylim=(0, None),
           title="how much a prompt counts")
for k, G in enumerate(TOY_GROUPS):
    for name, style in (("GRPO", "-"), ("Dr. GRPO", ":")):
        curves = [found[f"{name}, G = {G}"]["reward"] for found in trained]
        smooth = torch.tensor(curves).unfold(1, min(5, STEPS), 1).mean(-1)
        lab.plot_band(right, range(smooth.shape[1]), smooth.tolist(), color=OTHERS[[0, 1, 3][k]],
                      linestyle=style, label=f"{name}, G = {G}")
right.set(xlabel="steps", ylabel="reward, mean of five steps",
          title=f"the toy, {PICTURES} pictures a step")
right.legend(fontsize=7)

heads = []
for k, p in enumerate(rates):                    # 81 sequences cannot have every rate
    own = [found["GRPO"]["2"][k][0] for found in tinies]
    heads.append(f"p = {p:.2f} ({min(own):.2f} .. {max(own):.2f})")
rows = [["", "G", *heads]]
for name in ADVANTAGES:
    two, eight, many = (torch.tensor([[found[name][str(G)][k][2] for k in range(len(RATES))]
                                      for found in tinies]) for G in (2, 8, 64))
    for what, G, values, digits in (                                # values (tinies, RATES)
            ("pictures, median (range)", 2, two, 0), ("pictures, median (range)", 8, eight, 0),
            ("pictures, median (range)", 64, many, 0),
            ("G = 2 over G = 64, a model's own", "", two / many, 2),
            ("share that G = 8 saves of it", "", (two - eight) / (two - many), 2)):
        cells = [f"{column.median():.{digits}f} ({column.min():.{digits}f} .. "
                 f"{column.max():.{digits}f})" for column in values.T]
        rows.append([f"{name}: {what}", G, *cells])
rows.append(["on the toy", "", *["right at the end"], *[""] * (len(RATES) - 1)])
for name in trained[0]:
    advantage, G = name.split(", G = ")
    rows.append([advantage, G, lab.across([found[name]["right"] for found in trained]),
                 *[""] * (len(RATES) - 1)])
experiment.finish(
    fig, rows, f"{len(tinies)} enumerated models; toy c2i: {STEPS} steps of {PICTURES} pictures, "
               "lr 1.6e-3, no KL penalty")

# %% [markdown]
# <details><summary>Answers</summary>
#
# 1. Leave-one-out takes the mean of the others: r_i - mean_others = (r_i - mean) G / (G - 1). It
#    is Dr. GRPO times a number, and signal and noise both grow by that number's square.
# 2. It has changed how much a prompt counts: with G = 64 a prompt that is right 2% or 97% of the
#    time gets about three times the weight of one that is right half the time, near the 1 / sqrt(p
#    (1 - p)) of an infinite group. That is nothing for one prompt, and a choice of what to care
#    about for many. (The noise changes, too: groups with few mistakes weigh more.) In pairs, a
#    mixed group always has the rewards 0 and 1, so that its spread is always the same number, and
#    dividing by it is a change of scale.
# 3. In the median model by 1.4 at p = 0.02 and by two at p = 0.5. At p = 0.65, 0.86 and 0.97 it is
#    2.9, 3.5 and 2.4 with GRPO, and 2.8, 2.4 and 1.6 with Dr. GRPO; one model can be far from that
#    (1.4 to 8.9 at p = 0.97). Of the pictures that G = 64 saves, G = 8 saves 87% with Dr. GRPO, at
#    every p and in every model, and, in the median, 71% to 89% with GRPO. A group without a
#    difference brings no signal, but no noise either; the mixed ones stand for more. A right
#    picture among hardly any finds its wrong partner in a pair as well as in a large group. What a
#    small group lacks is a precise baseline: if right and wrong pictures are equally noisy, that
#    costs G / (G - 1), two in pairs.
# 4. The middle way: 80% right with 16 groups of 8, 71% with 64 pairs, 73% with four groups of 32
#    (means of six runs, GRPO's and Dr. GRPO's; the worst run of G = 8 has 76%, the best of the
#    others 78 and 77%). Pairs lack the baseline; four prompts a step are few of 27, and the curve's
#    fall in the first steps suggests, no more, that what helps these four spoils the others. In
#    pairs GRPO and Dr. GRPO, with one seed, end 10, 7 and 11 points apart, now one ahead and now
#    the other, by chance alone (clipping and rounding set them on different ways). That is the
#    noise of a single run, and it is as large as what group sizes differ by. With G = 8 and 32 they
#    are 0 to 11 points apart: about the division the toy says nothing.
#
# </details>
