"""A run: evaluates the model, trains it with `argrpo.train`, and evaluates it again.

A training script chooses models, prompts and rewards, and calls `run`, which leaves in the run's
folder: config.json, metrics.jsonl, summary.json, report.html with what it is made from (report.npz
and the folder progress), progress.gif, before_after.png, curves.png, last.pt (for --resume) and
model.pt (the result, in LlamaGen's format).
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
from harness import doctor, memory, processes
from harness.checkpoints import Record, save_weights, write_json
from harness.curves import draw_curves
from harness.evaluation import describe, diversity_kept, evaluate_all, evaluate_spread, known_mean
from harness.gallery import (
    Progress,
    draw_before_after,
    gallery_arrays,
    mind_arrays,
    write_animation,
    write_arrays,
)
from harness.interrupts import Interrupted, StopRequest
from harness.logs import Logs
from harness.models import build_features
from harness.options import images_of, one_line_errors
from harness.processes import OtherProcessFailed
from harness.selftest import selftest
from harness.speed import Sampler, allowed_mismatch, frozen_copy, make_optimizer, packed
from harness.timing import Stopwatch


def run(model, vq, prompts, eval_prompts, reward_fn, settings, script, measure=None, spread=None,
        base_spread=None):
    """Trains `model` on `prompts`, and shows in the folder settings.out what that did to pictures
    of `eval_prompts`.

    reward_fn is a RewardSet.  What measure(images, texts) gives, and how much of
    spread(images, texts) is kept, is reported but never trained on; base_spread is the pretrained
    model's, if it is known already.  Returns the summary.  After Ctrl-C it exits with status 130
    (143 after SIGTERM); after a bad reward, a number that is not finite or a full disk with
    status 1: with everything saved, and a line that says how to go on.  With settings.selftest it
    exits after `selftest`, with status 0 if all is well, else 1."""
    with StopRequest() as stop, memory.out_of_memory_advice(settings):
        try:
            with one_line_errors():
                this = Run(model, vq, prompts, eval_prompts, reward_fn, settings, script, measure,
                           spread, stop, base_spread)
            if settings.selftest:
                sys.exit(selftest(model, vq, prompts, reward_fn, settings))
            return this.before_training_and_after()
        except Interrupted:
            sys.exit(128 + stop.received)
        except (reward.BadReward, FloatingPointError, OSError, ImportError,
                OtherProcessFailed) as error:
            print(f"error: {error}", file=sys.stderr)
            sys.exit(1)


class Run:
    """What `run` does, without its answers to errors."""

    def __init__(self, model, vq, prompts, eval_prompts, reward_fn, settings, script, measure,
                 spread, stop, base_spread=None):
        self.model, self.vq, self.prompts, self.eval_prompts = model, vq, prompts, eval_prompts
        self.reward_fn, self.settings, self.script = reward_fn, settings, script
        self.measure, self.spread, self.stop = measure, spread, stop
        self.out, self.device = Path(settings.out), next(model.parameters()).device
        self.rank, self.size = processes.rank_and_size()
        self.sampler = Sampler(settings.compile)
        self.spread_before, self.warned = base_spread or {}, False
        self.features = None
        if settings.diversity_bonus:
            self.features = build_features(settings.bonus_features, vq, self.device)
        memory.choose_sizes(model, vq, settings)

    def before_training_and_after(self):
        """One process evaluates and writes; the others wait for it."""
        settings, out = self.settings, self.out
        started = time.perf_counter()
        progress = logs = None
        with processes.failing_together():
            if self.rank == 0:
                self.print_sizes()
                before, gallery_before = self.evaluate()
                print("before: " + describe(before), flush=True)
                # Model and rewards have shown that they work: only now the folder becomes a run's.
                out.mkdir(parents=True, exist_ok=True)
                config = configuration(settings, self.script, self.device)
                write_json(out / "config.json", config)
                write_arrays(out / "report.npz", gallery_arrays(gallery_before, "before"))
                progress = Progress(self.vq, self.eval_prompts, self.reward_fn, settings,
                                    self.measure, out / "progress", started)
                logs = Logs(settings, config)
                logs.numbers(0, {f"evaluation/{name}": value for name, value in before.items()})
        processes.wait_for_all()
        evaluated = time.perf_counter()

        metrics = self.train(progress, logs)
        if self.stop.everywhere():
            if self.rank == 0:
                self.write_page()
            raise Interrupted
        trained = time.perf_counter()
        if self.rank > 0:
            return None

        save_weights(out / "model.pt", self.model)
        after, gallery_after = self.evaluate()
        seconds = {"evaluation": evaluated - started + time.perf_counter() - trained,
                   "training": sum(m["seconds"] for m in metrics), "progress": progress.spent}
        summary = {"before": before, "after": after, "seconds": seconds}
        write_json(out / "summary.json", summary)
        self.draw(gallery_before, gallery_after, metrics)
        logs.numbers(settings.steps, {f"evaluation/{name}": x for name, x in after.items()})
        logs.picture(settings.steps, "before_after", out / "before_after.png")
        logs.close()
        print("before: " + describe(before) + "\nafter:  " + describe(after))
        known = config["settings"] | {"device": str(self.device)}
        print(*doctor.report(metrics, known, summary), sep="\n")
        print(f"look at {out}/report.html, or {out}/before_after.png and {out}/curves.png")
        return summary

    def draw(self, before, after, metrics):
        """Leaves the pictures of a finished run, and its page, from the galleries."""
        out = self.out
        draw_before_after(out / "before_after.png", before, after)
        draw_curves(out / "curves.png", metrics)
        arrays = gallery_arrays(before, "before") | gallery_arrays(after, "after")
        arrays |= mind_arrays(self.reference, self.model, self.vq, self.eval_prompts, before, after,
                              self.settings)
        write_arrays(out / "report.npz", arrays)
        self.write_page()

    def write_page(self):
        """progress.gif and report.html, from what is in the folder."""
        from harness.page import write_page  # with jinja2, which a run needs late
        write_animation(self.out / "progress", self.out / "progress.gif")
        write_page([self.out], self.out / "report.html")

    def print_sizes(self):
        s, model = self.settings, self.model
        parameters = sum(p.numel() for p in model.parameters())
        others = f" and {self.size - 1} more" if self.size > 1 else ""
        print(f"{parameters / 1e6:.1f}M parameters, {model.config.block_size} tokens per image, "
              f"{s.prompts_per_step} prompts x {s.group_size} samples = "
              f"{s.prompts_per_step * s.group_size} images per step, "
              f"{s.rollout_prompts or 'all'} prompts at a time in the rollout and "
              f"{s.micro_batch} images in the update, {s.steps} steps, "
              f"on {self.device}{others}, into {s.out}/", flush=True)
        if s.paper_images:
            remembered = len(set(self.prompts.texts)) * s.rehearsal_groups * s.group_size
            print(f"recipe {s.recipe}: {images_of(s)} images in all, "
                  f"{images_of(s) / s.paper_images:.1f} times as many as --recipe paper, and once "
                  f"{remembered} of the pretrained model, or fewer")
        memory.print_memory(memory.memory_estimate(model, self.vq, s))

    def evaluate(self):
        """(scores, gallery) of the model as it is; with D, once the base's spread is known."""
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

    @processes.failing_together()
    def train(self, progress, logs):
        """The loop of `argrpo.train`, logged and saved: the metrics of all steps done so far.

        progress and logs are None in all processes but the first.  It
        continues from the last checkpoint if settings.resume asks for it, and ends early when a
        signal asks for that.  An error in a step is raised after the steps before it are saved."""
        settings, model, vq = self.settings, self.model, self.vq
        reference = self.reference = frozen_copy(model)
        optimizer = make_optimizer(model, settings)
        if settings.checkpointing:
            memory.checkpoint_layers(model)
        seams = {"sampler": self.sampler, "shard": (self.rank, self.size),
                 "sync": processes.average_gradients}
        rehearsal = Rehearsal(packed(reference), vq, self.prompts, self.reward_fn, settings,
                              settings.rehearsal, settings.rehearsal_groups, self.features)
        bonus = DiversityBonus(rehearsal, settings.diversity_bonus, processes.gather)
        if settings.rehearsal:
            seams["extra_loss"] = rehearsal
        if settings.diversity_bonus:
            seams["advantage_fn"] = bonus
        remembered = {"rehearsal": rehearsal.remembered, "features": rehearsal.described,
                      "recent": bonus.recent}
        record = Record(settings, self.script, model, optimizer, remembered, self.rank == 0)
        stopwatch = Stopwatch(model)
        steps = argrpo.train(model, reference, vq, self.prompts, stopwatch.timed(self.reward_fn),
                             settings, optimizer, record.done, **seams)
        try:
            self.follow(steps, record, stopwatch, progress, logs)
        finally:
            steps.close()
            record.close()
        return record.metrics

    def follow(self, steps, record, stopwatch, progress, logs):
        """Makes and records one step after another, until the last or a signal."""
        settings, first_step = self.settings, record.done
        quiet = {"disable": True} if self.rank > 0 else {}       # else TQDM_DISABLE may say it
        with tqdm(initial=first_step, total=settings.steps, desc="GRPO", unit="step",
                  **quiet) as bar:
            self.show(record, progress, logs)
            while record.done < settings.steps and not self.stop.everywhere():
                stopwatch.start()
                step = next(steps)
                metrics = self.watch(step, stopwatch.seconds())
                metrics["lr"] = record.optimizer.param_groups[0]["lr"]
                if record.done == first_step:
                    warn_of_mismatch(step.metrics, settings, self.device)
                record.add(metrics)
                self.show(record, progress, logs)
                warning = doctor.early_warning(record.metrics)
                if warning and self.rank == 0 and not self.warned:
                    self.warned = True
                    bar.write(f"step {record.done}: {warning}", file=sys.stderr)
                bar.set_postfix({name: f"{metrics[name]:.4f}"
                                 for name in ("reward", "kl", "entropy")})
                bar.update()

    def show(self, record, progress, logs):
        """Draws the picture of progress after the steps done so far, if it is time, and logs it
        with the last step's metrics."""
        if progress is None:
            return
        if record.metrics:
            logs.numbers(record.done - 1, record.metrics[-1])
        if progress.is_due(record.done):
            path = progress.draw(self.sampler(self.model), record.done)
            logs.picture(record.done, "progress", path)

    def watch(self, step, seconds):
        """The step's metrics and seconds, averaged over all processes, and its images' diversity.

        Every fifth step also has what is measured and not trained on, and, of a process alone, D as
        it falls: rough, from the step's few images of a prompt."""
        metrics = step.metrics | seconds
        diversity = group_diversity(step.images, self.settings.group_size)           # (P,)
        metrics["diversity"] = diversity.mean().item()
        if self.measure is not None and metrics["step"] % 5 == 0:
            measured = self.measure(step.images, step.texts)
            metrics |= {name: known_mean(scores) for name, scores in measured.items()}
        if self.spread is not None and self.size == 1 and metrics["step"] % 5 == 0:
            spread = self.spread(step.images, step.texts)
            metrics |= diversity_kept(self.spread_before, spread)
        largest = ("step", "ratio_max", "mismatch")
        return processes.average_over_processes(metrics, maximum=largest)


def warn_of_mismatch(metrics, settings, device):
    """Warns if what draws the images computes another distribution than what is trained.

    With log-probabilities without guidance, that is what the settings ask for."""
    on_policy = settings.logprob_cfg == "guided" or settings.cfg_scale == 1
    if on_policy and metrics["mismatch_mean"] > allowed_mismatch(device, settings.cfg_scale):
        warnings.warn(
            "the ratio should be 1 on the first pass over a rollout, but sampler and learner "
            f"differ by {metrics['mismatch_mean']:.4f} nats a token on average "
            f"(largest {metrics['mismatch']:.4f})")


def configuration(settings, script, device=""):
    """What config.json holds."""
    values = dataclasses.asdict(settings) | {"resume": ""}
    given = {name: value for name, value in settings.given.items() if name != "resume"}
    return {"script": script, "settings": values, "given": given, "device": str(device),
            "torch": torch.__version__, "argrpo": version()}


def version():
    """This repository's commit, or "unknown" outside a checkout."""
    if shutil.which("git") is None:
        return "unknown"
    answer = subprocess.run(["git", "describe", "--always", "--dirty"],
                            cwd=Path(__file__).parent, capture_output=True, text=True)
    return answer.stdout.strip() or "unknown"
