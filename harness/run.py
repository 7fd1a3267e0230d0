"""A run: evaluates the model, trains it with `argrpo.train`, and evaluates it again.

A training script chooses models, prompts and rewards, and calls `run`, which leaves in the run's
folder: config.json, metrics.jsonl, summary.json, before_after.png, curves.png, last.pt (for
--resume) and model.pt (the result, in LlamaGen's format).
"""

import dataclasses
import shutil
import subprocess
import sys
import time
import warnings
from pathlib import Path

import torch
from tqdm import tqdm

import argrpo
import reward
from diversity import DiversityBonus, Rehearsal, group_diversity
from harness.checkpoints import Record, save_weights, write_json
from harness.evaluation import describe, diversity_kept, evaluate_all, evaluate_spread
from harness.interrupts import Interrupted, StopRequest
from harness.memory import (
    checkpoint_layers,
    choose_micro_batch,
    memory_estimate,
    out_of_memory_advice,
    print_memory,
)
from harness.pictures import draw_before_after, draw_curves
from harness.processes import (
    average_gradients,
    average_over_processes,
    rank_and_size,
    wait_for_all,
)
from harness.speed import Sampler, frozen_copy, packed
from harness.timing import Stopwatch


def run(model, vq, prompts, eval_prompts, reward_fn, settings, script, measure=None, spread=None):
    """Trains `model` on `prompts`, and shows in the folder settings.out what that did to pictures
    of `eval_prompts`.

    reward_fn is a RewardSet.  What measure(images, texts) gives, and how much of
    spread(images, texts) is kept, is reported but never trained on.  Returns the summary.  After
    Ctrl-C it exits with status 130 (143 after SIGTERM); after a bad reward, a number that is not
    finite or a full disk with status 1: with everything saved, and a line that says how to go
    on."""
    with StopRequest() as stop, out_of_memory_advice(settings):
        try:
            this = Run(model, vq, prompts, eval_prompts, reward_fn, settings, script, measure,
                       spread, stop)
            return this.before_training_and_after()
        except Interrupted:
            sys.exit(128 + stop.received)
        except (reward.BadReward, FloatingPointError, OSError) as error:
            print(f"error: {error}", file=sys.stderr)
            sys.exit(1)


