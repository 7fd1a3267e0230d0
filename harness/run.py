"""A run: evaluates the model, trains it with `argrpo.train`, and evaluates it again.

A training script chooses models, prompts and rewards, and calls `run`, which leaves in the run's
folder: config.json, metrics.jsonl, summary.json, report.html with what it is made from (report.npz
and the folder progress), progress.gif, before_after.png, curves.png, last.pt (for --resume) and
model.pt (the result, in LlamaGen's format).
"""

import dataclasses
import json
import os
import shutil
import subprocess
import sys
import time
from contextlib import ExitStack, closing, contextmanager
from pathlib import Path

import torch
from tqdm import tqdm

import argrpo
from diversity import DiversityBonus, Rehearsal, group_diversity
from harness import doctor, processes
from harness.before_after import describe, diversity_kept, evaluate_all, known_mean
from harness.checkpoints import Record, locked, save_weights
from harness.choices import build_features
from harness.compare import digest
from harness.device import (
    Sampler,
    Stopwatch,
    checkpoint_layers,
    choose_sizes,
    describe_dtype,
    frozen_copy,
    optimizer_of_device,
    out_of_memory_advice,
    packed,
)
from harness.gallery import Progress, gallery_arrays, mind_arrays, write_arrays
from harness.logs import Logs, one_line_errors, say, write_json
from harness.options import check_new
from harness.page import show
from harness.selftest import selftest
from reward import BadReward

# What may end a run that has begun, with one line.
FAILURES = (BadReward, FloatingPointError, OSError, ImportError, processes.OtherProcessFailed)


def run(settings, load):
    """Trains a model, and shows in the folder settings.out what that did to its pictures.

    load(settings, device) gives the model and the tokenizer, on the CPU, the prompts to train on
    and those to evaluate on, the RewardSet, and `before_after.Watched`.  When it is called, the
    folder is locked: no other run enters it.  Returns the summary.

    What is wrong before any work ends it with status 2.  After Ctrl-C it exits with status 130 (143
    after SIGTERM); after a bad reward, a number that is not finite or a full disk with status 1:
    with everything saved, and a line that says how to go on.  With settings.selftest it exits after
    `selftest`, with status 0 if all is well, else 1."""
    with one_line_errors(1, FAILURES), out_of_memory_advice(settings):
        with one_line_errors():
            device = processes.pick_device(settings.device)
        with own_folder(settings) as record:
            with one_line_errors(), processes.failing_together():
                parts = load(settings, device)
                model, vq, prompts, _, reward_fn, _ = parts
                model.to(device)                 # first now, when T5 has left the memory
                vq.to(device)
                features = None
                if settings.diversity_bonus:
                    features = build_features(settings.bonus_features, device)
                if settings.checkpointing:
                    checkpoint_layers(model)
                choose_sizes(model, vq, prompts, settings)
                config = configuration(settings, device, digests_of(model, vq, prompts))
                if settings.resume:
                    check_unchanged(settings.out, config)
                logs = Logs(settings, config, record.done, record.writer)
            with closing(logs), processes.StopRequest() as stop:
                if settings.selftest:
                    sys.exit(selftest(model, vq, prompts, reward_fn, settings))
                try:
                    return before_training_and_after(parts, settings, features, config, record,
                                                     logs, stop)
                except processes.Interrupted:
                    sys.exit(128 + stop.received)


@contextmanager
def own_folder(settings):
    """Keeps the run's folder for this run, with all its processes, and yields its Record.

    A new run that ends before a step is over or anything is saved leaves the folder as it was, but
    for weights that --from-scratch has made: the corrected command may use it."""
    out = Path(settings.out)                     # the self-test leaves nothing
    owner = processes.rank_and_size()[0] == 0 and not settings.selftest
    with ExitStack() as stack:
        with one_line_errors(), processes.failing_together():
            if owner:
                stack.enter_context(locked(out))
                if not settings.resume:
                    check_new(settings)
        processes.wait_for_all()
        with one_line_errors(kinds=ValueError), processes.failing_together():
            record = Record(settings, writer=owner)
        try:
            yield record
        finally:
            if owner and not settings.resume and record.done == 0 and record.saved is None:
                for path in set(out.glob("[!.]*")) - {out / "weights"}:
                    shutil.rmtree(path) if path.is_dir() else path.unlink()


