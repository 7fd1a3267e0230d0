# %% [markdown]
# # Lab 4: when does the clip do anything?
#
# Drawing pictures is expensive, so why not take several optimizer steps with the same ones?  After
# the first step the policy is no longer the one that drew them (*off-policy*), and the loss
# corrects for that, in part, with the ratio rho = pi_theta / pi_old of each token (not of
# the prefix before it), clipped (PPO, arXiv 1707.06347):
#
#     -min( rho A, clip(rho, 1 - eps, 1 + eps) A ).
#
# A token whose ratio has left the interval *in the direction of its advantage* has gradient zero.
# DAPO (arXiv 2503.14476) widens the upper side alone, so that rare tokens can grow.  In
# `argrpo.py` the number of optimizer steps for each rollout is `update_epochs`.
#
# **You need**: sections 3 and 5 of `argrpo.py`.  **Time**: five minutes.
#
#     python labs/lab4_offpolicy.py

# %%
import time

import lab
import torch
from lab import COLOURS, OTHERS, plt

import argrpo
import toy

experiment = lab.Experiment("lab4_offpolicy")
quick = experiment.quick                         # quick(small, full) is a size

# %% [markdown]
# ## 1. One epoch: is the clip inert?
#
# **Question 1.**  At the first epoch all ratios are exactly 1.  Then why is the gradient of the
# loss not zero, and what is it?  The cell compares it, clipped and unclipped, and with plain
# REINFORCE, the gradient of -A log pi.

# %%
def gradient(model, loss):
    model.zero_grad()
    loss.backward()
    return torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])


def first_epoch(seed):
    """The largest differences between three gradients, relative to the largest entry of one."""
    model, _ = toy.load("c2i")
    drawn = lab.draw(model, 8, texts=toy.CLASSES[9:13], seed=seed)
    A = argrpo.group_advantages(drawn.right, 8)
    cond = torch.arange(9, 13).repeat_interleave(8)

    def logp():
        return argrpo.token_logp(model, drawn.tokens, cond)[0]

    old = logp().detach()
    clipped = gradient(model, argrpo.grpo_loss(logp(), old, None, A, clip_eps=0.2)[0])
    unclipped = gradient(model, argrpo.grpo_loss(logp(), old, None, A, clip_eps=1e6)[0])
    reinforce = gradient(model, -(A[:, None] * logp()).mean())
    scale = reinforce.abs().max()
    return {"clipped - unclipped": ((clipped - unclipped).abs().max() / scale).item(),
            "clipped - REINFORCE": ((clipped - reinforce).abs().max() / scale).item()}


inert = experiment.over_seeds(first_epoch)
print(inert[0])

# %% [markdown]
# ## 2. More epochs
#
# Every run has as many rollouts of 64 pictures, so that runs with more epochs take more
# optimizer steps: that is what more epochs are for.  Beside the reward we watch
#
# - the *clipped share*: tokens whose gradient the clip has set to zero in the last epoch, as
#   they are before its update (so that one epoch has none);
# - the *largest ratio* of a token, likewise (as its median over the seeds, for it is wild);
# - the *KL to the pretrained model*, in nats a picture: how far the policy has run.
#
# There is no KL penalty here.  What holds the policy is the clip, and besides it only the learning
# rate and the gradient's largest norm.

# %%
ROLLOUTS = quick(2, 16)
CLIPS = {                                        # name: (eps, eps of the upper side, colour)
    "no clip": (1e6, None, COLOURS["paper"]),
    "clip 0.2": (0.2, None, COLOURS["diverse"]),
    "clip 0.2, upper 0.28": (0.2, 0.28, OTHERS[0]),
}
EPOCHS = quick([1, 2], [1, 2, 4, 8])
RATES = quick({8e-4: EPOCHS}, {8e-4: EPOCHS, 2e-4: [1, 4, 8], 3e-3: [1, 4]})
MAIN = 8e-4                                      # the rate of the curves; DAPO's clip at this alone


def train_toy(seed):
    """{"clip, epochs, lr": curves and the share of right pictures at the end}."""
    found = {}
    for lr, some_epochs in RATES.items():
        for epochs in some_epochs:
            for name, (low, high, _) in CLIPS.items():
                if epochs == 1 and name != "clip 0.2" or lr != MAIN and high:
                    continue                     # of one epoch all are one run
                model, _ = toy.load("c2i")
                config = argrpo.GRPOConfig(
                    steps=ROLLOUTS, prompts_per_step=8, group_size=8, update_epochs=epochs, lr=lr,
                    lr_end=1.0, seed=seed, kl_beta=0.0, clip_eps=low, clip_eps_high=high)
                curves = {"reward": [], "clip_frac": [], "ratio_max": [], "kl": []}
                begun = time.perf_counter()
                for step in lab.train(model, config):
                    for key in ("reward", "clip_frac", "ratio_max"):
                        curves[key].append(step.metrics[key])
                    # Of the sampled pictures: an unbiased estimate of KL(pi_old || pi_ref).
                    kl = (step.logp - step.ref_logp).sum(1).mean().item()
                    curves["kl"].append(kl)
                curves["seconds"] = time.perf_counter() - begun
                drawn = lab.draw(model, quick(4, 12))
                curves["right"] = drawn.right.mean().item()
                found[f"{name}, {epochs}, {lr:g}"] = curves
    return found


trained = experiment.over_seeds(train_toy)

# %% [markdown]
# **Question 2.**  From which number of epochs on does the clip change the result, and what does the
# wider upper side change?  What happens to the runs without the clip, and which of the curves shows
# it first, with two epochs and with eight?
#
# **Question 3.**  How large is the clipped share with 8 epochs (in the table)?  Which tokens can
# have large ratios, and how can a few of them matter?  Why are there ratios of a hundred with the
# clip, too, and why do those without it fall in the end?
#
# **Question 4.**  Do more epochs learn faster here, for each rollout or for each second (the table
# has the seconds)?  Why might that be otherwise with more pictures in a rollout, or a smaller
# learning rate?  Try it.

