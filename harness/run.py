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
from contextlib import closing, contextmanager, suppress
from pathlib import Path

import torch
from tqdm import tqdm

import argrpo
from diversity import DiversityBonus, Rehearsal, group_diversity
from harness import doctor, processes
from harness.before_after import describe, diversity_kept, evaluate_all, known_mean
from harness.checkpoints import FolderLock, Record, save_weights, write_json
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
from harness.logs import Logs
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
            with own_folder(settings, next(model.parameters()).device) as (record, logs):
                return before_training_and_after(model, vq, prompts, eval_prompts, reward_fn,
                                                 settings, watched, features, record, logs, stop)
        except Interrupted:
            sys.exit(128 + stop.received)
        except (BadReward, FloatingPointError, OSError, ImportError, OtherProcessFailed) as error:
            print(f"error: {error}", file=sys.stderr)
            sys.exit(1)


@contextmanager
def own_folder(settings, device):
    """Keeps the run's folder for this run, with all its processes, and yields its Record and Logs.

    What may refuse does so here, before any work, with exit status 2.  A new run that ends before
    its first step is over leaves the folder as it was: the corrected command may use it."""
    out, first, record = Path(settings.out), processes.rank_and_size()[0] == 0, None
    with one_line_errors(), failing_together():
        if first:
            made = not out.exists()
            lock = FolderLock(out)
            before = list(out.iterdir())
    try:
        processes.wait_for_all()
        with failing_together():
            record = Record(settings, writer=first)
        with one_line_errors(), failing_together():
            if not settings.resume and (out / "config.json").exists():
                raise FileExistsError(f"{out} holds a run that has just begun: take another "
                                      "folder with --out NAME")
            if record.done > settings.steps:
                raise ValueError(f"{out} has done {record.done} steps already: --steps must be at "
                                 f"least {record.done}, not {settings.steps}")
            logs = Logs(settings, configuration(settings, device), record.done, first)
        processes.wait_for_all()
        with closing(logs):
            yield record, logs
    finally:
        if first:
            unfinished = not settings.resume and (record is None or record.done == 0)
            for path in set(out.iterdir()).difference(before) if unfinished else ():
                shutil.rmtree(path) if path.is_dir() else path.unlink()
            lock.release()
            if unfinished and made:
                with suppress(OSError):          # another run has come
                    out.rmdir()


