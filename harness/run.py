"""A run: evaluates the model, trains it with `argrpo.train`, and evaluates it again.

A training script chooses models, prompts and rewards, and calls `run`, which leaves in the run's
folder: config.json, metrics.jsonl, summary.json, report.html with what it is made from (report.npz
and the folder progress), progress.gif, before_after.png, curves.png, last.pt (for --resume) and
model.pt (the result, in LlamaGen's format).
"""

import dataclasses
import os
import shutil
import subprocess
import sys
import time
import warnings
from contextlib import closing
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from tqdm import tqdm

import argrpo
from diversity import DiversityBonus, Rehearsal, group_diversity
from harness import doctor, processes
from harness.before_after import describe, diversity_kept, evaluate_all, known_mean
from harness.checkpoints import Record, save_weights, write_json
from harness.choices import build_features
from harness.device import (
    Sampler,
    Stopwatch,
    allowed_mismatch,
    checkpoint_layers,
    choose_sizes,
    frozen_copy,
    memory_estimate,
    optimizer_of_device,
    out_of_memory_advice,
    packed,
    print_memory,
)
from harness.gallery import Progress, gallery_arrays, mind_arrays, write_arrays
from harness.options import images_of, one_line_errors
from harness.page import show
from harness.processes import Interrupted, OtherProcessFailed, StopRequest, failing_together
from harness.selftest import selftest
from reward import BadReward


def run(model, vq, prompts, eval_prompts, reward_fn, settings, watched):
    """Trains `model` on `prompts`, and shows in the folder settings.out what that did to pictures
    of `eval_prompts`.

    reward_fn is a RewardSet, and watched is `before_after.Watched`.  Returns the summary.

    After Ctrl-C it exits with status 130 (143 after SIGTERM); after a bad reward, a number that is
    not finite or a full disk with status 1: with everything saved, and a line that says how to go
    on.  With settings.selftest it exits after `selftest`, with status 0 if all is well, else 1."""
    with StopRequest() as stop, out_of_memory_advice(settings):
        try:
            with one_line_errors():
                features = None
                if settings.diversity_bonus:
                    device = next(model.parameters()).device
                    features = build_features(settings.bonus_features, vq, device)
                choose_sizes(model, vq, settings)
            if settings.selftest:
                sys.exit(selftest(model, vq, prompts, reward_fn, settings))
            return before_training_and_after(model, vq, prompts, eval_prompts, reward_fn, settings,
                                             watched, features, stop)
        except Interrupted:
            sys.exit(128 + stop.received)
        except (BadReward, FloatingPointError, OSError, ImportError, OtherProcessFailed) as error:
            print(f"error: {error}", file=sys.stderr)
            sys.exit(1)


