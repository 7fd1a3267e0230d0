# %% [markdown]
# # Lab 2: you get what you measure
#
# A reward is a stand-in (a *proxy*) for what is wanted (the *truth*).  Optimised hard enough, the
# two part company: reward hacking.  For language models Gao et al. (2022, "Scaling laws for reward
# model overoptimization", arXiv 2210.10760) plot both against the distance that the policy has
# travelled from the pretrained model, the square root of the KL: the proxy keeps rising, while the
# truth rises, turns and falls.  They had to train a second, larger reward model to play the truth.
# The toy has a verifier that reads every shape, and here it plays the truth.
#
# **You need**: `reward.py`.  **Time**: four minutes.
#
#     python labs/lab2_hacking.py

# %%
import random

import lab
import torch
from lab import COLOURS, OTHERS, plt

import argrpo
import toy
from reward import jpeg

experiment = lab.Experiment("lab2_hacking")
quick = experiment.quick                         # quick(small, full) is a size

# %% [markdown]
# ## 1. Two proxies
#
# `lax` is a verifier written in a hurry.  It wants as many pixels of the asked colour as the
# prompt's scenes have (within a factor of 1.5), and none of another colour.  It does not look
# at shapes, and does not count things.  `small_jpeg` likes pictures that compress well, as DDPO's
# (arXiv 2305.13301) does.
#
# **Question 1.**  Before you run it: write down a picture that `lax` takes for "three red circles"
# and a person does not.  What will the policy draw?  And what under `small_jpeg`?

# %%
def pixels_of(images):
    """How many pixels are nearest to each palette colour, rather than the ground: (B, 3)."""
    palette = torch.tensor([toy.GROUND.tolist(), *toy.PALETTE.values()])             # (4, 3)
    distance = (images[:, None] - palette[None, :, :, None, None]).square().sum(2)   # (B, 4, H, W)
    return torch.stack([(distance.argmin(1) == c).sum((1, 2)) for c in (1, 2, 3)], dim=1)


def usual_pixels():
    """{class: pixels of its colour in a rendered scene, on average}."""
    usual, rng = {}, random.Random(0)
    for text in toy.CLASSES:
        scenes = toy.render([toy.make_scene(text, rng) for _ in range(20)])
        usual[text] = pixels_of(scenes).sum(1).float().mean().item()
    return usual


USUAL = usual_pixels()


def lax(images, texts):
    counts = pixels_of(images).float()                                               # (B, 3)
    asked = torch.tensor([list(toy.PALETTE).index(text.split()[1]) for text in texts])
    usual = torch.tensor([USUAL[text] for text in texts])
    mine = counts.gather(1, asked[:, None])[:, 0]
    enough = (mine > usual / 1.5) & (mine < usual * 1.5)
    return (enough & (counts.sum(1) == mine)).float()


def reward_of(**weights):
    """A RewardSet in miniature: the weighted sum of the functions named."""
    functions = {"lax": lax, "small_jpeg": jpeg, "shapes": toy.verify}

    def total(images, texts):
        parts = {name: functions[name](images, texts) for name in weights}
        return sum(weights[name] * part for name, part in parts.items()), parts
    return total


# %% [markdown]
# ## 2. Proxy and truth over the distance travelled
#
# The brakes:
#
# - the **KL penalty** of GRPO, with the weights 0, 0.1 and 1;
# - **early stopping**: read the curves from left to right, and stop;
# - a **mixture**: a fifth of the reward is the strict verifier.
#
# The distance is estimated without bias: KL(pi || pi_ref) is the expectation of log pi(x) - log
# pi_ref(x), summed over tokens, and the step's 128 pictures are draws of pi. "Proxy" is always the
# first reward named, "truth" the strict verifier.  The table's "proxy of right pictures" says
# whether the proxy also takes what is right for right.  In the figure a thin line is a seed, and a
# thick one the mean of the seeds; diamonds are the untouched model (dark: truth).

# %%
STEPS = quick(3, 30)
SHOWN = toy.CLASSES[::5]                         # one red circle, one green triangle, ...
RUNS = {                                         # name: (reward's weights, kl_beta, colour)
    "lax": (dict(lax=1.0), 0.0, COLOURS["paper"]),
    "lax, KL 0.1": (dict(lax=1.0), 0.1, OTHERS[2]),
    "lax, KL 1": (dict(lax=1.0), 1.0, OTHERS[1]),
    "lax, a fifth strict": (dict(lax=0.8, shapes=0.2), 0.0, OTHERS[0]),
    "small JPEG": (dict(small_jpeg=1.0), 0.0, COLOURS["diverse"]),
    "small JPEG, KL 0.1": (dict(small_jpeg=1.0), 0.1, OTHERS[3]),
}