def before_training_and_after(model, vq, prompts, eval_prompts, reward_fn, settings, watched,
                              features, record, logs, stop):
    """What `run` does in its folder, without its answers to errors.  features are the bonus's."""
    out, device = Path(settings.out), next(model.parameters()).device
    rank, size = processes.rank_and_size()
    sampler, started, attempt = Sampler(settings.compile), time.perf_counter(), logs.attempt
    config, first_step = configuration(settings, device), record.done

    # 1. Before.  One process evaluates and writes; the others wait for it.
    with failing_together():
        if rank == 0:
            print_sizes(model, vq, prompts, settings)
            before, gallery_before, spread = evaluate_all(
                sampler(model), vq, eval_prompts, reward_fn, settings, watched, stop)
            watched = watched._replace(base_spread=watched.base_spread or spread)
            print("before: " + describe(before), flush=True)
            # Model and rewards have shown that they work: only now the folder becomes a run's.
            write_json(out / "config.json", config)
            write_arrays(out / "report.npz", gallery_arrays(gallery_before, "before"))
            progress = Progress(vq, eval_prompts, reward_fn, settings, watched.measure,
                                out / "progress", started)
            logs.numbers(0, {"evaluation": before})
    processes.wait_for_all()
    evaluated = time.perf_counter()

    # 2. Training, from the last checkpoint on if the run is resumed.
    with failing_together():
        reference, optimizer = frozen_copy(model), optimizer_of_device(model, settings)
        if settings.checkpointing:
            checkpoint_layers(model)
        seams, remembered = diverse_recipe(reference, vq, prompts, reward_fn, settings, features)
        record.restore(model, optimizer, remembered)
        quiet = {"disable": True} if rank > 0 else {}            # else TQDM_DISABLE may say it
        if settings.rehearsal and settings.rehearsal_steps and first_step == 0:
            alone = seams["extra_loss"].alone(model, optimizer, settings.rehearsal_steps,
                                              (rank, size), processes.average_gradients)
            for _ in tqdm(alone, "rehearsal", settings.rehearsal_steps, unit="step", **quiet):
                if stop.everywhere():
                    break
        warning, stopwatch = "", Stopwatch(model)
        steps = argrpo.train(model, reference, vq, prompts, stopwatch.timed(reward_fn), settings,
                             optimizer, first_step, sampler=sampler, shard=(rank, size),
                             sync=processes.average_gradients, **seams)
        with closing(record), closing(steps), tqdm(
                initial=first_step, total=settings.steps, desc="GRPO", unit="step", **quiet) as bar:
            while True:
                if rank == 0 and progress.is_due(record.done):
                    path = attempt("the picture of progress", progress.draw, sampler(model),
                                   record.done)
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
                logs.numbers(metrics["step"], metrics)
                if rank == 0 and not warning:    # once a run
                    warning = attempt("the doctor", doctor.early_warning, record.metrics)
                    if warning:
                        bar.write(f"step {record.done}: {warning}", file=sys.stderr)
                bar.set_postfix({name: f"{metrics[name]:.4f}"
                                 for name in ("reward", "kl", "entropy")})
                bar.update()
    if stop.everywhere():
        if rank == 0:
            show(out, attempt)
        raise Interrupted
    trained = time.perf_counter()
    if rank > 0:
        return None

    # 3. After.  First what cannot be had again, then what shows it.
    save_weights(out / "model.pt", model)
    after, gallery_after, _ = evaluate_all(
        sampler(model), vq, eval_prompts, reward_fn, settings, watched, stop)
    seconds = {"evaluation": evaluated - started + time.perf_counter() - trained,
               "training": sum(m["seconds"] for m in record.metrics), "progress": progress.spent}
    summary = {"before": before, "after": after, "seconds": seconds}
    write_json(out / "summary.json", summary)
    minds = attempt("the closer look", mind_arrays, reference, model, vq, eval_prompts,
                    gallery_before, gallery_after, settings)
    draw(attempt, out, gallery_before, gallery_after, minds or {})
    logs.numbers(settings.steps, {"evaluation": after})
    logs.picture(settings.steps, "before_after", out / "before_after.png")
    print("before: " + describe(before) + "\nafter:  " + describe(after))
    known = config["settings"] | {"device": str(device)}
    findings = attempt("the doctor", doctor.report, record.metrics, known, summary)
    print(*(findings or ()), sep="\n")
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
    if s.recipe != "paper" and not s.resume:
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
    scores = {"reward": step.rewards, **{f"reward/{k}": part for k, part in step.parts.items()}}
    if metrics["step"] % 5 == 0:
        measures = watched.measure(step.images, step.texts)
        metrics |= {name: known_mean(score) for name, score in measures.items()}
        scores |= measures
        if watched.spread is not None and processes.rank_and_size()[1] == 1:
            spread = watched.spread(step.images, step.texts)
            metrics |= diversity_kept(watched.base_spread, spread)
    known = {name: int((~score.isnan()).sum()) for name, score in scores.items()}
    return processes.average_over_processes(metrics, ("step", "ratio_max", "mismatch"), known)


def warn_of_mismatch(metrics, settings, device):
    """Warns if what draws the images computes another distribution than what is trained.

    With log-probabilities without guidance, that is what the settings ask for."""
    on_policy = settings.logprob_cfg == "guided" or settings.cfg_scale == 1
    if on_policy and metrics["mismatch_mean"] > allowed_mismatch(device, settings.cfg_scale):
        warnings.warn(
            "the ratio should be 1 on the first pass over a rollout, but sampler and learner "
            f"differ by {metrics['mismatch_mean']:.4f} nats a token on average "
            f"(largest {metrics['mismatch']:.4f})")


def draw(attempt, out, before, after, minds):
    """The pictures of a finished run, and its page: before and after are galleries."""
    arrays = gallery_arrays(before, "before") | gallery_arrays(after, "after") | minds
    attempt("report.npz", write_arrays, out / "report.npz", arrays)
    show(out, attempt)


def configuration(settings, device=""):
    """What config.json holds."""
    values = dataclasses.asdict(settings) | {"resume": ""}
    given = {name: value for name, value in settings.given.items() if name != "resume"}
    return {"script": settings.script, "settings": values, "given": given, "device": str(device),
            "folder": os.getcwd(), "torch": torch.__version__, "argrpo": version()}


def version():
    """This repository's commit, or "unknown" outside a checkout of its own."""
    root = Path(argrpo.__file__).resolve().parent
    if shutil.which("git") is None or not (root / ".git").exists():
        return "unknown"
    answer = subprocess.run(["git", f"--git-dir={root / '.git'}", "describe", "--always",
                             "--dirty"], cwd=root, capture_output=True, text=True)
    return answer.stdout.strip() or "unknown"