def before_training_and_after(parts, settings, features, config, record, logs, stop):
    """What `run` does in its folder, without its answers to errors.

    parts are `load`'s, features the bonus's, and config is what config.json holds."""
    model, vq, prompts, eval_prompts, reward_fn, watched = parts
    out, known = Path(settings.out), config["settings"] | {"device": config["device"]}
    (rank, size), first_step = processes.rank_and_size(), record.done
    sampler, started, attempt = Sampler(settings.compile), time.perf_counter(), logs.attempt

    # 1. Before.  One process evaluates and writes; the others wait for it.
    with processes.failing_together():
        if rank == 0:
            print_sizes(model, settings)
            before, gallery_before, spread = evaluate_all(
                sampler(model), vq, eval_prompts, reward_fn, settings, watched, stop)
            watched = watched._replace(base_spread=watched.base_spread or spread)
            say("before: " + describe(before))
            # Model and rewards have shown that they work: only now the folder becomes a run's.
            write_json(out / "config.json", config)
            write_arrays(out / "report.npz", gallery_arrays(gallery_before, "before"))
            progress = Progress(vq, eval_prompts, reward_fn, settings, watched.measure,
                                out / "progress", started)
            logs.numbers(0, {"evaluation": before})
    processes.wait_for_all()
    evaluated = time.perf_counter()

    # 2. Training, from the last checkpoint on if the run is resumed.
    with processes.failing_together():
        reference, optimizer = frozen_copy(model), optimizer_of_device(model, settings)
        seams, remembered = diverse_recipe(reference, vq, prompts, reward_fn, settings, features)
        record.restore(model, optimizer, remembered)
        quiet = {"disable": True} if rank > 0 else {}            # else TQDM_DISABLE may say it
        if settings.rehearsal and settings.rehearsal_steps and record.start is None:
            alone = seams["extra_loss"].alone(
                model, optimizer, settings.rehearsal_steps, settings.rehearsal_lr_factor,
                (rank, size), processes.average_gradients)
            for _ in tqdm(alone, "draw, rehearse", settings.rehearsal_steps, unit="step", **quiet):
                if stop.everywhere():
                    break
            else:
                record.save()
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
                record.add(metrics)
                logs.numbers(metrics["step"], metrics)
                if rank == 0 and not warning:    # once a run
                    warning = attempt("the doctor", doctor.early_warning, record.metrics, known)
                    if warning:
                        bar.write(f"step {record.done}: {warning}", file=sys.stderr)
                bar.set_postfix({name: f"{metrics[name]:.4f}"
                                 for name in ("reward", "kl", "entropy")})
                bar.update()
    if stop.everywhere():
        if rank == 0:
            show(out, attempt)
        raise processes.Interrupted
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
    arrays = gallery_arrays(gallery_before, "before") | gallery_arrays(gallery_after, "after")
    attempt("report.npz", write_arrays, out / "report.npz", arrays | (minds or {}))
    show(out, attempt)
    logs.numbers(settings.steps, {"evaluation": after})
    logs.picture(settings.steps, "before_after", out / "before_after.png")
    say("before: " + describe(before), "after:  " + describe(after))
    findings = attempt("the doctor", doctor.report, record.metrics, known, summary)
    say(*(findings or ()),
        f"look at {out}/report.html, or {out}/before_after.png and {out}/curves.png")
    return summary


def print_sizes(model, settings):
    s, size = settings, processes.rank_and_size()[1]
    parameters = sum(p.numel() for p in model.parameters())
    images = s.prompts_per_step * s.group_size
    others = f" and {size - 1} more" if size > 1 else ""
    say(f"{parameters / 1e6:.1f}M parameters, {model.config.block_size} tokens per image, "
        f"{s.prompts_per_step} prompts x {s.group_size} samples = {images} images per step, "
        f"{s.rollout_prompts or 'all'} prompts at a time in the rollout and "
        f"{s.micro_batch} images in the update, {s.steps} steps, {s.steps * images} images in all, "
        f"on {next(model.parameters()).device}{others}, into {s.out}/")
    say(describe_dtype(next(model.parameters()).device))


def diverse_recipe(reference, vq, prompts, reward_fn, settings, features):
    """What the settings add to the paper's method: seams of `argrpo.train`, None with --recipe
    paper, and what they remember, {name: {text: ...}}, for the checkpoints."""
    rehearsal = Rehearsal(packed(reference), vq, prompts, reward_fn, settings,
                          settings.rehearsal, settings.rehearsal_groups, features)
    bonus = DiversityBonus(rehearsal, settings.diversity_bonus, processes.gather)
    seams = {"extra_loss": rehearsal if settings.rehearsal else None,
             "advantage_fn": bonus if settings.diversity_bonus else None}
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


def digests_of(model, vq, prompts):
    """A few letters each that tell what a run starts from."""
    return {"transformer": digest(*model.state_dict().values()),
            "tokenizer": digest(*vq.state_dict().values()), "prompts": digest(prompts.texts)}


def check_unchanged(out, config):
    """Raises ValueError if a run's files have changed since it began: it would go on from another
    reference or with other prompts."""
    path = Path(out) / "config.json"
    before = json.loads(path.read_text(encoding="utf-8")).get("digests", config["digests"])
    changed = [name for name, value in config["digests"].items() if before[name] != value]
    if changed:
        raise ValueError(f"{out} began with another {' and another '.join(changed)}: put back the "
                         "files that its options name, or begin a new run")


def configuration(settings, device="", digests=None):
    """What config.json holds."""
    values = dataclasses.asdict(settings) | {"resume": ""}
    given = {name: value for name, value in settings.given.items() if name != "resume"}
    return {"script": settings.script, "settings": values, "given": given, "device": str(device),
            "digests": digests, "folder": os.getcwd(), "torch": torch.__version__,
            "argrpo": version()}


def version():
    """This repository's commit, or "unknown" outside a checkout of its own."""
    root = Path(argrpo.__file__).resolve().parent
    if shutil.which("git") is None or not (root / ".git").exists():
        return "unknown"
    answer = subprocess.run(["git", f"--git-dir={root / '.git'}", "describe", "--always",
                             "--dirty"], cwd=root, capture_output=True, text=True)
    return answer.stdout.strip() or "unknown"