class Run:
    """What `run` does, without its answers to errors."""

    def __init__(self, model, vq, prompts, eval_prompts, reward_fn, settings, script, measure,
                 spread, stop):
        self.model, self.vq, self.prompts, self.eval_prompts = model, vq, prompts, eval_prompts
        self.reward_fn, self.settings, self.script = reward_fn, settings, script
        self.measure, self.spread, self.stop = measure, spread, stop
        self.out = Path(settings.out)
        self.rank, self.size = rank_and_size()
        self.sampler = Sampler(settings.compile)
        self.spread_before = {}
        settings.micro_batch = settings.micro_batch or choose_micro_batch(model, vq, settings)

    def before_training_and_after(self):
        """One process evaluates and writes; the others wait for it."""
        settings, out = self.settings, self.out
        started = time.perf_counter()
        if self.rank == 0:
            self.print_sizes()
            before, gallery_before = self.evaluate()
            print("before: " + describe(before), flush=True)
            # Model and rewards have shown that they work: only now the folder becomes a run's.
            out.mkdir(parents=True, exist_ok=True)
            write_json(out / "config.json", configuration(settings, self.script))
        wait_for_all()
        evaluated = time.perf_counter()

        metrics = self.train()
        if self.stop.everywhere():
            raise Interrupted
        trained = time.perf_counter()
        if self.rank > 0:
            return None

        save_weights(out / "model.pt", self.model)
        after, gallery_after = self.evaluate()
        draw_before_after(out / "before_after.png", gallery_before, gallery_after)
        draw_curves(out / "curves.png", metrics)
        seconds = {"evaluation": evaluated - started + time.perf_counter() - trained,
                   "training": sum(m["seconds"] for m in metrics)}
        summary = {"before": before, "after": after, "seconds": seconds}
        write_json(out / "summary.json", summary)
        print("before: " + describe(before) + "\nafter:  " + describe(after))
        print(f"look at {out}/before_after.png and {out}/curves.png")
        return summary

    def print_sizes(self):
        s, model = self.settings, self.model
        parameters = sum(p.numel() for p in model.parameters())
        others = f" and {self.size - 1} more" if self.size > 1 else ""
        print(f"{parameters / 1e6:.1f}M parameters, {model.config.block_size} tokens per image, "
              f"{s.prompts_per_step} prompts x {s.group_size} samples = "
              f"{s.prompts_per_step * s.group_size} images per step, "
              f"{s.micro_batch} at a time in the update, {s.steps} steps, "
              f"on {next(model.parameters()).device}{others}, into {s.out}/", flush=True)
        print_memory(memory_estimate(model, self.vq, s))

    def evaluate(self):
        """(scores, gallery) of the model as it is; from the second time on with D."""
        model = self.sampler(self.model)
        scores, gallery = evaluate_all(model, self.vq, self.eval_prompts, self.reward_fn,
                                       self.settings, self.measure, self.stop)
        if self.spread is None:
            return scores, gallery
        spread = evaluate_spread(model, self.vq, self.eval_prompts, self.settings, self.spread)
        if self.spread_before:
            scores |= diversity_kept(self.spread_before, spread)
        else:
            self.spread_before = spread
        return scores, gallery

    def train(self):
        """The loop of `argrpo.train`, logged and saved: the metrics of all steps done so far.

        It continues from the last checkpoint if settings.resume asks for it, and ends early when a
        signal asks for that.  An error in a step is raised after the steps before it are saved."""
        settings, model, vq = self.settings, self.model, self.vq
        reference = frozen_copy(model)
        optimizer = argrpo.make_optimizer(model, settings)
        if settings.checkpointing:
            checkpoint_layers(model)
        seams = {"sampler": self.sampler, "shard": (self.rank, self.size),
                 "sync": average_gradients}
        if settings.diversity_bonus:
            seams["advantage_fn"] = DiversityBonus(vq, settings, settings.diversity_bonus,
                                                   settings.bonus_distance)
        remembered = {}
        if settings.rehearsal:
            seams["extra_loss"] = Rehearsal(packed(reference), vq, self.prompts, self.reward_fn,
                                            settings, settings.rehearsal, settings.rehearsal_groups)
            remembered = seams["extra_loss"].remembered
        record = Record(settings, self.script, model, optimizer, remembered, self.rank == 0)
        stopwatch = Stopwatch(model)
        steps = argrpo.train(model, reference, vq, self.prompts, stopwatch.timed(self.reward_fn),
                             settings, optimizer, record.done, **seams)
        try:
            self.follow(steps, record, stopwatch)
        finally:
            steps.close()
            record.close()
        return record.metrics

    def follow(self, steps, record, stopwatch):
        """Makes and records one step after another, until the last or a signal."""
        settings, first_step = self.settings, record.done
        device = next(self.model.parameters()).device
        quiet = {"disable": True} if self.rank > 0 else {}       # else TQDM_DISABLE may say it
        with tqdm(initial=first_step, total=settings.steps, desc="GRPO", unit="step",
                  **quiet) as bar:
            while record.done < settings.steps and not self.stop.everywhere():
                stopwatch.start()
                step = next(steps)
                metrics = self.watch(step, stopwatch.seconds())
                if record.done == first_step:
                    warn_of_mismatch(step.metrics, settings, device)
                record.add(metrics)
                bar.set_postfix({name: f"{metrics[name]:.4f}"
                                 for name in ("reward", "kl", "entropy")})
                bar.update()

    def watch(self, step, seconds):
        """The step's metrics and seconds, averaged over all processes, and its images' diversity.

        Every fifth step of a process alone they also have D as it falls: rough, from the step's few
        images of a prompt."""
        metrics = step.metrics | seconds
        diversity = group_diversity(step.images, self.settings.group_size)           # (P,)
        metrics["diversity"] = diversity.mean().item()
        if self.spread is not None and self.size == 1 and metrics["step"] % 5 == 0:
            spread = self.spread(step.images, step.texts)
            metrics |= diversity_kept(self.spread_before, spread)
        return average_over_processes(metrics, maximum=("step", "ratio_max", "mismatch"))


def warn_of_mismatch(metrics, settings, device):
    """Warns if what draws the images computes another distribution than what is trained.

    With log-probabilities without guidance, that is what the settings ask for."""
    on_policy = settings.logprob_cfg == "guided" or settings.cfg_scale == 1
    allowed = 0.05 if device.type == "cuda" else 1e-3
    if on_policy and metrics["mismatch_mean"] > allowed:
        warnings.warn(
            "the ratio should be 1 on the first pass over a rollout, but sampler and learner "
            f"differ by {metrics['mismatch_mean']:.4f} nats a token on average "
            f"(largest {metrics['mismatch']:.4f})")


def configuration(settings, script):
    """What config.json holds."""
    values = dataclasses.asdict(settings) | {"resume": ""}
    return {"script": script, "settings": values, "torch": torch.__version__, "argrpo": version()}


def version():
    """This repository's commit, or "unknown" outside a checkout."""
    if shutil.which("git") is None:
        return "unknown"
    answer = subprocess.run(["git", "describe", "--always", "--dirty"],
                            cwd=Path(__file__).parent, capture_output=True, text=True)
    return answer.stdout.strip() or "unknown"
