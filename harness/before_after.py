"""Evaluation: what a model draws with fixed prompts and seeds, in numbers and in a gallery."""

import math
from collections import namedtuple

import numpy as np
import torch

import argrpo
from diversity import group_diversity
from reward import to_uint8


def nothing(images, texts):
    return {}


# What a run reports of its pictures and never trains on: measure(images, texts) -> {name: (B,)},
# spread(images, texts) -> {name: number}, how varied they are, and what that says of the pretrained
# model.  The last two are None where they are not known.
Watched = namedtuple("Watched", "measure spread base_spread", defaults=(nothing, None, None))


def rollout_images(settings):
    """How many images a pass of the rollout draws.  As many fit into the memory."""
    return (settings.rollout_prompts or settings.prompts_per_step) * settings.group_size


def draw_like_rollout(model, vq, prompts, index, settings, samples, *stream, cfg_scale=None):
    """Pictures of the prompts at index (P,), `samples` of each, by the policy that is trained.

    No pass draws more of them than a rollout's does.  stream names the random numbers of the first
    pass, and with the pass's number those of others.  cfg_scale replaces the rollout's guidance.
    Returns the texts (B strings), and tokens, log-probabilities and images as
    `argrpo.draw_images`."""
    device, most, drawn = next(model.parameters()).device, rollout_images(settings), []
    if cfg_scale is None:
        cfg_scale = settings.cfg_scale
    texts = [prompts.texts[k] for k in index.repeat_interleave(samples).tolist()]
    for some in index.split(max(1, most // samples)):
        for part in torch.arange(samples).split(most):   # whole prompts, or a part of one
            number = (len(drawn),) if drawn else ()
            drawn.append(argrpo.draw_images(
                model, vq, prompts, some, argrpo.rng_for(device, settings.seed, *stream, *number),
                samples_per_prompt=len(part), micro_batch=settings.micro_batch,
                cfg_scale=cfg_scale, temperature=settings.temperature))
    return texts, *(torch.cat(column) for column in zip(*drawn))


@torch.no_grad()
def evaluate(model, vq, prompts, reward_fn, settings, measure=nothing, cfg_scale=None, stop=None):
    """Scores about settings.eval_images images, equally many of each prompt and at least four.

    The seeds and random streams are such that training never uses.  As many images are drawn at a
    time as a rollout has, with the rollout's guidance unless cfg_scale says another.

    Returns (scores, gallery).  scores are {"reward", "reward/<name>", "entropy", "diversity", and
    what measure(images, texts) -> {name: (B,)} says}.  Each is the mean over all images but those
    with NaN, where it does not apply, and None where it applies to none.  gallery has arrays for
    the pictures: of M prompts their numbers `prompts` (M,) and `texts` (M,); of n images of each,
    six at most, `pictures` (M, n, H, W, 3) uint8, `tokens` (M, n, N) and, by their `names`,
    `scores` (names, M, n)."""
    count = min(len(prompts.texts), settings.eval_images // 4)                       # of prompts
    samples = settings.eval_images // count                                          # of each
    index = torch.linspace(len(prompts.texts) - 1, 0, count).long()      # evenly, the last first
    columns, drawn, done = {}, [], 0             # columns: name -> scores (B,), batch by batch
    for some in index.split(max(1, rollout_images(settings) // samples)):            # (P,)
        if stop is not None:
            stop.check()
        texts, tokens, logp, images = draw_like_rollout(
            model, vq, prompts, some, settings, samples, "evaluation", done, cfg_scale=cfg_scale)
        done += len(some)
        rewards, parts = reward_fn(images, texts)
        scores = {"reward": rewards}
        scores |= {f"reward/{name}": part for name, part in parts.items()}
        scores |= measure(images, texts)
        scores["entropy"] = -logp.mean(dim=1)    # -log pi(x) of x ~ pi: its mean is the entropy
        scores["diversity"] = group_diversity(images, samples).repeat_interleave(samples)
        for name, score in scores.items():
            columns.setdefault(name, []).append(score.cpu())
        drawn.append((to_uint8(images), tokens.cpu()))

    def few(column):                             # (B, ...) -> (M, n, ...)
        return column.unflatten(0, (count, samples))[:, :6].numpy()
    scores = {name: torch.cat(column) for name, column in columns.items()}
    pictures, tokens = (few(torch.cat(column)) for column in zip(*drawn))
    gallery = dict(prompts=index.numpy(), pictures=pictures, tokens=tokens,
                   texts=np.array([prompts.texts[k] for k in index.tolist()]),
                   names=np.array([*scores]),
                   scores=np.stack([few(column.float()) for column in scores.values()]))
    return {name: known_mean(column) for name, column in scores.items()}, gallery


def known_mean(scores):
    """The mean of what is not NaN, or None if nothing is."""
    mean = scores.nanmean().item()
    return None if math.isnan(mean) else mean


def evaluate_all(model, vq, prompts, reward_fn, settings, watched, stop=None):
    """`evaluate` with the rollout's guidance, and in scores["guidance"] what other scales give.

    Returns (scores, gallery, spread).  Where watched.spread can tell, spread is how varied the
    model's pictures are, else None; and the scores have D, if the base's spread is known."""
    given, spread = (model, vq, prompts, reward_fn, settings, watched.measure), None
    scores, gallery = evaluate(*given, stop=stop)
    for scale in settings.other_cfg_scales():
        other, _ = evaluate(*given, scale, stop)
        scores.setdefault("guidance", {})[f"{scale:g}"] = other
    if watched.spread is not None:
        spread = evaluate_spread(model, vq, prompts, settings, watched.spread)
        if watched.base_spread:
            scores |= diversity_kept(watched.base_spread, spread)
    return scores, gallery, spread


def spread_index(count, settings):
    """Which of so many prompts `evaluate_spread` draws, at most 27, evenly chosen."""
    return torch.linspace(0, count - 1, min(27, count, settings.eval_images // 4)).long()


@torch.no_grad()
def evaluate_spread(model, vq, prompts, settings, spread):
    """What spread(images, texts) says of fixed-seed images of the prompts of `spread_index`.

    There are 32 of each for the default eval_images, and accordingly more or less."""
    samples = max(8, 32 * settings.eval_images // 540)
    texts, images = [], []
    for k, some in enumerate(spread_index(len(prompts.texts), settings).split(4)):
        of_some, _, _, drawn = draw_like_rollout(model, vq, prompts, some, settings, samples,
                                                 "spread", k)
        texts += of_some
        images.append(drawn)
    return spread(torch.cat(images), texts)


def diversity_kept(before, after):
    """D and its parts: how much of the spread before training is left after it, as ratios.

    D is their mean.  None where there were too few right pictures to tell."""
    kept = {}
    for name, value in before.items():
        known = value and after[name] is not None
        kept[f"diversity_kept/{name}"] = after[name] / value if known else None
    mean = None if None in kept.values() else sum(kept.values()) / len(kept)
    return {"diversity_kept": mean} | kept


def describe(scores):
    """The scores in a line, and one more for each guidance scale besides the rollout's."""
    known = {name: value for name, value in scores.items()
             if name != "guidance" and value is not None}
    lines = [", ".join(f"{name} {value:.3f}" for name, value in known.items())]
    for scale, other in scores.get("guidance", {}).items():
        lines.append(f"    with guidance {scale}: {describe(other)}")
    return "\n".join(lines)
