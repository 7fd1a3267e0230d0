"""Examines a reward: `python -m rewards --check SPEC`, and a part of `--selftest`.

A reward is examined on pictures that the toy draws before training, or, in a selftest, on those of
the chosen model.  Each finding says in plain words whether the reward does what training relies on:
one finite number per image, the same for the same image, whatever else is in the batch; and
different ones within a group, for otherwise there is nothing to learn from, by more than training
can tell from none.
"""

import math
import time

import torch

import toy
from argrpo import Prompts, draw_images, group_advantages, rng_for
from reward import BadReward

PROMPTS, SAMPLES = 4, 8                          # of the toy's pictures: groups, and images of each


def toy_pictures():
    """Pictures of the toy, (32, 3, 24, 24), and their prompts."""
    model, vq = toy.load("c2i")
    classes = Prompts(toy.CLASSES, torch.arange(len(toy.CLASSES)))
    index = torch.linspace(0, len(toy.CLASSES) - 1, PROMPTS).long()
    _, _, images = draw_images(model, vq, classes, index, rng_for("cpu", "check"),
                               samples_per_prompt=SAMPLES)
    return images, [toy.CLASSES[k] for k in index.repeat_interleave(SAMPLES).tolist()]


def same(scores, total):
    """Whether two lots of scores of the same images are equal, but for rounding."""
    largest = total[~total.isnan()].abs().max().item()
    return torch.allclose(scores, total, rtol=1e-3, atol=1e-4 * max(1.0, largest), equal_nan=True)


def verdict(what, good, if_good, if_bad):
    """A finding: (what was examined, whether it is all right, the finding in plain words)."""
    return what, good, if_good if good else if_bad


def scale(total, group_size):
    """Yields the finding whether training can use scores of this size, if a group has a spread.

    A group's advantages have a standard deviation of 1, unless the 1e-4 counts beside std, or the
    squares in std are too large for float32.  Of the groups, the one of median std is looked at."""
    groups = total.nan_to_num(torch.nan).double().view(-1, group_size)   # infinite: the largest
    advantages = group_advantages(total, group_size).view(-1, group_size)
    spreads = []                                 # (std of the rewards, std of the advantages)
    for r, a in zip(groups, advantages):
        known = ~r.isnan()
        if known.sum() > 1 and r[known].std() > 0:
            spreads.append((r[known].std().item(), a[known].std().item()))
    if spreads:
        spread, kept = sorted(spreads)[len(spreads) // 2]
        finding = f"advantages, (r - mean) / (std + 1e-4) in float32, have {kept:.0%} of their size"
        factor = 10.0 ** -round(math.log10(spread))
        yield verdict("scale", kept > 0.9, finding,
                      f"{finding}: multiply the weight by {factor:.0e}")


def findings(rewards, images, prompts, group_size):
    """Examines a RewardSet on groups of images: yields findings as `verdict` gives them."""
    start = time.perf_counter()
    total, _ = rewards(images, prompts)
    milliseconds = 1000 * (time.perf_counter() - start) / len(prompts)
    yield "shape", True, f"one number per image, {tuple(total.shape)} for {len(prompts)} images"

    missing = total.isnan().float().mean().item()
    yield "missing", missing < 0.5, f"{missing:.0%} of the images got no score, and teach nothing"
    known = total[~total.isnan()]
    if not len(known):
        return
    yield "range", True, f"from {known.min():.4g} to {known.max():.4g}, mean {known.mean():.4g}"

    again, _ = rewards(images, prompts)
    yield verdict("repeatable", same(again, total),
                  "the same images get the same scores again",
                  "the same images get other scores the second time: seed what is random in it")
    backwards, _ = rewards(images.flip(0), prompts[::-1])
    yield verdict("order", same(backwards.flip(0), total),
                  "the order of the batch does not matter",
                  "an image's score depends on its place in the batch")
    alone = [rewards(image[None], [prompt])[0] for image, prompt in zip(images, prompts)]
    yield verdict("batch", same(torch.cat(alone), total),
                  "an image scores alone as it does in the batch",
                  "an image's score depends on the others in the batch, or on the batch's size")

    groups = total.view(-1, group_size)
    spread = groups.std(dim=1).nanmean().item()
    flat = (groups.amax(dim=1) == groups.amin(dim=1)).float().mean().item()
    finding = f"standard deviation {spread:.4g} within the groups, {flat:.0%} of them without any"
    if flat == 1:
        finding += ": images of one prompt all score the same, so there is nothing to learn from"
    yield "spread", flat < 1, finding
    yield from scale(total, group_size)

    others = prompts[group_size:] + prompts[:group_size]
    if others != prompts:
        unread = same(rewards(images, others)[0], total)
        yield "prompt", True, "does not depend on the prompt" if unread else "depends on the prompt"
    yield "speed", True, f"{milliseconds:.2f} ms per image, the first time, on {images.device}"


def told(found):
    """Prints findings, a line each.  Returns how many are bad."""
    bad = 0
    for what, good, finding in found:
        print(f"{'ok ' if good else 'BAD'}  {what:<12}  {finding}", flush=True)
        bad += not good
    return bad


def examine(rewards, prompt, device):
    """Prints the findings on the toy's pictures, as pictures of the prompt if one is given.

    Returns how many are bad."""
    images, prompts = toy_pictures()
    if prompt:
        prompts = [prompt] * len(prompts)
    try:
        rewards.check_prompts(prompts)
    except BadReward as error:
        raise ValueError(f"{error}; give one that it can judge with --prompt") from None
    return told(findings(rewards, images.to(device), prompts, SAMPLES))
