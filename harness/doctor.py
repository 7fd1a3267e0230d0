"""The doctor: reads a run's numbers, and says in plain words what is wrong and what to do.

    diagnose(metrics, settings) -> [Finding(kind, name, what, advice), ...]

metrics are those of all steps so far, one dict a step, settings the run's settings as a dict.  A
finding is a "fault", or a "note" that only explains.  Each is a function with the decorator
@rule(kind, name).  It takes Readings, and returns {name: number} of what there is to say, or None.
Its docstring is what users read: the first paragraph says what was found, with those numbers in
the place of their names in braces, and the second gives the advice.

A value that is missing (None, NaN) or infinite is left out, as if its step had not had it.
"""

import statistics
from collections import namedtuple
from itertools import dropwhile
from math import hypot, inf, isfinite, nan

Finding = namedtuple("Finding", "kind name what advice")
FEWEST = 8                                       # steps that a diagnosis needs
SURE = 3.0                                       # standard errors that make a change certain


def points(metrics, name):
    """[(step, value), ...] of a metric where it is known and finite."""
    known = [(m["step"], m[name]) for m in metrics if m.get(name) is not None]
    return [(step, value) for step, value in known if isfinite(value)]


def mean(values):
    """NaN, which satisfies no rule, if there are none; no error if they are too large to add."""
    return sum(values) / len(values) if values else nan


def median(values):
    return statistics.median(values) if values else nan


def ratio(after, before):
    """How many times as much; NaN if it is not known."""
    return after / before if after is not None and before else nan


