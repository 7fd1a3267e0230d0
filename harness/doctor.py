"""The doctor: reads a run's numbers, and says in plain words what is wrong and what to do.

    diagnose(metrics, settings) -> [Finding(kind, name, what, advice), ...]

metrics are those of all steps so far, one dict a step, settings the run's settings as a dict.  A
finding is a "fault", or a "note" that only explains.  Each is a function with the decorator
@rule(kind, name, advice), which takes Readings and returns what there is to say, or None.
"""

from collections import namedtuple
from math import hypot
from statistics import fmean, median

Finding = namedtuple("Finding", "kind name what advice")
Rule = namedtuple("Rule", "kind name condition advice")
FEWEST = 8                                       # steps that a diagnosis needs
SURE = 3.0                                       # standard errors that make a change certain


class Readings:
    """A run's metrics, as the rules ask for them."""

    def __init__(self, metrics, settings, summary=None):
        self.metrics, self.settings, self.summary = metrics, settings, summary or {}

    def values(self, name):
        """All known values of a metric, in the order of the steps."""
        return [m[name] for m in self.metrics if m.get(name) is not None]

    def window(self, name):
        """How many values of a metric are its beginning, or its end: a quarter, at least three."""
        return max(3, len(self.values(name)) // 4)

    def first(self, name):
        """The mean of a metric's beginning; NaN, which satisfies no rule, if it is not there."""
        return mean(self.values(name)[:self.window(name)])

    def last(self, name):
        return mean(self.values(name)[-self.window(name):])

    def error(self, name):
        """The standard error of the difference of two windows.

        A step's noise is judged from neighbouring steps, so that a trend does not count."""
        values = self.values(name)
        noise = mean([(b - a) ** 2 / 2 for a, b in zip(values, values[1:])])
        return max((2 * noise / self.window(name)) ** 0.5, 1e-9)

    def change(self, name):
        """From a metric's beginning to its end, in standard errors."""
        if len(self.values(name)) < 2 * self.window(name):
            return 0.0
        return (self.last(name) - self.first(name)) / self.error(name)

    def best(self, name):
        """The highest mean of so many neighbouring values as make a beginning."""
        values, n = self.values(name), self.window(name)
        return max((mean(values[i:i + n]) for i in range(len(values) - n + 1)), default=mean([]))

    def held_out(self):
        """The metrics that nothing is trained on."""
        names = dict.fromkeys(name for m in self.metrics for name in m)
        trained = {name.removeprefix("reward/") for name in names if name.startswith("reward/")}
        return [name for name in names
                if (name == "verified" and trained != {"shapes"}) or name.startswith("watch/")]


def mean(values):
    return fmean(values) if values else float("nan")


# ---------------------------------------------------------------------------------------------
# The rules, in the order in which they are reported
# ---------------------------------------------------------------------------------------------

RULES = []


def rule(kind, name, advice):
    """Decorator that adds a condition to RULES."""
    def add(condition):
        RULES.append(Rule(kind, name, condition, advice))
        return condition
    return add


def flat(r):
    """Whether groups without any spread are almost all there is, at the end."""
    return r.last("flat_groups") >= 0.95


def learned(r):
    """Whether groups had spread at first, and the reward has risen since."""
    return r.change("reward") > SURE and r.first("flat_groups") < 0.5


@rule("fault", "sampler and learner disagree",
      "Look at this before all else. Does the sampler use the newest weights, the same "
      "temperature and the same guidance as token_logp? A custom sampler has to be brought up "
      "to date after every step. Nothing else that the run says can be trusted.")
def mismatch(r):
    s, values = r.settings, r.values("mismatch_mean")
    if s.get("logprob_cfg", "guided") == "none" and s.get("cfg_scale", 1) != 1:
        return None                              # that is what the settings ask for
    scale = s.get("cfg_scale", 1.0)
    gpu = str(s.get("device", "")).startswith("cuda")
    allowed = (0.05 if gpu else 1e-3) * hypot(scale, scale - 1)
    started, ended = median(values[:3]), median(values[-3:])
    if ended > allowed or (ended > 1e-5 and ended > 20 * started):
        return (f"sampler and learner disagree by {ended:.2g} nats a token ({started:.2g} in the "
                "first steps): what is trained is not what is drawn")


@rule("fault", "identical images",
      "Every image of a group needs random numbers of its own; a very low temperature does "
      "this, too.")
def clones(r):
    if flat(r) and r.last("diversity") < 1e-6:
        return "the images of a group are all the same picture"


@rule("fault", "constant reward",
      "If it is the ceiling, the run is done, or needs harder prompts or a finer reward. Else "
      "examine the reward: python -m rewards --check NAME.")
def constant_reward(r):
    rewards = r.values("reward")[-r.window("reward"):]
    if flat(r) and not clones(r) and not reward_falls(r) and max(rewards) - min(rewards) < 1e-6:
        return (f"every image gets the same reward, {rewards[-1]:.4g}, and so nothing is learned: "
                "the reward is constant, or all images have reached its ceiling")


@rule("fault", "no spread within groups",
      "Does the reward look at the image? python -m rewards --check NAME. Else take harder or "
      "easier prompts, a larger --group-size, or a finer reward.")
def no_spread(r):
    others = (learned, clones, constant_reward, reward_falls)
    if flat(r) and not any(other(r) for other in others):
        return (f"{r.last('flat_groups'):.0%} of the groups have no spread: all images of a prompt "
                "get the same reward, though prompts differ, and so nothing is learned")


@rule("fault", "missing rewards",
      "Images without a reward teach nothing. Look at what the reward's model answers.")
def missing(r):
    if r.last("missing") > 0.2:
        return f"the reward cannot judge {r.last('missing'):.0%} of the images"


@rule("fault", "KL runs away",
      "Raise --kl-beta or lower --lr, and look at the pictures. In code of your own, check the "
      "sign of the KL term.")
def kl_runaway(r):
    values = r.values("kl")
    third = mean(values[len(values) // 2:3 * len(values) // 4])
    end = median(values[-r.window("kl"):])       # a single step's estimate may be far too large
    if end > 1 or (end > 0.4 and end > 1.3 * third):
        return (f"the KL to the pretrained model is {end:.2g} nats a token by now: little is left "
                "of what it had learned")


@rule("fault", "back at the start",
      "Something has loaded the first weights again: a checkpoint, or a reset of the model.")
def went_back(r):
    values = r.values("kl")
    moved = [i for i, value in enumerate(values) if value > 1e-4]
    if moved and min(values[moved[0]:]) < 1e-7:
        step = moved[0] + values[moved[0]:].index(min(values[moved[0]:]))
        return (f"the policy had moved away from the pretrained model, and at step {step} it is "
                "exactly there again")


@rule("fault", "the reference moves",
      "The reference must be a frozen copy of the model, not the model itself.")
def reference_moves(r):
    trained = r.change("entropy"), r.change("reward")
    if r.last("kl") < 1e-7 and max(map(abs, trained)) > SURE and not flat(r):
        return ("the KL to the pretrained model is zero, though reward or entropy have changed: "
                "the reference moves along with the policy")


@rule("fault", "no effect",
      "Raise --lr, by a factor of ten to begin with. Does the optimizer have the model's "
      "parameters? Weights in bfloat16 lose updates this small.")
def no_effect(r):
    if r.last("kl") < 1e-6 and r.last("grad_norm") > 1e-4 and not reference_moves(r) \
            and not went_back(r):
        return (f"after {len(r.metrics)} steps the policy is still the pretrained model "
                f"(KL {r.last('kl'):.1g}), though the gradient is not zero")


@rule("fault", "entropy is gone",
      "Stop earlier, lower --lr, raise --kl-beta, or take --recipe diverse.")
def entropy_gone(r):
    if r.last("entropy") < 0.15 * r.first("entropy"):
        return (f"the entropy has fallen from {r.first('entropy'):.3g} to {r.last('entropy'):.3g} "
                "nats a token: the policy always draws the same, and finds nothing new")


@rule("fault", "gradient always clipped",
      "Is the reward on a large scale, without --scale-advantages? Else lower --lr or raise "
      "--max-grad-norm.")
def always_clipped(r):
    norm, values = r.settings.get("max_grad_norm", 1.0), r.values("grad_norm")
    clipped = mean([float(value > norm) for value in values])
    if clipped > 0.6 and median(values) > 2 * norm:
        return (f"the gradient's norm is {median(values):.3g} in the middle and almost always cut "
                f"to {norm:g}: all steps have the same length, whatever the rewards say")


@rule("fault", "updates too far",
      "Lower --update-epochs or --lr.")
def far_updates(r):
    clipped, ratio = mean(r.values("clip_frac")), mean(r.values("ratio_max"))
    if clipped > 0.08 and ratio > 4:
        return (f"on average {clipped:.0%} of the tokens are clipped, and the likeliest to grow "
                f"becomes {ratio:.3g} times as likely in one step: the updates go too far from the "
                "rollout that they use")


@rule("fault", "reward hacking",
      "Look at the pictures. Add what is missing to the reward, raise --kl-beta, or stop at the "
      "step where the measure began to fall.")
def hacking(r):
    if r.change("reward") < SURE / 2:
        return None
    for name in r.held_out():
        values, window = r.values(name), r.window(name)
        start, end = r.first(name), r.last(name)
        falls = r.change(name) < -SURE and start - end > 0.1 * abs(start)
        if len(values) >= 2 * window and 0 <= max(values[-window:]) < values[0] / 2:
            falls, start = True, values[0]       # at once, so that there is no slow fall to see
        if falls:
            return (f"the reward rises, and {name}, on which nothing is trained, falls from "
                    f"{start:.3g} to {end:.3g}: the policy pleases the reward, not what it stands "
                    "for")


@rule("fault", "training and evaluation disagree",
      "Does every step have other prompts? Are the evaluation's of the same kind? Look at the "
      "prompts that became worse.")
def evaluation_falls(r):
    before, after = (r.summary.get(when, {}).get("reward") for when in ("before", "after"))
    if before is None or after is None or r.change("reward") < SURE:
        return None
    if after < before - 0.1 * abs(before):
        return (f"the reward of the training's images rises, from {r.first('reward'):.3g} to "
                f"{r.last('reward'):.3g}, and that of the evaluation falls, from {before:.3g} to "
                f"{after:.3g}: what is learned does not hold for the evaluation's prompts")


@rule("fault", "the reward falls",
      "Lower --lr. In code of your own, check the sign of advantages and loss.")
def reward_falls(r):
    fall = r.best("reward") - r.last("reward")
    if fall > 0.1 * abs(r.best("reward")) and fall > (SURE + 1) * r.error("reward"):
        return f"the reward has fallen from {r.best('reward'):.3g} to {r.last('reward'):.3g}"


@rule("fault", "the reward does not rise",
      "First the ratio: is mismatch small, and ratio 1 with one update per rollout? Then the "
      "signal: do rewards belong to the images they stand beside, is there spread within "
      "groups? Then more images per step, a larger --lr, a smaller --kl-beta.")
def no_rise(r):
    if len(r.metrics) >= 60 and not any(other(r) for other in (flat, no_effect, reward_falls)):
        if r.change("reward") < 1.0:
            return (f"the reward has not risen in {len(r.metrics)} steps "
                    f"({r.first('reward'):.3g} at first, {r.last('reward'):.3g} now), though the "
                    "policy has changed")


@rule("note", "why is the loss 0?",
      "The advantages of a group add up to zero, and with one update per rollout every ratio is "
      "1: the loss is minus their mean, which is 0, plus kl_beta times the KL. Its gradient is "
      "not 0, for each image pulls by its own advantage. Watch the reward, not the loss.")
def loss_is_zero(r):
    losses = [abs(value) for value in r.values("loss")]
    if losses and median(losses) < 0.05 and median(r.values("grad_norm")) > 1e-3:
        return f"the loss is near 0 ({median(losses):.1g} in the middle), and that is right"


@rule("note", "nothing left to learn",
      "The run could have been shorter; harder prompts or a finer reward would teach more.")
def solved(r):
    if flat(r) and learned(r):
        return "almost all groups are flat by now, for almost all of their images are good"


# ---------------------------------------------------------------------------------------------
# The diagnosis
# ---------------------------------------------------------------------------------------------

def diagnose(metrics, settings, summary=None):
    """What is wrong with a run, and what needs explaining: a list of Findings, faults first.

    metrics: one dict a step.  settings: the run's, as a dict; "device" may say where it ran.
    summary: the run's summary.json, if it is over.  Fewer than FEWEST steps say nothing."""
    if len(metrics) < FEWEST:
        return []
    readings = Readings(metrics, settings, summary)
    found = [(rule, rule.condition(readings)) for rule in RULES]
    return [Finding(rule.kind, rule.name, what, rule.advice) for rule, what in found if what]


def report(metrics, settings, summary=None):
    """The diagnosis as lines of text."""
    if len(metrics) < FEWEST:
        return [f"doctor: {len(metrics)} steps are too few to say anything; {FEWEST} are needed"]
    findings = diagnose(metrics, settings, summary)
    lines = [f"doctor: {f.name}: {f.what}. {f.advice}" for f in findings if f.kind == "fault"]
    lines = lines or ["doctor: nothing wrong"]
    return lines + [f"note: {f.name} {f.what}. {f.advice}" for f in findings if f.kind == "note"]


def early_warning(metrics, steps=5):
    """A line for a run that is going: the last steps all had rewards without any spread."""
    last = metrics[-steps:]
    if len(last) < steps or any(m["flat_groups"] < 1 for m in last):
        return None
    return (f"for {steps} steps, all images of each group have had the same reward "
            f"({last[-1]['reward']:.4g} on average): nothing is learned. The reward is saturated, "
            "constant, or does not look at the images")
