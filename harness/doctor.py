"""The doctor: reads a run's numbers, and says in plain words what is wrong and what to do.

    diagnose(metrics, settings) -> [Finding(kind, name, what, advice), ...]

metrics are those of all steps so far, one dict a step, settings the run's settings as a dict.  A
finding is a "fault", or a "note" that only explains.  Each is a function with the decorator
@rule(kind, name), which takes Readings and returns what there is to say, or None.  Its docstring is
what users read: the advice.

A value that is missing (None, NaN) or infinite is left out, as if its step had not had it.
"""

import statistics
from collections import namedtuple
from math import hypot, isfinite, isnan, nan

Finding = namedtuple("Finding", "kind name what advice")
Rule = namedtuple("Rule", "kind name condition advice")
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


class Readings:
    """A run's metrics, as the rules ask for them."""

    def __init__(self, metrics, settings, summary=None):
        self.metrics, self.settings, self.summary = metrics, settings, summary or {}

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

    def best(self, name):
        """The highest mean of so many neighbouring values as make a beginning."""
        values, n = self.values(name), self.window(name)
        return max((mean(values[i:i + n]) for i in range(len(values) - n + 1)), default=nan)

    def held_out(self):
        """The metrics that nothing is trained on."""
        names = dict.fromkeys(name for m in self.metrics for name in m)
        trained = {name.removeprefix("reward/") for name in names if name.startswith("reward/")}
        return [name for name in names
                if (name == "verified" and trained != {"shapes"}) or name.startswith("watch/")]


# ---------------------------------------------------------------------------------------------
# The rules, in the order in which they are reported
# ---------------------------------------------------------------------------------------------

RULES = []


def rule(kind, name):
    """Decorator that adds a condition to RULES; the advice is its docstring, on one line."""
    def add(condition):
        RULES.append(Rule(kind, name, condition, " ".join(condition.__doc__.split())))
        return condition
    return add


def flat(r):
    """Whether groups without any spread are almost all there is, at the end."""
    return r.last("flat_groups") >= 0.95


def learned(r):
    """Whether groups had spread at first, and the reward has risen since."""
    return r.change("reward") > SURE and r.first("flat_groups") < 0.5


@rule("fault", "sampler and learner disagree")
def mismatch(r):
    """Look at this before all else. Does the sampler use the newest weights, the same temperature
    and the same guidance as token_logp? A custom sampler has to be brought up to date after every
    step. Nothing else that the run says can be trusted."""
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


@rule("fault", "identical images")
def clones(r):
    """Every image of a group needs random numbers of its own; a very low temperature does this,
    too."""
    if flat(r) and r.last("diversity") < 1e-6:
        return "the images of a group are all the same picture"


@rule("fault", "constant reward")
def constant_reward(r):
    """If it is the ceiling, the run is done, or needs harder prompts or a finer reward. Else
    examine the reward: python -m rewards --check NAME."""
    rewards = r.values("reward")[-r.window("reward"):]
    if not rewards or not flat(r) or clones(r) or reward_falls(r):
        return None
    if max(rewards) - min(rewards) < 1e-6:
        return (f"every image gets the same reward, {rewards[-1]:.4g}, and so nothing is learned: "
                "the reward is constant, or all images have reached its ceiling")


@rule("fault", "no spread within groups")
def no_spread(r):
    """Does the reward look at the image? python -m rewards --check NAME. Else take harder or easier
    prompts, a larger --group-size, or a finer reward."""
    others = (learned, clones, constant_reward, reward_falls)
    if flat(r) and r.values("reward") and not any(other(r) for other in others):
        return (f"{r.last('flat_groups'):.0%} of the groups have no spread: all images of a prompt "
                "get the same reward, though prompts differ, and so nothing is learned")


@rule("fault", "missing rewards")
def missing(r):
    """Images without a reward teach nothing. Look at what the reward's model answers."""
    if r.last("missing") > 0.2:
        return f"the reward cannot judge {r.last('missing'):.0%} of the images"


