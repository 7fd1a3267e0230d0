"""Evaluation: what a model draws with fixed prompts and seeds, in numbers and in a gallery."""

import math
from collections import namedtuple

import torch

import argrpo
import reward
from diversity import group_diversity

# Pictures of one prompt, for a gallery: images (n, 3, H, W) in [0, 1], rewards and scores {name:
# numbers} of each, tokens (n, N), and the prompt's number.
Shown = namedtuple("Shown", "text images rewards scores tokens prompt")


@torch.no_grad()
def evaluate(model, vq, prompts, reward_fn, settings, measure=None, cfg_scale=None, stop=None):
    """Scores about settings.eval_images images, equally many of each prompt and at least four.

    The seeds and random streams are such that training never uses.  As many images are drawn at a
    time as a rollout has, with the rollout's guidance unless cfg_scale says another.

    Returns (scores, gallery).  scores are {"reward", "reward/<name>", "entropy", "diversity", and
    what measure(images, texts) -> {name: (B,)} says}.  Each is the mean over all images but those
    with NaN, where it does not apply, and None where it applies to none.  gallery is a list of
    Shown, six images at most of each prompt, for the pictures."""
    device = next(model.parameters()).device
    if cfg_scale is None:
        cfg_scale = settings.cfg_scale
    count = min(len(prompts.texts), settings.eval_images // 4)                       # of prompts
    samples = settings.eval_images // count                                          # of each
    batch = (settings.rollout_prompts or settings.prompts_per_step) * settings.group_size
    index = torch.linspace(len(prompts.texts) - 1, 0, count).long()      # evenly, the last first
    columns, gallery = {}, []                    # columns: name -> scores (B,), batch by batch
    for some in index.split(max(1, batch // samples)):                               # (P,)
        if stop is not None:
            stop.check()
        rng = argrpo.rng_for(device, settings.seed, "evaluation", len(gallery))
        tokens, logp, images = argrpo.draw_images(
            model, vq, prompts, some, rng, samples_per_prompt=samples,
            micro_batch=settings.micro_batch, cfg_scale=cfg_scale, temperature=settings.temperature)
        texts = texts_of(prompts, some, samples)
        rewards, parts = reward_fn(images, texts)
        scores = {"reward": rewards}
        scores |= {f"reward/{name}": part for name, part in parts.items()}
        if measure is not None:
            scores |= measure(images, texts)
        scores["entropy"] = -logp.mean(dim=1)    # -log pi(x) of x ~ pi: its mean is the entropy
        scores["diversity"] = group_diversity(images, samples).repeat_interleave(samples)
        for name, score in scores.items():
            columns.setdefault(name, []).append(score.cpu())
        for i in range(0, len(texts), samples):
            rows = slice(i, i + min(6, samples))
            each = {name: score[rows].tolist() for name, score in scores.items()}
            gallery.append(Shown(texts[i], images[rows].cpu(), each["reward"], each,
                                 tokens[rows].cpu(), some[i // samples].item()))
    return {name: known_mean(torch.cat(column)) for name, column in columns.items()}, gallery


def with_watched(measure, spec, device):
    """A measure(images, texts) that also gives "watch/<name>" of each reward of the text spec.

    Like all that `run` measures, they are reported and never trained on."""
    if not spec:
        return measure
    watched = reward.build_rewards(spec, device)

    def both(images, texts):
        _, parts = watched(images, texts)
        scores = {} if measure is None else measure(images, texts)
        return scores | {f"watch/{name}": part for name, part in parts.items()}
    return both


def texts_of(prompts, index, samples):
    """The texts of the prompts at index, `samples` times each."""
    return [prompts.texts[k] for k in index.repeat_interleave(samples).tolist()]


def known_mean(scores):
    """The mean of what is not NaN, or None if nothing is."""
    mean = scores.nanmean().item()
    return None if math.isnan(mean) else mean


def evaluate_all(model, vq, prompts, reward_fn, settings, measure=None, stop=None):
    """`evaluate` with the rollout's guidance, and in scores["guidance"] what other scales give."""
    scores, gallery = evaluate(model, vq, prompts, reward_fn, settings, measure, stop=stop)
    others = {}
    for scale in settings.other_cfg_scales():
        others[f"{scale:g}"], _ = evaluate(model, vq, prompts, reward_fn, settings, measure, scale,
                                           stop)
    if others:
        scores["guidance"] = others
    return scores, gallery


def spread_prompts(prompts, settings):
    """Which prompts `evaluate_spread` draws, at most 27, evenly chosen: their index."""
    count = min(27, len(prompts.texts), settings.eval_images // 4)
    return torch.linspace(0, len(prompts.texts) - 1, count).long()


@torch.no_grad()
def evaluate_spread(model, vq, prompts, settings, spread):
    """What spread(images, texts) says of fixed-seed images of the `spread_prompts`.

    There are 32 of each for the default eval_images, and accordingly more or less."""
    device, batches = next(model.parameters()).device, []
    samples = max(8, 32 * settings.eval_images // 540)
    index = spread_prompts(prompts, settings)
    for k, some in enumerate(index.split(4)):
        rng = argrpo.rng_for(device, settings.seed, "spread", k)
        _, _, images = argrpo.draw_images(
            model, vq, prompts, some, rng, samples_per_prompt=samples,
            micro_batch=settings.micro_batch, cfg_scale=settings.cfg_scale,
            temperature=settings.temperature)
        batches.append(images)
    return spread(torch.cat(batches), texts_of(prompts, index, samples))


def diversity_kept(before, after):
    """D and its parts: how much of the spread before training is left after it, as ratios.

    D is their mean.  None where there were too few right pictures to tell."""
    kept = {}
    for name, value in before.items():
        ratio = None
        if value and after[name] is not None:
            ratio = after[name] / value
        kept[f"diversity_kept/{name}"] = ratio
    mean = None
    if None not in kept.values():
        mean = sum(kept.values()) / len(kept)
    return {"diversity_kept": mean} | kept


def describe(scores):
    """The scores in a line, and one more for each guidance scale besides the rollout's."""
    known = {name: value for name, value in scores.items()
             if name != "guidance" and value is not None}
    lines = [", ".join(f"{name} {value:.3f}" for name, value in known.items())]
    for scale, other in scores.get("guidance", {}).items():
        lines.append(f"    with guidance {scale}: {describe(other)}")
    return "\n".join(lines)