# %%
fig, axes = plt.subplots(1, 4, figsize=(12, 4), layout="constrained")
for ax, (key, label) in zip(axes, {"reward": "reward, mean of five",
                                   "ratio_max": "largest ratio",
                                   "kl": "KL, nats a picture"}.items()):
    for epochs, style in zip(EPOCHS, ("-.", ":", "--", "-")):
        for name, (_, high, colour) in CLIPS.items():
            key_of_run = f"{name}, {epochs}, {MAIN:g}"
            if key_of_run not in trained[0] or high:
                continue
            curves = torch.tensor([found[key_of_run][key] for found in trained])
            curve = curves.median(0).values if key == "ratio_max" else curves.mean(0)
            if key == "reward":                  # a mean of five stands at the last of them
                curve = curve.unfold(0, min(5, ROLLOUTS), 1).mean(-1)
            ax.plot(range(ROLLOUTS - len(curve), ROLLOUTS), curve, style, color=colour,
                    label=f"{name}, epochs: {epochs}")
    ax.set(xlabel="rollouts", title=label, xlim=(0, ROLLOUTS - 1))
    ax.xaxis.get_major_locator().set_params(integer=True)
axes[1].set_yscale("log")
axes[2].set_yscale("symlog", linthresh=1)
axes[2].set_ylim(bottom=0)
for name, (_, high, colour) in CLIPS.items():
    for (lr, some_epochs), marker in zip(RATES.items(), "ovs"):
        if lr == MAIN or not high:
            # Of one epoch there is one run for all clips.
            keys = [f"{'clip 0.2' if epochs == 1 else name}, {epochs}, {lr:g}"
                    for epochs in some_epochs]
            lab.plot_band(axes[3], some_epochs,
                          [[found[key]["right"] for key in keys] for found in trained],
                          color=colour, marker=marker, label=f"{name}, lr {lr:g}")
axes[3].set(xlabel="update epochs", title="right at the end", ylim=(0, 1))
fig.legend(*axes[0].get_legend_handles_labels(), fontsize=7, ncols=4, loc="outside upper left",
           title=f"panels 1 to 3: lr {MAIN:g}, means of the seeds (ratios: medians)",
           title_fontsize=7)
fig.legend(*axes[3].get_legend_handles_labels(), fontsize=7, ncols=2, loc="outside upper right",
           title="panel 4", title_fontsize=7)

rows = [["clip", "epochs", "lr", "right at the end", "KL of the last rollout, nats a picture",
         "largest ratio of the run", "clipped share", "seconds"]]
for name in trained[0]:
    last = [found[name] for found in trained]
    rows.append([*name.rsplit(", ", 2), lab.across([run["right"] for run in last]),
                 lab.across([run["kl"][-1] for run in last]),
                 lab.across([max(run["ratio_max"]) for run in last]),
                 lab.across([sum(run["clip_frac"]) / ROLLOUTS for run in last]),
                 f"{sum(run['seconds'] for run in last) / len(last):.0f}"])
experiment.finish(fig, rows, f"toy c2i: {ROLLOUTS} rollouts of 8 x 8 pictures, no KL penalty")

# %% [markdown]
# <details><summary>Answers</summary>
#
# 1. The value of the ratio is 1, but its derivative is not zero: grad rho = rho grad log pi. So
#    the gradient is that of -A log pi, the mean over tokens: REINFORCE. All three are equal to the
#    last bit here.
# 2. From the second on. With two epochs 42% are right without the clip, 58% (49 .. 63) with it;
#    with four 6% and 54%. The wider upper side makes no difference that three seeds can tell (63
#    against 58% with two epochs, 5 against 12% with eight). With eight epochs the largest ratio
#    shows it first: it is 10 to 383 without the clip, 4 to 6 with it, in the very first rollout,
#    whose pictures are still those of the untouched policy; KL and reward follow together. With two
#    epochs the ratio shows nothing, and the KL is first: twice as large from the third rollout on,
#    where the reward falls behind from the eighth on.
# 3. About an eighth of all tokens with eight epochs, and a twelfth with four. A large ratio can
#    only be that of a code that was unlikely when it was drawn: its probability can grow a
#    hundredfold, where that of a likely one cannot. The gradient of such tokens is weighted with
#    the ratio, so that without the clip one of ratio 100 counts as a hundred (how much of a step
#    that is was not measured). The clipped share also counts the other side, ratios below 0.8 with
#    a negative advantage. With the clip, a token's own gradient ends at 1.2, but those of other
#    tokens go on moving it. And a policy that is never right has no advantages: it stands still,
#    and its ratios are near 1.
# 4. Hardly here. Of 64 pictures at the rate 8e-4 one epoch (61%, of 56% at the start) and two (58%,
#    with the wider upper side 63%) cannot be told apart, four are probably worse (54%), and eight
#    clearly (12%): the same 64 pictures, and what is chance in them, are learnt again and again. At
#    3e-3 one epoch is too much already. At 2e-4 four epochs with the clip come to 64% (61 .. 69),
#    one to 61% (59 .. 64), in twice the time: if reuse pays there, three seeds cannot tell; eight
#    fall to 57%, and to 28% without the clip. The clip delays a collapse (with eight epochs, or at
#    3e-3, it comes all the same); it does not turn reuse into learning. (The table's seconds are of
#    one core, with other work beside it.) That there is less chance in a larger rollout speaks for
#    more reuse there; it was not run.
#
# </details>