@rule("fault", "the reward's scale")
def wrong_scale(r):
    """Advantages are (r - mean) / (std + 1e-4): multiply the weight, as in --reward NAME:WEIGHT, so
    that the spread within a group is near 1. python -m rewards --check NAME says by how much."""
    if not r.settings.get("scale_advantages", True):
        return None
    share = dict(points(r.metrics, "flat_groups"))
    spreads = [m["reward_std"] / (1 - share[m["step"]]) for m in r.metrics     # may be infinite
               if m.get("reward_std") is not None and share.get(m["step"], 1.0) < 1]
    spread = median([spread for spread in spreads if not isnan(spread)])
    if spread < 2e-4:
        return (f"rewards differ by {spread:.1g} within a group, and so advantages have "
                f"{spread / (spread + 1e-4):.1%} of their size: little or nothing is learned")
    if spread > 1e18:
        return (f"rewards differ by {spread:.1g} within a group: the square of that overflows, all "
                "advantages are 0, and nothing is learned")


@rule("fault", "KL runs away")
def kl_runaway(r):
    """Raise --kl-beta or lower --lr, and look at the pictures. In code of your own, check the sign
    of the KL term."""
    values = r.values("kl")
    third = mean(values[len(values) // 2:3 * len(values) // 4])
    end = median(values[-r.window("kl"):])       # a single step's estimate may be far too large
    if end > 1 or (end > 0.4 and end > 1.3 * third):
        return (f"the KL to the pretrained model is {end:.2g} nats a token by now: little is left "
                "of what it had learned")


@rule("fault", "back at the start")
def went_back(r):
    """Something has loaded the first weights again: a checkpoint, or a reset of the model."""
    known = points(r.metrics, "kl")
    moved = [i for i, (_, value) in enumerate(known) if value > 1e-4]
    if not moved:
        return None
    least, step = min((value, step) for step, value in known[moved[0]:])
    if least < 1e-7:
        return (f"the policy had moved away from the pretrained model, and at step {step} it is "
                "exactly there again")


@rule("fault", "the reference moves")
def reference_moves(r):
    """The reference must be a frozen copy of the model, not the model itself."""
    trained = r.change("entropy"), r.change("reward")
    if r.last("kl") < 1e-7 and max(map(abs, trained)) > SURE and not flat(r):
        return ("the KL to the pretrained model is zero, though reward or entropy have changed: "
                "the reference moves along with the policy")


@rule("fault", "no effect")
def no_effect(r):
    """Raise --lr, by a factor of ten to begin with. Does the optimizer have the model's parameters?
    Weights in bfloat16 lose updates this small."""
    if r.last("kl") < 1e-6 and r.last("grad_norm") > 1e-4 and not reference_moves(r) \
            and not went_back(r):
        return (f"after {len(r.metrics)} steps the policy is still the pretrained model "
                f"(KL {r.last('kl'):.1g}), though the gradient is not zero")


@rule("fault", "entropy is gone")
def entropy_gone(r):
    """Stop earlier, lower --lr, raise --kl-beta, or take --recipe diverse."""
    if r.last("entropy") < 0.15 * r.first("entropy"):
        return (f"the entropy has fallen from {r.first('entropy'):.3g} to {r.last('entropy'):.3g} "
                "nats a token: the policy always draws the same, and finds nothing new")


@rule("fault", "gradient always clipped")
def always_clipped(r):
    """Is the reward on a large scale, without --scale-advantages? Else lower --lr or raise
    --max-grad-norm."""
    norm, values = r.settings.get("max_grad_norm", 1.0), r.values("grad_norm")
    clipped = mean([float(value > norm) for value in values])
    if clipped > 0.6 and median(values) > 2 * norm:
        return (f"the gradient's norm is {median(values):.3g} in the middle and almost always cut "
                f"to {norm:g}: all steps have the same length, whatever the rewards say")


@rule("fault", "updates too far")
def far_updates(r):
    """Lower --update-epochs or --lr."""
    clipped, ratio = mean(r.values("clip_frac")), mean(r.values("ratio_max"))
    if clipped > 0.08 and ratio > 4:
        return (f"on average {clipped:.0%} of the tokens are clipped, and the likeliest to grow "
                f"becomes {ratio:.3g} times as likely in one step: the updates go too far from the "
                "rollout that they use")


@rule("fault", "reward hacking")
def hacking(r):
    """Look at the pictures. Add what is missing to the reward, raise --kl-beta, or stop at the step
    where the measure began to fall."""
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


@rule("fault", "training and evaluation disagree")
def evaluation_falls(r):
    """Does every step have other prompts? Are the evaluation's of the same kind? Look at the
    prompts that became worse."""
    before, after = (r.summary.get(when, {}).get("reward") for when in ("before", "after"))
    if before is None or after is None or r.change("reward") < SURE:
        return None
    if after < before - 0.1 * abs(before):
        return (f"the reward of the training's images rises, from {r.first('reward'):.3g} to "
                f"{r.last('reward'):.3g}, and that of the evaluation falls, from {before:.3g} to "
                f"{after:.3g}: what is learned does not hold for the evaluation's prompts")


@rule("fault", "the reward falls")
def reward_falls(r):
    """Lower --lr. In code of your own, check the sign of advantages and loss."""
    fall = r.best("reward") - r.last("reward")
    if fall > 0.1 * abs(r.best("reward")) and fall > (SURE + 1) * r.error("reward"):
        return f"the reward has fallen from {r.best('reward'):.3g} to {r.last('reward'):.3g}"


@rule("fault", "the reward does not rise")
def no_rise(r):
    """First the ratio: is mismatch small, and ratio 1 with one update per rollout? Then the signal:
    do rewards belong to the images they stand beside, is there spread within groups? Then more
    images per step, a larger --lr, a smaller --kl-beta."""
    others = (flat, no_effect, reward_falls, wrong_scale)
    if len(r.metrics) >= 60 and not any(other(r) for other in others):
        if r.change("reward") < 1.0:
            return (f"the reward has not risen in {len(r.metrics)} steps "
                    f"({r.first('reward'):.3g} at first, {r.last('reward'):.3g} now), though the "
                    "policy has changed")


@rule("note", "why is the loss 0?")
def loss_is_zero(r):
    """The advantages of a group add up to zero, and with one update per rollout every ratio is 1:
    the loss is minus their mean, which is 0, plus kl_beta times the KL. Its gradient is not 0, for
    each image pulls by its own advantage. Watch the reward, not the loss."""
    losses = [abs(value) for value in r.values("loss")]
    if losses and median(losses) < 0.05 and median(r.values("grad_norm")) > 1e-3:
        return f"the loss is near 0 ({median(losses):.1g} in the middle), and that is right"


@rule("note", "less varied")
def diversity_lost(r):
    """--recipe diverse keeps right images varied; on the toy it draws 7 to 12 times as many images,
    elsewhere it is untried (docs/diversity.md). A higher --kl-beta, or fewer steps, keep more of
    what the pretrained model draws, and learn less."""
    before, after = r.summary.get("before", {}), r.summary.get("after", {})
    shares = (after.get("diversity_kept"), r.last("diversity_kept"),
              ratio(after.get("diversity"), before.get("diversity")),
              ratio(r.last("diversity"), r.first("diversity")))
    share = next((share for share in shares if share is not None and isfinite(share)), nan)
    if share < 0.9:
        return (f"{1 - share:.0%} of the diversity of a prompt's images is lost: {share:.0%} of "
                "the pretrained model's is left")


@rule("note", "nothing left to learn")
def solved(r):
    """The run could have been shorter; harder prompts or a finer reward would teach more."""
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
    findings, lines = diagnose(metrics, settings, summary), []
    if not any(f.kind == "fault" for f in findings):
        lines.append("doctor: nothing wrong")
    for f in findings:
        line = f"{f.name}: {f.what}. {f.advice}".replace("?:", "?", 1)
        lines.append(("doctor: " if f.kind == "fault" else "note: ") + line)
    return lines


def early_warning(metrics, steps=5):
    """A line for a run that is going: the last steps all had rewards without any spread."""
    last = metrics[-steps:]
    rewards = [value for _, value in points(last, "reward")]
    if len(last) < steps or any(m["flat_groups"] < 1 for m in last):
        return None
    if not rewards:
        return f"for {steps} steps, no image has had a reward: nothing is learned"
    return (f"for {steps} steps, all images of each group have had the same reward "
            f"({rewards[-1]:.4g} on average): nothing is learned. The reward is saturated, "
            "constant, or does not look at the images")
