# %% [markdown]
# # Lab 6: does RL teach, or only choose?
#
# A policy that is trained to be right gets more pictures right in one draw.  Has it learnt
# anything that the pretrained model could not do?  Yue et al. (2025, arXiv 2504.13837) ask language
# models with pass@k: is at least one of k draws right?  They find that the trained model wins at
# k = 1 and the *pretrained* one at large k: RL has only made likelier what was there, and has lost
# some of it.  Here captions that pretraining has seen, and compositions that it has not, are apart.
#
# And what does choosing give without any training?  Section 2 draws n pictures and keeps the one
# that the model itself finds likeliest: no verifier needed.  Section 3 looks for the place where
# a picture goes wrong.
#
# **You need**: `generate` in `argrpo.py`, and checkpoints:
# `python labs/prepare.py --only t2i_paper,t2i_diverse`.  **Time**: four minutes.
#
#     python labs/lab6_search.py

# %%
from math import comb

import lab
import torch
from lab import COLOURS, plt
from prepare import prepared, require

import argrpo
import toy

experiment = lab.Experiment("lab6_search")
quick = experiment.quick                         # quick(small, full) is a size
require(experiment, "t2i_paper", "t2i_diverse")

# %%
CAPTIONS = {
    "seen": quick([*toy.SEEN_CLASSES[::8], *lab.every(81, toy.SEEN_PAIRS)],
                  [*toy.SEEN_CLASSES[::3], *lab.every(13, toy.SEEN_PAIRS)]),
    "unseen": quick(lab.every(21, toy.UNSEEN_PAIRS), [*toy.UNSEEN_CLASSES, *toy.UNSEEN_PAIRS]),
}
DRAWS = quick(16, 128)
KS = [k for k in (1, 2, 4, 8, 16, 32, 64) if k <= DRAWS // 2]
KEPT = DRAWS // 8                                # pictures of a caption of which D is measured
TEMPERATURES = quick([0.7], [0.9, 0.8, 0.7, 0.6])


def models_of(seed):
    """{"base", "paper", "diverse": a Transformer}."""
    paths = {"base": "", "paper": prepared(experiment, "t2i_paper", seed),
             "diverse": prepared(experiment, "t2i_diverse", seed)}
    return {name: toy.load("t2i", gpt_path=path)[0] for name, path in paths.items()}


# %% [markdown]
# ## 1. pass@k
#
# Of n draws of a caption, c are right.  The chance that k of them, picked at random, hold a right
# one is 1 - C(n - c, k) / C(n, k): unbiased, and far less noisy than to try once (n = 128 here).
#
# **Question 1.**  A policy that is right with probability q on every caption has
# pass@k = 1 - (1 - q)^k.  Another is always right on a share q of the captions, and never on
# the rest.  Draw both curves.  What does a flat curve say about a policy, and what a steep one?

# %%
def pass_at(k, right):
    """right (captions, n) of 0 or 1 -> the mean over captions."""
    n = right.shape[1]
    each = [1 - comb(n - c, k) / comb(n, k) for c in right.sum(1).long().tolist()]
    return sum(each) / len(each)


def keep(columns, score, n):
    """Of n neighbours in a row (captions, draws), the one of the largest score: its columns."""
    whole = score.shape[1] // n * n
    best = score[:, :whole].unflatten(1, (-1, n)).argmax(-1, keepdim=True)   # (captions, m, 1)
    return [column[:, :whole].unflatten(1, (-1, n)).gather(2, best)[..., 0] for column in columns]


def variety(drawn, index, base):
    """D of the first KEPT of the pictures at index (captions, m), against base's."""
    flat = index[:, :KEPT].flatten()
    texts = [drawn.texts[i] for i in flat.tolist()]
    return lab.diversity(lab.Drawn(texts, None, None, drawn.images[flat], None), base)


def pruned(logp, right, keep_of=8, half=18):
    """Draw the first half of `keep_of` pictures, finish the two likeliest, and keep the likelier:
    right (captions, draws / keep_of).  It draws 8 * 18 + 2 * 18 = 180 codes, not 288."""
    first = logp[..., :half].sum(-1).unflatten(1, (-1, keep_of))     # (captions, m, 8)
    two = first.topk(2, dim=-1).indices
    whole = logp.sum(-1).unflatten(1, (-1, keep_of)).gather(2, two)
    best = two.gather(2, whole.argmax(-1, keepdim=True))
    return right.unflatten(1, (-1, keep_of)).gather(2, best)[..., 0]


def draw_many(seed):
    """Per model: pass@k seen and unseen; share right and D of best of n, and of temperatures."""
    found, models = {}, models_of(seed)
    base = lab.draw(models["base"], DRAWS, "t2i", CAPTIONS["seen"], seed=1000 + seed)
    for name, model in models.items():
        result = found[name] = {}
        for kind, texts in CAPTIONS.items():
            drawn = lab.draw(model, DRAWS, "t2i", texts, seed=seed)
            right = drawn.right.view(-1, DRAWS)                      # (captions, draws)
            result[f"pass {kind}"] = [pass_at(k, right) for k in KS]
            if kind == "seen":
                seen = drawn
        logp = seen.logp.view(-1, DRAWS, seen.logp.shape[1])         # (captions, draws, N)
        right = seen.right.view(-1, DRAWS)
        index = torch.arange(right.numel()).view_as(right)
        result["best"] = {}
        for n in (1, 2, 4, 5, 8):
            kept, where = keep([right, index], logp.sum(-1), n)
            result["best"][str(n)] = [kept.mean().item(), variety(seen, where, base)]
        result["pruned"] = pruned(logp, right).mean().item()
        result["temperature"] = {}
        for temperature in TEMPERATURES:
            cold = lab.draw(model, 2 * KEPT, "t2i", CAPTIONS["seen"], seed=seed,
                            temperature=temperature)
            where = torch.arange(len(cold.texts)).view(-1, 2 * KEPT)
            result["temperature"][str(temperature)] = [cold.right.mean().item(),
                                                       variety(cold, where, base)]
    return found


many = experiment.over_seeds(draw_many)

# %% [markdown]
# **Question 2.**  Where do the curves of base and paper cross, on seen and on unseen compositions?
# And base and diverse?  Does your answer to "teaches or chooses" depend on which recipe is asked?
#
# ## 2. Choosing without a verifier
#
# Right pictures look alike to the model in one respect: nothing in them surprised it.  So among n
# draws the likeliest is more often right.  A lower temperature, too, prefers likely pictures.
# `python sample.py --best-of 4` does the first.
#
# **Question 3.**  Which of the two gives more right pictures for the same diversity, and which
# costs more?  "Pruned" in the table stops six of eight pictures half-way, which costs as many codes
# as five pictures: compare it with best of 5.
#
# ## 3. Where does a picture go wrong?
#
# P(right | first t codes) can be measured: finish the prefix many times
# (`generate(prefix=...)`), and count.  For a picture that ends wrong it starts at its caption's
# share of right pictures, and ends at 0.  Where does it fall: all at once, or little by little?
# The mean of many pictures cannot tell, for they fall at different places.  So look at the single
# ones, and at the table: the largest fall of each picture between two rows, on average.  Counting
# 24 endings is noisy, and the largest of six noisy numbers is not zero: pictures that end right
# show how much of it is noise.

# %%
FINISHES, EVERY = quick(4, 24), 6


def where_wrong(seed):
    """P(right | first t codes) of the base's pictures, t = 0, 6, .. 36: means of those that end
    right and wrong, their largest falls, and four of those that end wrong, as pictures."""
    model, vq = toy.load("t2i")
    drawn = lab.draw(model, 1, "t2i", CAPTIONS["seen"], seed=2000 + seed)
    prompts = lab.prompts_of("t2i", drawn.texts)
    curves = []
    for t in range(0, drawn.tokens.shape[1] + 1, EVERY):
        right = []
        for some in torch.arange(len(drawn.texts)).split(256 // FINISHES):
            cond, cond_mask = prompts.cond[some], prompts.cond_mask[some]
            prefix = drawn.tokens[some, :t].repeat_interleave(FINISHES, dim=0)
            tokens, _ = argrpo.generate(
                model, cond, cond_mask, samples_per_prompt=FINISHES, prefix=prefix,
                generator=argrpo.rng_for("cpu", seed, "finish", t, some[0].item()))
            texts = [drawn.texts[i] for i in some.tolist() for _ in range(FINISHES)]
            verdicts = toy.verify(argrpo.to_images(vq, tokens, 64), texts)
            right.append(verdicts.view(-1, FINISHES).mean(1))
        curves.append(torch.cat(right))
    curves = torch.stack(curves, dim=1)                              # (pictures, 7)
    falls = (curves[:, :-1] - curves[:, 1:]).amax(1)                 # the largest of each
    wrong = (drawn.right == 0).nonzero()[:, 0]
    shown = wrong[curves[wrong, 0].argsort(descending=True)[:4]]     # likely, and yet wrong
    return {"right": mean_of(curves[drawn.right == 1]), "wrong": mean_of(curves[wrong]),
            "largest fall, wrong": falls[wrong].mean().item(),
            "largest fall, right": falls[drawn.right == 1].mean().item(),
            "shown": {"texts": [drawn.texts[i] for i in shown.tolist()],
                      "curves": curves[shown].tolist(),
                      "pictures": lab.as_text(drawn.images[shown])}}


def mean_of(curves):
    return curves.mean(0).tolist()


wrong = experiment.over_seeds(where_wrong)

# %% [markdown]
# **Question 4.**  In which rows of the raster do pictures go wrong, and why not in the last?
#
# **Question 5.**  If one code does all the damage, GRPO's advantage, the same for all codes of a
# picture, blames 35 innocent ones.  Why does that work at all?  (Lab 3.)

# %%
fig = plt.figure(figsize=(11, 6.6), layout="constrained")
top, bottom = fig.subfigures(2, 1, height_ratios=(1, 0.8))
first, second, third = top.subplots(1, 3)
for name in ("base", "paper", "diverse"):
    for ax, kind in ((first, "seen"), (second, "unseen")):
        lab.plot_band(ax, KS, [found[name][f"pass {kind}"] for found in many],
                      color=COLOURS[name], label=name)
    for key, style in (("best", "o-"), ("temperature", "x:")):
        points = {}
        for found in many:
            at_one = {"1.0": found[name]["best"]["1"]} if key == "temperature" else {}
            for knob, point in (at_one | found[name][key]).items():
                points.setdefault(knob, []).append(point)
        path = [[sum(p[axis] or 0 for p in some) / len(some) for axis in (0, 1)]
                for some in points.values() if all(p[1] for p in some)]
        if path:
            label = {"best": "best of 1, 2, 4, 5, 8", "temperature": "temperature 1 to 0.6"}[key]
            third.plot(*zip(*path), style, color=COLOURS[name], label=f"{name}, {label}")
for ax, kind in ((first, "seen"), (second, "unseen")):
    ax.set(xlabel="k", ylabel="pass@k", xscale="log", title=f"captions {kind} in pretraining",
           xticks=KS, xticklabels=KS)
    ax.minorticks_off()
first.legend(fontsize=7)
third.set(xlabel="share of right pictures", ylabel="D", title="choosing without a verifier")
third.legend(fontsize=6)
curve, *raster = bottom.subplots(1, 5, width_ratios=(1.6, 1, 1, 1, 1))
x = range(0, 37, EVERY)
for name, colour in (("right", "#009E73"), ("wrong", "#CC79A7")):
    lab.plot_band(curve, x, [found[name] for found in wrong], color=colour,
                  label=f"pictures that end {name}")
curve.set(xlabel="codes drawn so far", ylabel="P(right | these codes)", xticks=list(x),
          title="where the base's pictures go wrong")
curve.legend(fontsize=7)
shown = wrong[0]["shown"]
sheet = lab.as_sheet(shown["pictures"])                              # one row of pictures
for k, ax in enumerate(raster):
    if k >= len(shown["texts"]):
        ax.axis("off")
        continue
    ax.imshow(sheet[1:25, 26 * k + 1:26 * k + 25], interpolation="nearest")
    for row in range(6):                         # the chance after each row of the raster
        ax.text(24.2, 4 * row + 2.5, f"{shown['curves'][k][row + 1]:.2f}", fontsize=7)
    ax.set_title(f"{shown['texts'][k]}\n{shown['curves'][k][0]:.2f} at the start", fontsize=7,
                 parse_math=False)
    ax.axis("off")

rows = [["", *[f"seen, pass@{k}" for k in (1, 4, KS[-1])],
         *[f"unseen, pass@{k}" for k in (1, 4, KS[-1])], "best of 4", "its D", "best of 5",
         "pruned, of 8"]]
for name in many[0]:
    runs = [found[name] for found in many]
    picked = [lab.across([run[f"pass {kind}"][KS.index(k)] for run in runs])
              for kind in CAPTIONS for k in (1, 4, KS[-1])]
    known = [run["best"]["4"][1] for run in runs if run["best"]["4"][1] is not None]
    rows.append([name, *picked, lab.across([run["best"]["4"][0] for run in runs]),
                 lab.across(known) if known else "",
                 lab.across([run["best"]["5"][0] for run in runs]),
                 lab.across([run["pruned"] for run in runs])])
for kind in ("wrong", "right"):
    falls = [found[f"largest fall, {kind}"] for found in wrong]
    rows.append([f"base: largest fall of P(right) of a picture that ends {kind}", lab.across(falls),
                 *[""] * (len(rows[0]) - 2)])
experiment.finish(
    fig, rows, f"toy t2i: {len(CAPTIONS['seen'])} seen and {len(CAPTIONS['unseen'])} unseen "
               f"captions, {DRAWS} draws each; {FINISHES} endings of each prefix")

# %% [markdown]
# <details><summary>Answers</summary>
#
# 1. The first rises to 1: chance decides at every draw, so that more draws always help. The second
#    is flat at q: it does the same each time, right or wrong, and further draws are wasted. A
#    steep curve says that what is right is in reach, a flat one that a policy has made up its
#    mind.
# 2. On seen captions nothing is left to cross: the trained ones reach 1 by k = 8, the base by
#    k = 32. On unseen ones the paper's recipe starts at three times the base (41% against 13%),
#    and at k = 64 three seeds cannot tell the two apart (91%, 84 .. 95, and 89%, 86 .. 90; in one
#    seed the curves have crossed): what Yue et al. describe, or nearly. The diverse one stays above
#    the base at every k, with 98% (95 .. 100) at 64. So the paper's recipe has made likelier what
#    was there, and finds in 64 draws no more than the base; the diverse one finds more. Beyond 64
#    draws the lab does not see, and a base that is right 13% of the time is not one that cannot.
# 3. For the base, choosing: best of 4 is right 70% of the time at D 0.93, where no temperature
#    passes 61%. For the trained policies a lower temperature gives nearly as much for the same
#    diversity: 0.8 takes the diverse one to 97.3% at D 0.89, best of 2 to 98.3% at 0.88, and a
#    temperature costs nothing. Pruned (70%) is as good as best of 5 or a little worse (72%), for
#    the same number of codes, and lies between best of 2 (62%) and best of 8 (77%): the first half
#    of a picture tells about half of what can be told.
# 4. In the rows where things stand: of the base's wrong pictures some of the chance is lost in the
#    first half (9 to 58% of it, by seed), and the rest by the end of the fifth row. In the last row
#    nothing is left to decide: what is not finished by then is known to be wrong. Most of it falls
#    at one place: the largest fall between two rows is 0.45 (0.42 .. 0.47) for a picture that ends
#    wrong, as much as all the chance it had at the start, and 0.12 for one that ends right, which
#    is noise.
# 5. Codes that have no part in the outcome get as much blame in wrong pictures as praise in right
#    ones, so that their expected gradient is zero: they add noise, not bias. Lab 3 counts what
#    that costs.
#
# </details>