class Readings(namedtuple("Run", "metrics settings summary")):
    """A run's metrics, as the rules ask for them."""

    def values(self, name):
        """All known values of a metric, in the order of the steps."""
        return [value for _, value in points(self.metrics, name)]

    def window(self, name):
        """How many values of a metric are its beginning, or its end: a quarter, at least three."""
        return max(3, len(self.values(name)) // 4)

    def first(self, name):
        """The mean of a metric's beginning, and that of its end: NaN if it is not there."""
        return mean(self.values(name)[:self.window(name)])

    def last(self, name):
        return mean(self.values(name)[-self.window(name):])

    def error(self, name):
        """The standard error of the difference of two windows.

        A step's noise is judged from neighbouring steps, so that a trend does not count."""
        values = self.values(name)
        noise = mean([(b - a) * (b - a) / 2 for a, b in zip(values, values[1:])])
        return max((2 * noise / self.window(name)) ** 0.5, 1e-9)

    def change(self, name):
        """From a metric's beginning to its end, in standard errors."""
        if len(self.values(name)) < 2 * self.window(name):
            return 0.0
        return (self.last(name) - self.first(name)) / self.error(name)


# ---------------------------------------------------------------------------------------------
# The rules, in the order in which they are reported
# ---------------------------------------------------------------------------------------------

RULES = {}                                       # a rule's function: its Finding, without numbers


def rule(kind, name):
    """Decorator that adds a function to RULES."""
    def add(function):
        what, advice = (" ".join(part.split()) for part in function.__doc__.split("\n\n"))
        RULES[function] = Finding(kind, name, what, advice)
        return function
    return add


def flat(r):
    """Whether groups without any spread are almost all there is, at the end."""
    return r.last("flat_groups") >= 0.95


def learned(r):
    """Whether groups had spread at first, and the reward has risen since."""
    return r.change("reward") > SURE and r.first("flat_groups") < 0.5


def allowed_mismatch(rough, cfg_scale):
    """Nats a token, on average, by which sampler and learner may differ from rounding alone, in
    bfloat16 if it is rough, else in float32.

    Both branches of guidance round on their own, so the error of s * cond - (s - 1) * null is
    sqrt(s^2 + (s - 1)^2) times that of one.  docs/speed.md has what was measured."""
    return (0.05 if rough else 1e-3) * hypot(cfg_scale, cfg_scale - 1)


@rule("fault", "sampler and learner disagree")
def mismatch(r):
    """sampler and learner disagree by {ended:.2g} nats a token ({started:.2g} in the first steps):
    what is trained is not what is drawn

    Look at this before all else. Does the sampler use the newest weights, the same temperature
    and the same guidance as token_logp? A custom sampler has to be brought up to date after every
    step. Nothing else that the run says can be trusted."""
    values, scale = r.values("mismatch_mean"), r.settings.get("cfg_scale", 1.0)
    if r.settings.get("logprob_cfg", "guided") == "none" and scale != 1:
        return None                              # that is what the settings ask for
    allowed = allowed_mismatch(str(r.settings.get("device", "")).startswith("cuda"), scale)
    started, ended = median(values[:3]), median(values[-3:])
    if ended > allowed or (ended > 1e-5 and ended > 20 * started):
        return dict(ended=ended, started=started)


@rule("fault", "identical images")
def clones(r):
    """the images of a group are all the same picture

    Every image of a group needs random numbers of its own; a very low temperature does this,
    too."""
    if flat(r) and r.last("diversity") < 1e-6:
        return dict(diversity=r.last("diversity"))


@rule("fault", "constant reward")
def constant_reward(r):
    """every image gets the same reward, {reward:.4g}, and so nothing is learned: the reward is
    constant, or all images have reached its ceiling

    If it is the ceiling, the run is done, or needs harder prompts or a finer reward. Else
    examine the reward: python -m rewards --check NAME."""
    rewards = r.values("reward")[-r.window("reward"):]
    if rewards and max(rewards) - min(rewards) < 1e-6 and flat(r):
        if not clones(r) and not reward_falls(r):
            return dict(reward=rewards[-1])


@rule("fault", "no spread within groups")
def no_spread(r):
    """{share:.0%} of the groups have no spread: all images of a prompt get the same reward, though
    prompts differ, and so nothing is learned

    Does the reward look at the image? python -m rewards --check NAME. Else take harder or easier
    prompts, a larger --group-size, or a finer reward."""
    others = (learned, clones, constant_reward, reward_falls)
    if flat(r) and r.values("reward") and not any(other(r) for other in others):
        return dict(share=r.last("flat_groups"))


@rule("fault", "missing rewards")
def missing(r):
    """the reward cannot judge {share:.0%} of the images

    Images without a reward teach nothing. Look at what the reward's model answers."""
    if r.last("missing") > 0.2:
        return dict(share=r.last("missing"))


@rule("fault", "the reward's scale")
def wrong_scale(r):
    """rewards differ by {spread:.1g} within a group, and so advantages have {share:.1%} of their
    size: little or nothing is learned

    Advantages are (r - mean) / (std + 1e-4), and 0 where the square of r - mean overflows, above
    1e18: multiply the weight, as in --reward NAME:WEIGHT, so that the spread within a group is near
    1. python -m rewards --check NAME says by how much."""
    flat_share, spreads = dict(points(r.metrics, "flat_groups")), []
    for m in r.metrics:
        uneven = 1 - flat_share.get(m["step"], 1.0)
        if uneven > 0 and "reward_std" in m:     # in the log, an infinite one is None
            spreads.append(inf if m["reward_std"] is None else m["reward_std"] / uneven)
    spread = median(spreads)
    if r.settings.get("scale_advantages", True) and (spread < 2e-4 or spread > 1e18):
        share = 0.0 if spread > 1e18 else spread / (spread + 1e-4)
        return dict(spread=spread, share=share)


@rule("fault", "KL runs away")
def kl_runaway(r):
    """the KL to the pretrained model is {end:.2g} nats a token by now: little is left of what it
    had learned

    Raise --kl-beta or lower --lr, and look at the pictures. In code of your own, check the sign
    of the KL term."""
    values = r.values("kl")
    third = mean(values[len(values) // 2:3 * len(values) // 4])
    end = median(values[-r.window("kl"):])       # a single step's estimate may be far too large
    if end > 1 or (end > 0.4 and end > 1.3 * third):
        return dict(end=end)


@rule("fault", "back at the start")
def went_back(r):
    """the policy had moved away from the pretrained model, and at step {step} it is exactly there
    again

    Something has loaded the first weights again: a checkpoint, or a reset of the model."""
    moved = dropwhile(lambda point: point[1] <= 1e-4, points(r.metrics, "kl"))
    step, least = min(moved, key=lambda point: point[1], default=(0, nan))
    if least < 1e-7:
        return dict(step=step)


@rule("fault", "the reference moves")
def reference_moves(r):
    """the KL to the pretrained model is zero, though reward or entropy have changed: the reference
    moves along with the policy

    The reference must be a frozen copy of the model, not the model itself."""
    change = max(abs(r.change("entropy")), abs(r.change("reward")))
    if r.last("kl") < 1e-7 and change > SURE and not flat(r):
        return dict(change=change)


@rule("fault", "no effect")
def no_effect(r):
    """after {steps} steps the policy is still the pretrained model (KL {kl:.1g}), though the
    gradient is not zero

    Raise --lr, by a factor of ten to begin with. Does the optimizer have the model's parameters?
    Weights in bfloat16 lose updates this small."""
    if r.last("kl") < 1e-6 and r.last("grad_norm") > 1e-4:
        if not reference_moves(r) and not went_back(r):
            return dict(steps=len(r.metrics), kl=r.last("kl"))


@rule("fault", "entropy is gone")
def entropy_gone(r):
    """the entropy has fallen from {start:.3g} to {end:.3g} nats a token: the policy always draws
    the same, and finds nothing new

    Stop earlier, lower --lr, raise --kl-beta, or take --recipe diverse."""
    start, end = r.first("entropy"), r.last("entropy")
    if end < 0.15 * start:
        return dict(start=start, end=end)


@rule("fault", "gradient always clipped")
def always_clipped(r):
    """the gradient's norm is {middle:.3g} in the middle and almost always cut to {most:g}: all
    steps have the same length, whatever the rewards say

    Is the reward on a large scale, without --scale-advantages? Else lower --lr or raise
    --max-grad-norm."""
    most, values = r.settings.get("max_grad_norm", 1.0), r.values("grad_norm")
    clipped = mean([float(value > most) for value in values])
    if clipped > 0.6 and median(values) > 2 * most:
        return dict(middle=median(values), most=most)


@rule("fault", "updates too far")
def far_updates(r):
    """on average {clipped:.0%} of the tokens are clipped, and the likeliest to grow becomes
    {ratio:.3g} times as likely in one step: the updates go too far from the rollout that they use

    Lower --update-epochs or --lr."""
    clipped, largest = mean(r.values("clip_frac")), mean(r.values("ratio_max"))
    if clipped > 0.08 and largest > 4:
        return dict(clipped=clipped, ratio=largest)


@rule("fault", "reward hacking")
def hacking(r):
    """the reward rises, and {name}, on which nothing is trained, falls from {start:.3g} to
    {end:.3g}: the policy pleases the reward, not what it stands for

    Look at the pictures. Add what is missing to the reward, raise --kl-beta, or stop at the step
    where the measure began to fall."""
    if r.change("reward") < SURE / 2:
        return None
    names = dict.fromkeys(name for m in r.metrics for name in m)
    held_out = [name for name in names if name.startswith("watch/")]
    if [name for name in names if name.startswith("reward/")] != ["reward/shapes"]:
        held_out = ["verified", *held_out]
    for name in held_out:
        values, window = r.values(name), r.window(name)
        start, end = r.first(name), r.last(name)
        falls = r.change(name) < -SURE and start - end > 0.1 * abs(start)
        if len(values) >= 2 * window and 0 <= max(values[-window:]) < values[0] / 2:
            falls, start = True, values[0]       # at once, so that there is no slow fall to see
        if falls:
            return dict(name=name, start=start, end=end)


@rule("fault", "training and evaluation disagree")
def evaluation_falls(r):
    """the reward of the training's images rises, from {start:.3g} to {end:.3g}, and that of the
    evaluation falls, from {before:.3g} to {after:.3g}: what is learned does not hold for the
    evaluation's prompts

    Does every step have other prompts? Are the evaluation's of the same kind? Look at the
    prompts that became worse."""
    before, after = (r.summary.get(when, {}).get("reward") for when in ("before", "after"))
    if before is None or after is None or r.change("reward") < SURE:
        return None
    if after < before - 0.1 * abs(before):
        return dict(start=r.first("reward"), end=r.last("reward"), before=before, after=after)


@rule("fault", "the reward falls")
def reward_falls(r):
    """the reward has fallen from {best:.3g} to {end:.3g}

    Lower --lr. In code of your own, check the sign of advantages and loss."""
    values, n = r.values("reward"), r.window("reward")
    means = [mean(values[i:i + n]) for i in range(len(values) - n + 1)]
    best, end = max(means, default=nan), r.last("reward")
    if best - end > 0.1 * abs(best) and best - end > (SURE + 1) * r.error("reward"):
        return dict(best=best, end=end)


@rule("fault", "the reward does not rise")
def no_rise(r):
    """the reward has not risen in {steps} steps ({start:.3g} at first, {end:.3g} now), though the
    policy has changed

    First the ratio: is mismatch small, and ratio 1 with one update per rollout? Then the signal:
    do rewards belong to the images they stand beside, is there spread within groups? Then more
    images per step, a larger --lr, a smaller --kl-beta."""
    others = (flat, no_effect, reward_falls, wrong_scale)
    if len(r.metrics) >= 60 and r.change("reward") < 1 and not any(other(r) for other in others):
        return dict(steps=len(r.metrics), start=r.first("reward"), end=r.last("reward"))


@rule("note", "why is the loss 0?")
def loss_is_zero(r):
    """the loss is near 0 ({middle:.1g} in the middle), and that is right

    The advantages of a group add up to zero, and with one update per rollout every ratio is 1:
    the loss is minus their mean, which is 0, plus kl_beta times the KL. Its gradient is not 0, for
    each image pulls by its own advantage. Watch the reward, not the loss."""
    middle = median([abs(value) for value in r.values("loss")])
    if middle < 0.05 and median(r.values("grad_norm")) > 1e-3:
        return dict(middle=middle)


@rule("note", "less varied")
def diversity_lost(r):
    """{lost:.0%} of the diversity of a prompt's images is lost: {left:.0%} of the pretrained
    model's is left

    --recipe diverse keeps right images varied. On the toy the pretrained model first draws 3 to 5
    times as many as the paper's recipe in all, then the policy 2.5 to 6 times as many; with
    --recipe quick, which keeps nearly as much, once to twice. Elsewhere both are untried
    (docs/diversity.md). A higher --kl-beta, or fewer steps, keep more of what the pretrained model
    draws, and learn less."""
    before, after = r.summary.get("before", {}), r.summary.get("after", {})
    shares = (after.get("diversity_kept"), r.last("diversity_kept"),
              ratio(after.get("diversity"), before.get("diversity")),
              ratio(r.last("diversity"), r.first("diversity")))
    left = next((share for share in shares if share is not None and isfinite(share)), nan)
    if left < 0.9:
        return dict(lost=1 - left, left=left)


@rule("note", "nothing left to learn")
def solved(r):
    """almost all groups are flat by now, for almost all of their images are good

    The run could have been shorter; harder prompts or a finer reward would teach more."""
    if flat(r) and learned(r):
        return dict(share=r.last("flat_groups"))


# ---------------------------------------------------------------------------------------------
# The diagnosis
# ---------------------------------------------------------------------------------------------

def diagnose(metrics, settings, summary=None):
    """What is wrong with a run, and what needs explaining: a list of Findings, faults first.

    metrics: one dict a step.  settings: the run's, as a dict; "device" may say where it ran.
    summary: the run's summary.json, if it is over.  Fewer than FEWEST steps say nothing."""
    if len(metrics) < FEWEST:
        return []
    readings = Readings(metrics, settings, summary or {})
    found = [(finding, function(readings)) for function, finding in RULES.items()]
    return [finding._replace(what=finding.what.format(**numbers))
            for finding, numbers in found if numbers]


def report(metrics, settings, summary=None):
    """The diagnosis as lines of text."""
    if len(metrics) < FEWEST:
        return [f"doctor: {len(metrics)} steps are too few to say anything; {FEWEST} are needed"]
    findings, speaker = diagnose(metrics, settings, summary), {"fault": "doctor", "note": "note"}
    lines = [f"{speaker[f.kind]}: {f.name}: {f.what}. {f.advice}".replace("?:", "?", 1)
             for f in findings]
    well = [] if any(f.kind == "fault" for f in findings) else ["doctor: nothing wrong"]
    return well + lines


def early_warning(metrics, settings, steps=5):
    """A line for a run that is going, or None: what draws the images is not what is trained, or the
    last steps all had rewards without any spread."""
    apart, last = mismatch(Readings(metrics, settings, {})), metrics[-steps:]
    if apart:
        return RULES[mismatch].what.format(**apart)
    rewards = [value for _, value in points(last, "reward")]
    if len(last) < steps or any(m["flat_groups"] < 1 for m in last):
        return None
    if not rewards:
        return f"for {steps} steps, no image has had a reward: nothing is learned"
    return (f"for {steps} steps, all images of each group have had the same reward "
            f"({rewards[-1]:.4g} on average): nothing is learned. The reward is saturated, "
            "constant, or does not look at the images")