def train_toy(seed):
    """{run: {"kl", "proxy", "truth": of each step}}."""
    found = {}
    for name, (weights, kl_beta, _) in RUNS.items():
        model, _ = toy.load("c2i")
        config = argrpo.GRPOConfig(steps=STEPS, prompts_per_step=16, group_size=8, lr=1.6e-3,
                                   lr_end=0.3, kl_beta=kl_beta, seed=seed)
        curves = {"kl": [], "proxy": [], "truth": [], "proxy of the right": []}
        for step in lab.train(model, config, reward=reward_of(**weights)):
            curves["kl"].append((step.logp - step.ref_logp).sum(1).mean().item())
            curves["proxy"].append(step.parts[next(iter(weights))].mean().item())
            right = toy.verify(step.images, step.texts)
            curves["truth"].append(right.mean().item())
            proxy = step.parts[next(iter(weights))][right == 1]
            curves["proxy of the right"].append(proxy.mean().item() if len(proxy) else 0.0)
        found[name] = curves | {"pictures": sheet(model)}
    return found


def sheet(model):
    """Two pictures each of SHOWN."""
    return lab.as_text(lab.draw(model, 2, texts=SHOWN).images)


trained = experiment.over_seeds(train_toy)

# %% [markdown]
# **Question 2.**  Where on the lax curve would you stop, if you could not see the truth?  What
# could you look at instead?
#
# **Question 3.**  Does the KL penalty move the curve of truth over distance, or only decide how far
# along the curve a run gets?  And the mixture?
#
# **Question 4.**  In Gao et al. the truth's gain over the start follows d (a - b log d) under RL,
# with the distance d = sqrt(KL), and d (a - b d) under best-of-n.  Does either fit here?  What is
# different: the proxy, the policy, or the optimiser?

# %% [markdown]
# ## 3. A classifier as the proxy
#
# **Question 5.**  What does a policy draw to be called a traffic light?  The reward `imagenet` is
# the log-probability of a class under a real ImageNet classifier.  The toy's pictures are enlarged,
# and the prompt of the reward is one fixed class, whatever the toy was asked.  Needs `pip install
# -r requirements-rewards.txt`, and is left out without.

# %%
def traffic_light(seed):
    """{"log p": of each step, "pictures"}; {} without the packages."""
    try:
        from reward import build_rewards
        classifier = build_rewards("imagenet", "cpu")
    except (ImportError, SystemExit, ValueError, OSError) as error:
        print(f"  no classifier: {error}")
        return {}
    texts = ["a photo of a traffic light"]

    def reward(images, prompts):
        large = torch.nn.functional.interpolate(images, size=224, mode="nearest")
        return classifier(large, texts * len(images))

    model, _ = toy.load("c2i")
    config = argrpo.GRPOConfig(steps=quick(1, 20), prompts_per_step=quick(2, 8), group_size=8,
                               lr=1.6e-3, kl_beta=0.0, seed=seed)
    curve = [step.metrics["reward"] for step in lab.train(model, config, reward=reward)]
    return {"log p": curve, "pictures": sheet(model)}


lights = experiment.over_seeds(traffic_light)

# %%
def smooth(curve):
    """The means of seven steps in a row, or of all if there are fewer: one step is noisy."""
    return torch.tensor(curve).unfold(0, min(7, len(curve)), 1).mean(-1)


def plot(ax, name, key, style, **how):
    """A quantity of a run over the distance: thin lines are seeds, the thick one is their mean.
    A diamond at 0 is the untouched model, of all seeds' first steps."""
    colour = RUNS[name][2]
    x, y = (torch.stack([smooth(found[name][k]) for found in trained]) for k in ("kl", key))
    x = x.clamp(min=0).sqrt()
    for row, column in zip(x, y):
        ax.plot(row, column, style, color=colour, linewidth=0.5, alpha=0.6)
    ax.plot(x.mean(0), y.mean(0), style, color=colour, linewidth=2, **how)
    ax.scatter(0, sum(found[name][key][0] for found in trained) / len(trained), marker="D", s=20,
               color="#444444" if style == "-" else "#aaaaaa")


fig = plt.figure(figsize=(11, 6), layout="constrained")
top, bottom = fig.subfigures(2, 1, height_ratios=(1, 0.6))
bottom.suptitle("seed 0, two pictures each of " + ", ".join(SHOWN), fontsize=8)
left, middle, right = top.subplots(1, 3)
kilobytes = middle.twinx()
for ax, of_proxy, runs, label in ((left, left, list(RUNS)[:4], "lax verifier"),
                                  (middle, kilobytes, list(RUNS)[4:], "minus kilobytes")):
    for name in runs:
        plot(of_proxy, name, "proxy", ":")
        plot(ax, name, "truth", "-", label=name)
    ax.set(xlabel="distance travelled, sqrt(KL in nats a picture)",
           ylabel="truth (lines)" + ", proxy (dotted)" * (ax is of_proxy),
           title=f"{label}, means of 7 steps")
    ax.legend(fontsize=7, loc="upper left" if ax is left else "upper center")
