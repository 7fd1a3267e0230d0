"""Training runs of the toy with one fault each, made in seconds.

    make_run(folder, "stale_sampler", seed=3)  ->  {"fault": ..., "step": ..., "metrics": [...]}

`make.py --debug-seed N` hands six such folders to students, who have to find the fault.  Anything
else that reads runs can be tested with them, too.  A run is that of `argrpo.train`, with its
metrics, and `diversity` and `verified` (the toy's verifier, never trained on) at every step.

A fault is put in from outside: through the seams of `train`, by replacing a function of `argrpo`
while the run lasts, or by a setting.  FAULTS has the fifteen, each with the sentence that students
read, what puts it in, and the metrics that show it.
"""

import copy
import dataclasses
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import NamedTuple
from unittest.mock import patch

import torch

import argrpo
import toy
from diversity import group_diversity
from harness.device import packed
from harness.logs import write_json, write_metrics
from harness.options import RunSettings
from reward import to_uint8

HEALTHY = "healthy"
SETTINGS = dict(preset="toy", reward="shapes", device="cpu", prompts_per_step=4, group_size=8,
                micro_batch=None)


class Rig:
    """A run that is about to start.  A fault changes what is in it."""

    def __init__(self, seed, steps, start, settings):
        torch.manual_seed(seed)
        self.start, self.step = start, 0         # the fault begins at step `start`
        self.intended = RunSettings(**SETTINGS | dict(seed=seed, steps=steps) | settings)
        self.config = copy.copy(self.intended)   # what the run does in the place of the intended
        self.model, self.vq = toy.load("c2i")
        self.reference = copy.deepcopy(self.model).requires_grad_(False)
        self.reward, self.seams, self.replaced = toy.verify, {"sampler": packed}, {}
        self.before_step = lambda: None

    @property
    def faulty(self):
        """Whether the fault has begun."""
        return self.step >= self.start

    def replace(self, name, function):
        """Puts function(original, ...) in the place of argrpo.<name> from step `start` on."""
        original = getattr(argrpo, name)

        def replaced(*args, **kwargs):
            if self.faulty:
                return function(original, *args, **kwargs)
            return original(*args, **kwargs)

        self.replaced[name] = replaced

    def replace_reward(self, function):
        """Puts function(verdicts, images, prompts) in the place of the reward."""
        def reward(images, prompts):
            verdicts = toy.verify(images, prompts)
            return function(verdicts, images, prompts) if self.faulty else verdicts
        self.reward = reward

    def replace_loss(self, function):
        """Adds function(logp, ref_logp, entropy) to the loss."""
        c = self.config

        def loss_fn(logp, old_logp, ref_logp, advantages, entropy):
            loss, stats = argrpo.grpo_loss(logp, old_logp, ref_logp, advantages,
                                           clip_eps=c.clip_eps, kl_beta=c.kl_beta)
            if self.faulty:
                loss = loss + function(logp, ref_logp, entropy)
            return loss, stats

        self.seams["loss_fn"] = loss_fn

    def run(self):
        """Makes the run's steps, one after another: yields (metrics, Step)."""
        prompts = argrpo.Prompts(toy.CLASSES, torch.arange(len(toy.CLASSES)))

        def reward_fn(images, texts):
            rewards = self.reward(images, texts)
            return rewards, {self.config.reward: rewards}

        with ExitStack() as stack:
            for name, function in self.replaced.items():
                stack.enter_context(patch.object(argrpo, name, function))
            steps = argrpo.train(self.model, self.reference, self.vq, prompts, reward_fn,
                                 self.config, argrpo.make_optimizer(self.model, self.config),
                                 **self.seams)
            for step in range(self.config.steps):
                self.step = step
                self.before_step()
                made = next(steps)
                diversity = group_diversity(made.images, self.config.group_size).mean().item()
                verified = toy.verify(made.images, made.texts).mean().item()
                yield made.metrics | {"diversity": diversity, "verified": verified}, made


# ---------------------------------------------------------------------------------------------
# Putting a fault in
# ---------------------------------------------------------------------------------------------

def no_spread(rig):
    rig.replace_reward(lambda verdicts, images, texts: torch.tensor(
        [len(text) % 7 / 7 for text in texts]))


def saturated_reward(rig):
    rig.replace_reward(lambda verdicts, images, texts: (verdicts + 1).clamp(max=1))


