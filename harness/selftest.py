"""A minute's trial of the chosen models and rewards, before a long run: `--selftest`.

Each check yields lines (what, whether it is all right, a sentence that says what was found or what
to do).  They work on copies of the model, and leave nothing behind.
"""

import copy
import dataclasses
import sys
import tempfile
import time
from pathlib import Path

import torch

import argrpo
from harness.before_after import draw_like_rollout
from harness.checkpoints import load_checkpoint, save_checkpoint
from harness.device import Sampler, allowed_mismatch, frozen_copy
from rewards import checker

PROMPTS, SAMPLES = 2, 4                          # of the batch that most checks share


def selftest(model, vq, prompts, reward_fn, settings):
    """Prints a line for each check.  Returns the exit status: 0, or 1 if something is wrong."""
    P = min(PROMPTS, len(prompts.texts), settings.prompts_per_step)
    small = dataclasses.replace(settings, micro_batch=min(settings.micro_batch, P * SAMPLES))
    index = argrpo.pick_prompts(len(prompts.texts), 0, P, settings.seed)
    texts, tokens, logp, images = draw_like_rollout(Sampler(settings.compile)(model), vq, prompts,
                                                    index, small, SAMPLES, "selftest")
    index = index.repeat_interleave(SAMPLES)
    checks = (check_sampler(model, prompts, index, tokens, logp, settings),
              check_accumulation(model, prompts, index, tokens, settings),
              check_rewards(reward_fn, images, texts),
              check_step(model, vq, prompts, reward_fn, settings),
              check_checkpoint(model, settings))
    good = True
    for check in checks:
        for what, fine, sentence in check:
            print(f"{'ok ' if fine else 'BAD'}  {what:<12}  {sentence}", flush=True)
            good = good and fine
    return 0 if good else 1


def check_sampler(model, prompts, index, tokens, sampler_logp, settings):
    """Whether what draws the images computes the distribution that is trained."""
    with torch.no_grad():
        logp, _ = argrpo.policy_logp(model, prompts, index, tokens, settings)
    mean = (logp - sampler_logp).abs().mean().item()
    allowed = allowed_mismatch(tokens.device, settings.cfg_scale)
    finding = f"sampler and learner differ by {mean:.1e} nats a token on average"
    if settings.logprob_cfg == "none" and settings.cfg_scale != 1:
        yield "sampler", True, finding + ", as --logprob-cfg none asks for"
    elif mean <= allowed:
        yield "sampler", True, finding + ", by rounding"
    else:
        yield "sampler", False, (f"{finding}, more than {allowed:.1e}: what is trained is not what "
                                 "is drawn. Look for a change in generate or token_logp")


def check_accumulation(model, prompts, index, tokens, settings):
    """Whether the gradient is the same in one pass and added up over passes of one image."""
    advantages = torch.linspace(-1, 1, len(tokens), device=tokens.device)[:, None]
    gradients = []
    for size in (len(tokens), 1):
        copied = copy.deepcopy(model)
        copied.zero_grad()
        for rows in torch.arange(len(tokens)).split(size):
            logp, _ = argrpo.policy_logp(copied, prompts, index[rows], tokens[rows], settings)
            (-(advantages[rows] * logp).mean() * len(rows) / len(tokens)).backward()
        gradients.append([p.grad for p in copied.parameters() if p.grad is not None])
    apart = sum((a - b).square().sum() for a, b in zip(*gradients)).sqrt()
    whole = sum(a.square().sum() for a in gradients[0]).sqrt()
    relative = (apart / whole).item()
    allowed = 0.05 if tokens.is_cuda else 1e-3
    sentence = f"the gradient of one pass and that of many differ by {relative:.1e} of its length"
    if not relative <= allowed:                  # NaN is bad, too
        sentence += f", more than {allowed}: is there a layer that mixes the images of a batch?"
    yield "accumulation", relative <= allowed, sentence


def check_rewards(reward_fn, images, texts):
    """What `python -m rewards --check` examines, on images of the chosen model."""
    try:
        findings = list(checker.findings(reward_fn, images, texts, SAMPLES))
    except Exception as error:                   # a reward is anybody's code
        yield "reward", False, f"fails: {type(error).__name__}: {error}"
        return
    wrong = [(f"reward {what}", False, text) for what, good, text in findings if not good]
    yield from wrong or [("reward", True, f"{len(findings)} checks; " + findings[-1][2])]


def check_step(model, vq, prompts, reward_fn, settings):
    """One whole step of a copy, with its time and memory."""
    one = dataclasses.replace(settings, steps=1, warmup_steps=1)
    device = next(model.parameters()).device
    learner = copy.deepcopy(model)
    optimizer = argrpo.make_optimizer(learner, one)
    start = time.perf_counter()
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    step = next(argrpo.train(learner, frozen_copy(model), vq, prompts, reward_fn, one,
                             optimizer, sampler=Sampler(settings.compile)))
    seconds = time.perf_counter() - start
    used = peak_memory(device) / 2 ** 30
    moved = any(not torch.equal(a, b) for a, b in zip(learner.parameters(), model.parameters()))
    minutes = settings.steps * seconds / 60
    yield "step", moved, (f"{seconds:.1f} s, {used:.2f} GiB at most, reward "
                          f"{step.metrics['reward']:.3f}; {settings.steps} steps would take about "
                          f"{minutes:.0f} minutes")
    useful = 1 - step.metrics["flat_groups"]
    if useful:
        yield "signal", True, f"{useful:.0%} of the step's groups have a spread of rewards"
    else:
        yield "signal", False, ("all rewards of every group are equal, so that nothing is learned: "
                                "take harder prompts, a larger --group-size or a finer reward")


def peak_memory(device):
    """Bytes: of the GPU since its statistics were reset, else of this process so far."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    import resource  # not there on Windows
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def check_checkpoint(model, settings):
    """A checkpoint written where the run's will be, and read again."""
    written, read = copy.deepcopy(model), copy.deepcopy(model)
    optimizers = [argrpo.make_optimizer(m, settings) for m in (written, read)]
    parent = next(p for p in (Path(settings.out), *Path(settings.out).absolute().parents)
                  if p.is_dir())
    with torch.no_grad(), tempfile.TemporaryDirectory(dir=parent) as folder:
        for p in read.parameters():
            p.zero_()
        path = Path(folder) / "last.pt"
        try:
            save_checkpoint(path, 1, written, optimizers[0])
            load_checkpoint(path, read, optimizers[1])
        except OSError as error:
            yield "checkpoint", False, str(error)
            return
        size = path.stat().st_size / 2 ** 20
    same = all(torch.equal(a, b) for a, b in zip(written.parameters(), read.parameters()))
    yield "checkpoint", same, f"{size:.0f} MiB, the same after writing and reading"
