# %% [markdown]
# # Lab 5: what does reward cost?
#
# Reinforcement learning makes pictures right and alike.  How alike do they have to become?
# Let pi_ref be the pretrained model, and p the probability that its picture of a prompt is right.
# Among all policies that are always right, pi_ref( . | right) is nearest to pi_ref.  It is
#
#     KL( pi_ref( . | right) || pi_ref ) = log(1/p)
#
# nats away: write it down, it is one line.  With p = 0.55 that is 0.6 nats *a picture*, of
# 36 tokens.  And it is exactly as varied as the right pictures of pi_ref.  So perfect reward at
# no cost in diversity exists, and it is near.  To be right with a probability q < 1 costs less:
#
#     q log(q/p) + (1 - q) log((1 - q)/(1 - p)).
#
# This lab looks at where the recipes end up.
#
# **You need**: `diversity.py`, and checkpoints:
# `python labs/prepare.py --only paper,diverse,kl,entropy,negatives`.
# **Time**: a minute. The checkpoints take a quarter of an hour, and the diverse one some 20
# minutes of a core more.
#
#     python labs/lab5_diversity.py

# %%
import math

import lab
from lab import COLOURS, OTHERS, plt
from prepare import prepared, require

import argrpo
import toy

experiment = lab.Experiment("lab5_diversity")
quick = experiment.quick                         # quick(small, full) is a size
require(experiment, "paper", "diverse", "kl", "entropy", "negatives")

# %% [markdown]
# ## 1. The recipes
#
# | recipe | what it is |
# |---|---|
# | paper | GRPO with the KL penalty of weight 0.01, 75 steps of 16 x 8 pictures |
# | KL 0.1 | the same with ten times as much of it |
# | entropy | the paper's, and 0.03 times the entropy of each choice as a bonus, through `loss_fn` |
# | negatives | the advantage is -1 for a wrong picture and 0 for a right one (arXiv 2506.01347) |
# | diverse | rehearsal and a bonus (`diversity.py`), which takes longer |
#
# And two rows that papers leave out, for they need no training:
#
# | | |
# |---|---|
# | rejection | draw from pi_ref until the verifier is content: 1/p draws |
# | temperature | draw from pi_ref with a lower temperature |
#
# For each: the share of right pictures; D, the spread of the right pictures as a share of
# pi_ref's; and the KL to pi_ref, as the mean of log pi(x) - log pi_ref(x) over drawn pictures.
#
# **Question 1.**  Before you look: which of these will keep the most diversity?

# %%
SAMPLES = quick(6, 32)
RECIPES = {                                      # name: (checkpoint, colour)
    "paper": ("paper", COLOURS["paper"]),
    "KL 0.1": ("kl", OTHERS[2]),
    "entropy": ("entropy", OTHERS[1]),
    "negatives": ("negatives", OTHERS[3]),
    "diverse": ("diverse", COLOURS["diverse"]),
}
RECIPES = {name: RECIPES[name] for name in quick(("paper", "negatives"), RECIPES)}
TEMPERATURES = quick([0.7], [0.9, 0.8, 0.7, 0.6, 0.5])


def kl_paid(drawn):
    """Mean of log pi(x) - log pi_ref(x) over the pictures drawn from pi, in nats a picture."""
    reference, _ = toy.load("c2i")
    cond = lab.prompts_of("c2i", drawn.texts).cond
    total = 0.0
    for rows in range(0, len(cond), 128):
        some = slice(rows, rows + 128)
        ref_logp, _ = argrpo.token_logp(reference, drawn.tokens[some], cond[some])
        total += (drawn.logp[some] - ref_logp.detach()).sum().item()
    return total / len(cond)


def row(drawn, base, draws=1.0):
    """What the table says of one way of drawing."""
    q, p = (min(some.right.mean().item(), 0.9999) for some in (drawn, base))
    needed = q * math.log(q / p) + (1 - q) * math.log((1 - q) / (1 - p)) if q > p else 0.0
    return {"right": q, "D": lab.diversity(drawn, base), "KL": kl_paid(drawn), "needed": needed,
            "draws": draws}


def compare(seed):
    """{recipe: {"right", "D", "KL" paid, KL "needed" for that share, "draws" for a picture}}."""
    base_model, _ = toy.load("c2i")
    base = lab.draw(base_model, 2 * SAMPLES, seed=1000 + seed)       # what D compares with
    p = [max(base.right[k:k + 2 * SAMPLES].mean().item(), 1 / (2 * SAMPLES))
         for k in range(0, len(base.right), 2 * SAMPLES)]            # of each class
    needed = sum(math.log(1 / rate) for rate in p) / len(p)          # above log(1 / mean of p)
    found = {"base": row(lab.draw(base_model, SAMPLES, seed=seed), base)}
    found["rejection"] = {"right": 1.0, "D": 1.0, "KL": needed, "needed": needed,    # by definition
                          "draws": sum(1 / rate for rate in p) / len(p)}
    for temperature in TEMPERATURES:
        drawn = lab.draw(base_model, SAMPLES, seed=seed, temperature=temperature)
        found[f"temperature {temperature}"] = row(drawn, base)
    for name, (checkpoint, _) in RECIPES.items():
        model, _ = toy.load("c2i", gpt_path=prepared(experiment, checkpoint, seed))
        found[name] = row(lab.draw(model, SAMPLES, seed=seed), base)
    return found