def clones(rig):
    def generate(original, *args, samples_per_prompt=1, **how):
        drawn = original(*args, samples_per_prompt=1, **how)
        return tuple(x.repeat_interleave(samples_per_prompt, dim=0) for x in drawn)
    rig.replace("generate", generate)


def missing_rewards(rig):
    rng = torch.Generator().manual_seed(rig.config.seed)
    rig.replace_reward(lambda verdicts, images, texts: verdicts.masked_fill(
        torch.rand(len(verdicts), generator=rng) < 0.6, torch.nan))


def reward_hacking(rig):
    rig.start = 0
    rig.config.reward = rig.intended.reward = "colourful"
    rig.config.lr = rig.intended.lr = 2e-3
    rig.reward = lambda images, texts: images.std(dim=1).mean(dim=(1, 2)) * 4


def reversed_reward(rig):
    rig.replace("group_advantages", lambda original, *args, **how: -original(*args, **how))
    rig.config.lr *= 2


def kl_runaway(rig):
    rig.replace_loss(lambda logp, ref_logp, entropy: -0.5 * argrpo.kl_k3(logp, ref_logp).mean())


def entropy_collapse(rig):
    rig.replace_loss(lambda logp, ref_logp, entropy: entropy.mean())


def sampler_mismatch(rig):
    rig.replace("generate", lambda original, *args, temperature, **how: original(
        *args, temperature=0.5 * temperature, **how))


def stale_sampler(rig):
    kept = []                                    # a copy of the model as it was at step `start`

    def sampler(model):
        if not rig.faulty:
            return packed(model)
        if not kept:
            kept.append(copy.deepcopy(model))
        return kept[0]

    rig.seams["sampler"] = sampler


def always_clipped(rig):
    rig.replace_reward(lambda verdicts, images, texts: 255 * verdicts)
    rig.config.scale_advantages = False


def lr_without_effect(rig):
    rig.start = 0
    rig.replace("learning_rate", lambda original, config, step: 1e-6 * original(config, step))


def self_reference(rig):
    rig.start, rig.reference = 0, rig.model


def too_many_epochs(rig):
    rig.start, rig.config.update_epochs, rig.config.lr = 0, 6, 4 * rig.config.lr