kilobytes.set_ylabel("proxy (dotted)")
for name, (_, _, colour) in RUNS.items():
    last = [[sum(found[name][key][-3:]) / 3 for key in ("proxy", "truth")] for found in trained]
    if name.startswith("lax"):
        right.scatter(*zip(*last), color=colour, label=name)
right.plot([0, 1], [0, 1], color="#cccccc", linewidth=1)
right.set(xlabel="proxy at the end", ylabel="truth at the end", xlim=(0, 1.02), ylim=(0, 1.02),
          title="the front")
right.legend(fontsize=7)
sheets = {name: trained[0][name]["pictures"] for name in RUNS}
if lights[0]:
    sheets["imagenet: traffic light"] = lights[0]["pictures"]
for ax, (name, text) in zip(bottom.subplots(1, len(sheets)), sheets.items()):
    ax.imshow(lab.as_sheet(text), interpolation="nearest")
    ax.set_title(name, fontsize=8)
    ax.axis("off")

def ends(curve):
    """The first step, whose pictures the untouched model draws, and the mean of the last three."""
    return curve[0], sum(curve[-3:]) / len(curve[-3:])


rows = [["trained on", "proxy: untouched", "last three steps", "truth: untouched",
         "last three steps", "proxy of right pictures, last three",
         "KL, last three, nats a picture"]]
for name in RUNS:
    runs = [found[name] for found in trained]
    proxy, truth = ([ends(run[key]) for run in runs] for key in ("proxy", "truth"))
    rows.append([name, lab.across([p[0] for p in proxy]), lab.across([p[1] for p in proxy]),
                 lab.across([t[0] for t in truth]), lab.across([t[1] for t in truth]),
                 lab.across([ends(run["proxy of the right"])[1] for run in runs]),
                 lab.across([ends(run["kl"])[1] for run in runs])])
if all(lights):
    log_p = [ends(run["log p"]) for run in lights]
    rows.append(["imagenet: traffic light", lab.across([p[0] for p in log_p]),
                 lab.across([p[1] for p in log_p]), *[""] * 4])
experiment.finish(fig, rows, f"toy c2i: {STEPS} steps of 16 x 8 pictures, lr 1.6e-3")

# %% [markdown]
# <details><summary>Answers</summary>
#
# 1. A red blob as large as three circles, or three red squares: the colour and the amount are
#    right. What the policy draws is nearer at hand than a blob: another number of the right shapes
#    (one large circle for two, four triangles for three), and shapes that are unfinished or have
#    grown together. Under `small_jpeg` it draws one small shape, high up in the left corner,
#    whatever the number asked for, and often whatever the colour, for an empty ground is what
#    compresses best.
# 2. You would not know: the proxy rises all the way, from 54% to 84%, while the truth falls from
#    55% to 39% in the first eight steps (46, 35, 36%), and comes back to 48% (50, 47, 48%). What is
#    left is to look at pictures, to spend a strict judgement on a few of them, or to stop at a
#    distance decided beforehand.
# 3. It decides how far a run gets in its 30 steps (11.6, 5.1 and 1.1 nats), and a run that has not
#    gone far has neither gained nor lost much: a brake, and early stopping is another. Whether it
#    also moves the curve, three seeds do not show. Between 4 and 7 nats the truth is 48, 40 and 42%
#    without it, 46, 55 and 47% with the weight 0.1, the proxy 77, 67, 68 and 76, 75, 76%. The
#    mixture leaves the curve: with a fifth of the reward from the strict verifier the proxy ends
#    as high (84%), and the truth at 66% (59 .. 75): only that fifth of the reward looks at shapes.
# 4. Neither: theirs rise before they fall, for a reward model is right near where it was trained.
#    Under `lax` the truth falls, turns, and rises a little, under `small_jpeg` it falls all the way
#    (to 34% in the first five steps, to 13% in the end). Two proxies give two shapes; policy and
#    optimiser were not varied.
# 5. What it drew already: coloured shapes on a dark ground are not far from there to begin with
#    (log p is -3.3, where a guess among 1000 classes has -6.9 and certainty 0), and small, often
#    green spots come beside them. log p rises by half a nat (from -3.3 in the first five steps to
#    -2.7 in the last five), not far, in 20 steps of 64 pictures.
#
# </details>
