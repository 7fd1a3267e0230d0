"""A minute's trial of the chosen models and rewards, before a long run: `--selftest`.

Each check yields lines (what, whether it is all right, a sentence that says what was found or what
to do).  They do what training will do, in passes of its sizes and with its layers' checkpointing,
and need no more memory.  They leave no file behind, but the model trained by a step.  What fails
with an error ends them, as it would end a run.
"""

import copy
import dataclasses
import tempfile
from pathlib import Path

import torch

import argrpo
from harness.before_after import draw_like_rollout
from harness.checkpoints import load_checkpoint, save_checkpoint
from harness.device import Sampler, frozen_copy, matrix_dtype, measured, optimizer_of_device
from harness.doctor import allowed_mismatch
from rewards import checker

PROMPTS, SAMPLES = 2, 4                          # of the batch that most checks share


def selftest(model, vq, prompts, reward_fn, settings):
    """Prints a line for each check.  Returns the exit status: 0, or 1 if something is wrong."""
    P = min(PROMPTS, len(prompts.texts), settings.prompts_per_step)
    index = argrpo.pick_prompts(len(prompts.texts), 0, P, settings.seed)
    texts, tokens, logp, images = draw_like_rollout(Sampler(settings.compile)(model), vq, prompts,
                                                    index, settings, SAMPLES, "selftest")
    index = index.repeat_interleave(SAMPLES)
    one = dataclasses.replace(settings, steps=1, warmup_steps=1)
    optimizer = optimizer_of_device(model, one)
    checks = (check_sampler(model, prompts, index, tokens, logp, settings),
              check_accumulation(model, prompts, index, tokens, settings),
              check_rewards(reward_fn, images, texts),
              check_step(model, vq, prompts, reward_fn, one, optimizer, settings.steps),
              check_checkpoint(model, optimizer, settings.out))
    return min(1, sum(map(checker.told, checks)))


def check_sampler(model, prompts, index, tokens, sampler_logp, settings):
    """Whether what draws the images computes the distribution that is trained."""
    with torch.no_grad():
        logp, _ = argrpo.policy_logp(model, prompts, index, tokens, settings)
    mean = (logp - sampler_logp).abs().mean().item()
    rough = matrix_dtype(tokens.device) != torch.float32
    allowed = allowed_mismatch(rough, settings.cfg_scale)
    finding = f"sampler and learner differ by {mean:.1e} nats a token on average"
    asked = settings.logprob_cfg == "none" and settings.cfg_scale != 1
    why = "as --logprob-cfg none asks for" if asked else "by rounding"
    yield checker.verdict(
        "sampler", asked or mean <= allowed, f"{finding}, {why}",
        f"{finding}, more than {allowed:.1e}: what is trained is not what is drawn. Look for a "
        "change in generate or token_logp")


def check_accumulation(model, prompts, index, tokens, settings):
    """Whether the gradient is the same in the update's passes and added up over single images."""
    advantages = torch.linspace(-1, 1, len(tokens), device=tokens.device)[:, None]
    gradients, largest = [], min(settings.micro_batch, len(tokens))
    for size in (largest, 1):
        for rows in torch.arange(len(tokens)).split(size):
            logp, _ = argrpo.policy_logp(model, prompts, index[rows], tokens[rows], settings)
            (-(advantages[rows] * logp).mean() * len(rows) / len(tokens)).backward()
        gradients.append([p.grad for p in model.parameters() if p.grad is not None])
        model.zero_grad()
    apart = sum((a - b).square().sum() for a, b in zip(*gradients)).sqrt()
    whole = sum(a.square().sum() for a in gradients[0]).sqrt()
    relative = (apart / whole).item()
    allowed = 1e-3 if matrix_dtype(tokens.device) == torch.float32 else 0.05
    sentence = (f"the gradient of passes of {largest} images and that of passes of one differ "
                f"by {relative:.1e} of its length")
    yield checker.verdict(                       # NaN is bad, too
        "accumulation", relative <= allowed, sentence,
        f"{sentence}, more than {allowed}: is there a layer that mixes the images of a batch?")


def check_rewards(reward_fn, images, texts):
    """What `python -m rewards --check` examines, on images of the chosen model."""
    findings = list(checker.findings(reward_fn, images, texts, SAMPLES))
    wrong = [(f"reward {what}", False, text) for what, good, text in findings if not good]
    yield from wrong or [("reward", True, f"{len(findings)} checks; " + findings[-1][2])]


def check_step(model, vq, prompts, reward_fn, one, optimizer, steps):
    """One whole step, by the settings `one`, with its time and memory, and what all steps take."""
    reference = frozen_copy(model)
    training = argrpo.train(model, reference, vq, prompts, reward_fn, one, optimizer,
                            sampler=Sampler(one.compile))
    step, seconds, peak = measured(model.output.weight.device, lambda: next(training))
    moved = not torch.equal(model.norm.weight, reference.norm.weight)        # float32 in both
    yield "step", moved, (f"{seconds:.1f} s, {peak / 2 ** 30:.2f} GiB at most, reward "
                          f"{step.metrics['reward']:.3f}; {steps} steps would take about "
                          f"{steps * seconds / 60:.0f} minutes")
    useful = 1 - step.metrics["flat_groups"]
    yield checker.verdict(
        "signal", useful > 0, f"{useful:.0%} of the step's groups have a spread of rewards",
        "all rewards of every group are equal, so that nothing is learned: take harder prompts, a "
        "larger --group-size or a finer reward")


def check_checkpoint(model, optimizer, out):
    """A checkpoint written where the run's will be, and read again."""
    written = copy.deepcopy(model.state_dict())
    parent = next(p for p in (Path(out), *Path(out).absolute().parents) if p.is_dir())
    with torch.no_grad(), tempfile.TemporaryDirectory(dir=parent) as folder:
        path = Path(folder) / "last.pt"
        save_checkpoint(path, 1, model, optimizer)
        for p in model.parameters():
            p.zero_()
        load_checkpoint(path, model, optimizer)
        size = path.stat().st_size / 2 ** 20
    same = all(torch.equal(a, written[name]) for name, a in model.state_dict().items())
    yield "checkpoint", same, f"{size:.0f} MiB, the same after writing and reading"