compared = experiment.over_seeds(compare)

# %% [markdown]
# **Question 2.**  Which recipes pay more KL than is needed for their share of right pictures, and
# what do they buy with it?
#
# **Question 3.**  Entropy bonus and temperature act on every token.  Which tokens of a picture
# should be certain, and which not?  What follows for a bonus that does not know the difference?
#
# **Question 4.**  Rejection sampling is right, as varied as pi_ref and needs no training.  When
# is it no alternative?  (Think of p, of the verifier, and of what a user pays for.)
#
# **Question 5.**  With one update per rollout, "negatives" has the same *expected* gradient as the
# plain reward without any baseline.  Show it in one line.  So what can make its result different?

# %%
fig, (left, right) = plt.subplots(1, 2, figsize=(10, 4), layout="constrained")
styles = {"base": (COLOURS["base"], "s"), "rejection": ("#000000", "*")}
styles |= {name: (colour, "o") for name, (_, colour) in RECIPES.items()}
for name, (colour, marker) in styles.items():
    for k, found in enumerate(compared):
        each = found[name]
        label = name if k == 0 else None
        if each["D"] is not None:
            left.plot(each["right"], each["D"], marker, color=colour, label=label)
        right.plot(each["KL"], each["right"], marker, color=colour, label=label)
for found in compared:
    path = [found[name] for name in found if name == "base" or name.startswith("temperature")]
    known = [each for each in path if each["D"] is not None]
    left.plot([each["right"] for each in known], [each["D"] for each in known], "-",
              color=COLOURS["base"], linewidth=1)
    right.plot([each["KL"] for each in path], [each["right"] for each in path], "-",
               color=COLOURS["base"], linewidth=1)
left.set(xlabel="share of right pictures (grey line: lower temperatures)",
         ylabel="D, diversity kept among right pictures", ylim=(0, 1.1))
left.legend(fontsize=7)
p = compared[0]["base"]["right"]
q = [p + (0.9999 - p) * k / 200 for k in range(1, 201)]
right.plot([x * math.log(x / p) + (1 - x) * math.log((1 - x) / (1 - p)) for x in q], q, ":",
           color="#000000", linewidth=1)
right.set(xlabel="KL paid, nats a picture (dotted: what is needed)",
          ylabel="share of right pictures", xscale="symlog", xticks=[0, 0.5, 1, 2, 5, 10],
          xticklabels=["0", "0.5", "1", "2", "5", "10"])

rows = [["", "right", "D", "KL paid, nats a picture", "KL needed for that share", "draws"]]
for name in compared[0]:
    runs = [found[name] for found in compared]
    known = [run["D"] for run in runs if run["D"] is not None]
    rows.append([name, lab.across([run["right"] for run in runs]),
                 lab.across(known) if known else "too few right",
                 lab.across([run["KL"] for run in runs]),
                 lab.across([run["needed"] for run in runs]), f"{runs[0]['draws']:.1f}"])
experiment.finish(
    fig, rows, f"toy c2i: {27 * SAMPLES} pictures of each checkpoint of labs/prepare.py")

# %% [markdown]
# <details><summary>Answers</summary>
#
# 1. Rejection keeps all of it, by definition. Of what is trained, the diverse recipe keeps 0.95
#    (0.93 .. 0.96) and no other more than 0.63. A lower temperature keeps much, but buys little:
#    59% right at 0.9 and 60% at 0.8 are its best, and from 0.6 down it is less often right than
#    the untouched base.
# 2. All of them. The paper's recipe pays 8.2 nats a picture where 0.41 would do for its 96%,
#    twenty times as much, and buys sameness with it: the surplus is the distance between "right"
#    and "right in these few ways". KL 0.1 pays 3.3 for 86%. The diverse recipe pays 1.7 where 0.34
#    would do. The KL to the pretrained model is a price, not a goal: a penalty on it can only stop
#    a policy early on the way to the wrong place.
# 3. Whether a shape is a circle or a square, and that nothing else is drawn, should be certain;
#    where it lies and how large it is should not. A bonus for the entropy of every choice, like a
#    temperature, treats both alike: 93% right with D 0.33 is on the same curve as the paper's
#    recipe. What tells the two kinds apart is in the whole picture, not in the token: hence a
#    bonus that compares pictures.
# 4. When p is small (1/p draws, and often no right picture at all), when there is no verifier at
#    the time of use, or when each draw is expensive. Here 1.9 draws would do, and no training at
#    all would be the better choice. That the row is missing from papers does not make it wrong.
# 5. E[(r - 1) grad log pi] = E[r grad log pi] - E[grad log pi], and the last term is zero. So only
#    variance and scale differ: the baseline is 1 for all prompts, whatever they are. 81% (72 ..
#    88), the widest range of the table, is what that noise does, and nothing of it keeps diversity
#    here (0.41): with one update per rollout, "only negatives teach" is a statement about the
#    baseline.
#
# </details>