def before_training_and_after(model, vq, prompts, eval_prompts, reward_fn, settings, watched,
                              features, stop):
    """What `run` does, without its answers to errors.  features are those of the bonus."""
    out, device = Path(settings.out), next(model.parameters()).device
    rank, size = processes.rank_and_size()
    sampler, started = Sampler(settings.compile), time.perf_counter()

    # 1. Before.  One process evaluates and writes; the others wait for it.
    with failing_together():
        if rank == 0:
            print_sizes(model, vq, prompts, settings)
            before, gallery_before, spread = evaluate_all(
                sampler(model), vq, eval_prompts, reward_fn, settings, watched, stop)
            watched = watched._replace(base_spread=watched.base_spread or spread)
            print("before: " + describe(before), flush=True)
            # Model and rewards have shown that they work: only now the folder becomes a run's.
            out.mkdir(parents=True, exist_ok=True)
            config = configuration(settings, device)
            write_json(out / "config.json", config)
            write_arrays(out / "report.npz", gallery_arrays(gallery_before, "before"))
            progress = Progress(vq, eval_prompts, reward_fn, settings, watched.measure,
                                out / "progress", started)
            logs = Logs(settings, config)
            logs.numbers(0, {f"evaluation/{name}": value for name, value in before.items()})
    processes.wait_for_all()
    evaluated = time.perf_counter()

    # 2. Training, from the last checkpoint on if the run is resumed.
    with failing_together():
        reference, optimizer = frozen_copy(model), optimizer_of_device(model, settings)
        if settings.checkpointing:
            checkpoint_layers(model)
        seams, remembered = diverse_recipe(reference, vq, prompts, reward_fn, settings, features)
        record = Record(settings, model, optimizer, remembered, writer=rank == 0)
        first_step, warning, stopwatch = record.done, "", Stopwatch(model)
        steps = argrpo.train(model, reference, vq, prompts, stopwatch.timed(reward_fn), settings,
                             optimizer, first_step, sampler=sampler, shard=(rank, size),
                             sync=processes.average_gradients, **seams)
        quiet = {"disable": True} if rank > 0 else {}            # else TQDM_DISABLE may say it
        with closing(record), closing(steps), tqdm(
                initial=first_step, total=settings.steps, desc="GRPO", unit="step", **quiet) as bar:
            while True:
                if rank == 0 and progress.is_due(record.done):
                    path = progress.draw(sampler(model), record.done)
                    logs.picture(record.done, "progress", path)
                if record.done == settings.steps or stop.everywhere():
                    break
                stopwatch.start()
                step = next(steps)
                metrics = measured(step, stopwatch.seconds(), settings, watched)
                metrics["lr"] = optimizer.param_groups[0]["lr"]
                if record.done == first_step:
                    warn_of_mismatch(step.metrics, settings, device)
                record.add(metrics)
                if rank == 0:
                    logs.numbers(metrics["step"], metrics)
                if rank == 0 and not warning:    # once a run
                    warning = doctor.early_warning(record.metrics)
                    if warning:
                        bar.write(f"step {record.done}: {warning}", file=sys.stderr)
                bar.set_postfix({name: f"{metrics[name]:.4f}"
                                 for name in ("reward", "kl", "entropy")})
                bar.update()
    if stop.everywhere():
        if rank == 0:
            show(out)
        raise Interrupted
    trained = time.perf_counter()
    if rank > 0:
        return None

    # 3. After.
    save_weights(out / "model.pt", model)
    after, gallery_after, _ = evaluate_all(
        sampler(model), vq, eval_prompts, reward_fn, settings, watched, stop)
    seconds = {"evaluation": evaluated - started + time.perf_counter() - trained,
               "training": sum(m["seconds"] for m in record.metrics), "progress": progress.spent}
    summary = {"before": before, "after": after, "seconds": seconds}
    write_json(out / "summary.json", summary)
    minds = mind_arrays(reference, model, vq, eval_prompts, gallery_before, gallery_after, settings)
    draw(out, gallery_before, gallery_after, minds)
    logs.numbers(settings.steps, {f"evaluation/{name}": value for name, value in after.items()})
    logs.picture(settings.steps, "before_after", out / "before_after.png")
    logs.close()
    print("before: " + describe(before) + "\nafter:  " + describe(after))
    known = config["settings"] | {"device": str(device)}
    print(*doctor.report(record.metrics, known, summary), sep="\n")
    print(f"look at {out}/report.html, or {out}/before_after.png and {out}/curves.png")
    return summary


def print_sizes(model, vq, prompts, settings):
    s, size = settings, processes.rank_and_size()[1]
    parameters = sum(p.numel() for p in model.parameters())
    others = f" and {size - 1} more" if size > 1 else ""
    print(f"{parameters / 1e6:.1f}M parameters, {model.config.block_size} tokens per image, "
          f"{s.prompts_per_step} prompts x {s.group_size} samples = "
          f"{s.prompts_per_step * s.group_size} images per step, "
          f"{s.rollout_prompts or 'all'} prompts at a time in the rollout and "
          f"{s.micro_batch} images in the update, {s.steps} steps, "
          f"on {next(model.parameters()).device}{others}, into {s.out}/", flush=True)
    if s.recipe == "diverse" and not s.resume:
        usual = images_of(type(s)(**s.presets[s.preset]))
        remembered = len(set(prompts.texts)) * s.rehearsal_groups * s.group_size
        print(f"recipe {s.recipe}: {images_of(s)} images in all, {images_of(s) / usual:.1f} times "
              f"as many as --recipe paper, and once {remembered} of the pretrained model, or fewer")
    print_memory(memory_estimate(model, vq, s))