def weights_reset(rig):
    rig.start = max(rig.start, rig.config.steps // 3)
    first = copy.deepcopy(rig.model.state_dict())

    def reset():
        if rig.step == rig.start:
            rig.model.load_state_dict(first)

    rig.before_step = reset


# ---------------------------------------------------------------------------------------------
# What shows it: metric -> does the fault show at this step, given the values of all steps?
# ---------------------------------------------------------------------------------------------

def is_below(limit):
    return lambda values, t: values[t] < limit


def is_above(limit):
    return lambda values, t: values[t] > limit


def falls_by(drop):
    """The mean of five steps, the last being t, is that far below that of the first three."""
    return lambda values, t: t >= 5 and mean(values[t - 4:t + 1]) < mean(values[:3]) - drop


def mean(values):
    return sum(values) / len(values)


class Fault(NamedTuple):
    says: str                                    # what the students' list says
    put_in: Callable                             # (rig) -> None
    shown_by: dict                               # metric -> (values of all steps, t) -> bool


FAULTS = {
    "no_spread": Fault(
        "the reward does not look at the picture: equal within a group, though not constant",
        no_spread, {"reward_std": is_below(1e-6), "flat_groups": is_above(0.99)}),
    "saturated_reward": Fault(
        "every picture gets the reward's highest value, right or wrong",
        saturated_reward, {"reward": is_above(0.999), "reward_std": is_below(1e-6),
                           "flat_groups": is_above(0.99)}),
    "clones": Fault(
        "all pictures of a group are drawn from the same random numbers",
        clones, {"diversity": is_below(1e-6), "flat_groups": is_above(0.99),
                 "reward_std": is_below(1e-6)}),
    "missing_rewards": Fault(
        "the reward fails to judge many of the pictures",
        missing_rewards, {"missing": is_above(0.2)}),
    "reward_hacking": Fault(
        "the reward rises, and what it was meant to measure falls",
        reward_hacking, {"verified": falls_by(0.1)}),
    "reversed_reward": Fault(
        "the advantages have the wrong sign",
        reversed_reward, {"reward": falls_by(0.1), "verified": falls_by(0.1)}),
    "kl_runaway": Fault(
        "the KL term has the wrong sign: it rewards distance from the reference",
        kl_runaway, {"kl": is_above(0.2)}),
    "entropy_collapse": Fault(
        "something besides the reward makes the policy deterministic",
        entropy_collapse, {"entropy": is_below(0.05)}),
    "sampler_mismatch": Fault(
        "the sampler draws from another distribution than the learner's, from one step to the next",
        sampler_mismatch, {"mismatch": is_above(0.05), "mismatch_mean": is_above(0.005)}),
    "stale_sampler": Fault(
        "the sampler keeps old weights, so that it falls behind little by little",
        stale_sampler, {"mismatch": is_above(1e-3), "mismatch_mean": is_above(1e-4)}),
    "always_clipped": Fault(
        "rewards on a large scale, not divided by their spread: every gradient is cut to the "
        "largest norm",
        always_clipped, {"grad_norm": is_above(5.0), "reward": is_above(2.0)}),
    "lr_without_effect": Fault(
        "the updates are far too small to change the policy",
        lr_without_effect, {"kl": lambda values, t: t >= 4 and values[t] < 1e-6}),
    "self_reference": Fault(
        "the reference is not frozen: it is the policy itself",
        self_reference, {"kl": lambda values, t: t >= 4 and values[t] < 1e-6}),
    "too_many_epochs": Fault(
        "each rollout is used for too many, too large updates",
        too_many_epochs, {"ratio_max": is_above(2.0), "clip_frac": is_above(0.05)}),
    "weights_reset": Fault(
        "the first weights were loaded again in the middle of the run",
        weights_reset, {"kl": lambda values, t: t >= 4 and values[t] < 1e-6}),
}


# ---------------------------------------------------------------------------------------------
# Making a run
# ---------------------------------------------------------------------------------------------

def make_run(folder, fault=HEALTHY, seed=0, steps=20, start=None, pictures=False, **settings):
    """Makes a run of the toy with that fault in `folder`, in about ten seconds of one core.

    fault is a name of FAULTS, or "healthy".  It begins at step `start`, by default a step from 2 to
    steps // 3 that the seed chooses; `reward_hacking`, `lr_without_effect`, `self_reference` and
    `too_many_epochs` are there from step 0, and `weights_reset` happens at steps // 3 or later.
    settings are further fields of harness.options.RunSettings, such as prompts_per_step.

    Leaves in the folder, in the formats of harness/: config.json, with the settings that the
    author meant to have (a fault such as a wrong learning rate is not in it), metrics.jsonl, and
    with pictures=True pictures.png, one row of pictures every few steps.

    Returns {"fault", "start", "shows": {metric: [steps at which it shows]}}.  Raises ValueError for
    an unknown fault, and RuntimeError if this run does not show its fault."""
    if fault != HEALTHY and fault not in FAULTS:
        raise ValueError(f"unknown fault {fault!r}: there are {', '.join(FAULTS)}, {HEALTHY}")
    if start is None:
        start = 2 + seed % max(1, steps // 3 - 1)
    rig = Rig(seed, steps, start, settings)
    if fault != HEALTHY:
        FAULTS[fault].put_in(rig)
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    metrics, rows = [], []
    for row, step in rig.run():
        metrics.append(row)
        if rig.step % max(1, steps // 6) == 0:
            rows.append(step.images[::2][:12])
    settings = dataclasses.asdict(rig.intended)
    write_json(folder / "config.json", {"script": "train_c2i", "settings": settings})
    write_metrics(folder / "metrics.jsonl", metrics)
    if pictures:
        draw_rows(folder / "pictures.png", rows)
    if fault == HEALTHY:
        return {"fault": fault, "start": None, "shows": {}}
    shown = {name: where_shown(fault, name, metrics) for name in FAULTS[fault].shown_by}
    if not any(shown.values()):
        raise RuntimeError(f"{folder} with seed {seed} and {steps} steps does not show {fault}: "
                           "make it with another seed or more steps")
    return {"fault": fault, "start": rig.start, "shows": shown}


def where_shown(fault, metric, metrics):
    """The steps at which the metric shows the fault, in a run's metrics."""
    values, rule = [row[metric] for row in metrics], FAULTS[fault].shown_by[metric]
    return [t for t in range(len(values)) if rule(values, t)]


def draw_rows(path, rows, scale=3):
    """Pictures (n, 3, H, W) in [0, 1] in rows, enlarged, as a PNG file."""
    from PIL import Image
    grid = torch.cat([torch.cat(list(row), dim=2) for row in rows], dim=1)           # (3, .., ..)
    pixels = to_uint8(grid.repeat_interleave(scale, 1).repeat_interleave(scale, 2))
    Image.fromarray(pixels.numpy()).save(path)