def diverse_recipe(reference, vq, prompts, reward_fn, settings, features):
    """What the settings add to the paper's method: seams of `argrpo.train` (none with --recipe
    paper), and what they remember, {name: {text: ...}}, for the checkpoints."""
    rehearsal = Rehearsal(packed(reference), vq, prompts, reward_fn, settings,
                          settings.rehearsal, settings.rehearsal_groups, features)
    bonus = DiversityBonus(rehearsal, settings.diversity_bonus, processes.gather)
    seams = {}
    if settings.rehearsal:
        seams["extra_loss"] = rehearsal
    if settings.diversity_bonus:
        seams["advantage_fn"] = bonus
    return seams, {"rehearsal": rehearsal.remembered, "features": rehearsal.described,
                   "recent": bonus.recent}


def measured(step, seconds, settings, watched):
    """The step's metrics and seconds, averaged over all processes, and its images' diversity.

    Every fifth step also has what is measured and not trained on, and, of a process alone, D as
    it falls: rough, from the step's few images of a prompt."""
    metrics = step.metrics | seconds
    metrics["diversity"] = group_diversity(step.images, settings.group_size).mean().item()
    if metrics["step"] % 5 == 0:
        scores = watched.measure(step.images, step.texts)
        metrics |= {name: known_mean(score) for name, score in scores.items()}
        if watched.spread is not None and processes.rank_and_size()[1] == 1:
            spread = watched.spread(step.images, step.texts)
            metrics |= diversity_kept(watched.base_spread, spread)
    return processes.average_over_processes(metrics, ("step", "ratio_max", "mismatch"))


def warn_of_mismatch(metrics, settings, device):
    """Warns if what draws the images computes another distribution than what is trained.

    With log-probabilities without guidance, that is what the settings ask for."""
    on_policy = settings.logprob_cfg == "guided" or settings.cfg_scale == 1
    if on_policy and metrics["mismatch_mean"] > allowed_mismatch(device, settings.cfg_scale):
        warnings.warn(
            "the ratio should be 1 on the first pass over a rollout, but sampler and learner "
            f"differ by {metrics['mismatch_mean']:.4f} nats a token on average "
            f"(largest {metrics['mismatch']:.4f})")


def draw(out, before, after, minds):
    """The pictures of a finished run, and its page: before and after are galleries."""
    write_arrays(out / "report.npz", gallery_arrays(before, "before")
                 | gallery_arrays(after, "after") | minds)
    show(out)


def configuration(settings, device=""):
    """What config.json holds."""
    values = dataclasses.asdict(settings) | {"resume": ""}
    given = {name: value for name, value in settings.given.items() if name != "resume"}
    return {"script": settings.script, "settings": values, "given": given, "device": str(device),
            "folder": os.getcwd(), "torch": torch.__version__, "argrpo": version()}


def version():
    """This repository's commit, or "unknown" outside a checkout."""
    if shutil.which("git") is None:
        return "unknown"
    answer = subprocess.run(["git", "describe", "--always", "--dirty"],
                            cwd=Path(__file__).parent, capture_output=True, text=True)
    return answer.stdout.strip() or "unknown"


class Logs:
    """What the setting `log` names, besides the run's own files.  Both packages are optional.

    "tensorboard" writes event files into the run's folder: tensorboard --logdir RUN.  "wandb" is a
    run of Weights & Biases.  Its project is argrpo, unless WANDB_PROJECT says another; with
    WANDB_MODE=offline it lies in the run's folder until `wandb sync` sends it."""

    def __init__(self, settings, config):
        self.board = self.wandb = None
        if "tensorboard" in settings.log:
            from torch.utils.tensorboard import SummaryWriter
            self.board = SummaryWriter(settings.out)
        if "wandb" in settings.log:
            import wandb
            self.wandb = wandb
            wandb.init(project=os.environ.get("WANDB_PROJECT", "argrpo"), dir=settings.out,
                       name=Path(settings.out).name, config=config)

    def numbers(self, step, metrics):
        """The metrics of a step that are known, under their names."""
        known = {name: value for name, value in metrics.items() if value is not None}
        if self.board:
            for name, value in known.items():
                self.board.add_scalar(name, value, step)
        if self.wandb:
            self.wandb.log(known, step=step)

    def picture(self, step, name, path):
        if self.board:
            pixels = np.array(Image.open(path).convert("RGB"))
            self.board.add_image(name, pixels, step, dataformats="HWC")
        if self.wandb:
            self.wandb.log({name: self.wandb.Image(str(path))}, step=step)

    def close(self):
        if self.board:
            self.board.close()
        if self.wandb:
            self.wandb.finish()
