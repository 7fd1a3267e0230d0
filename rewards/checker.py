"""Examines a reward: `python -m rewards --check SPEC`, and a part of `--selftest`.

A reward is examined on pictures that the toy draws before training, or, if it has a method
`examples()`, on those that it brings along: [(prompt, [(what it shows, image (3, H, W)), ...]),
...], as many pictures for each prompt, the best first.  Each finding says in plain words whether
the reward does what training relies on: one finite number per image, the same for the same image,
whatever else is in the batch; and different ones within a group, for otherwise there is nothing to
learn from, by more than training can tell from none.
"""

import math
import time

import torch

import toy
from argrpo import Prompts, draw_images, group_advantages, rng_for

PROMPTS, SAMPLES = 4, 8                          # of the toy's pictures: groups, and images of each


def toy_examples():
    """Pictures of the toy, (3, 24, 24) each, as a reward's own `examples()`."""
    model, vq = toy.load("c2i")
    classes = Prompts(toy.CLASSES, torch.arange(len(toy.CLASSES)))
    index = torch.linspace(0, len(toy.CLASSES) - 1, PROMPTS).long()
    _, _, images = draw_images(model, vq, classes, index, rng_for("cpu", "check"),
                               samples_per_prompt=SAMPLES)
    return [(toy.CLASSES[k], [("a draw", image) for image in group])
            for k, group in zip(index.tolist(), images.split(SAMPLES))]


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
    original, start = images.clone(), time.perf_counter()
    total, _ = rewards(images, prompts)
    milliseconds = 1000 * (time.perf_counter() - start) / len(prompts)
    yield "shape", True, f"one number per image, {tuple(total.shape)} for {len(prompts)} images"
    yield verdict("input", torch.equal(images, original),
                  "leaves the images as they are",
                  "changes the images in place: work on a copy")

    missing = total.isnan().float().mean().item()
    finding = f"{missing:.0%} of the images got no score"
    if missing:
        finding += "; images without a score teach nothing"
    yield "missing", missing < 0.5, finding
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
    reads_prompts = others != prompts and not same(rewards(images, others)[0], total)
    finding = "depends on the prompt" if reads_prompts else "does not depend on the prompt"
    yield "prompt", True, finding
    yield "speed", True, f"{milliseconds:.2f} ms per image, the first time, on {images.device}"


def ranking(rewards, groups, device):
    """Prints what each of a reward's own pictures scores.  The finding: do the best score best?"""
    right = 0
    for prompt, pictures in groups:
        images = torch.stack([image for _, image in pictures]).to(device)
        scores = rewards(images, [prompt] * len(images))[0].tolist()
        print(prompt)
        for (what, _), score in zip(pictures, scores):
            print(f"    {score:8.3f}  {what}")
        right += scores[0] > max(scores[1:])
    finding = f"the first picture scores best for {right} of {len(groups)} prompts"
    return "ranking", right == len(groups), finding


def examine(rewards, prompt, device):
    """Prints the findings on the pictures that a reward brings along, or on the toy's.

    Returns how many are bad."""
    own = [name for name, (reward, _) in rewards.rewards.items() if hasattr(reward, "examples")]
    if own and len(rewards.rewards) > 1:
        raise ValueError(f"{', '.join(own)}: examine each by itself, on pictures of its own")
    groups = rewards.rewards[own[0]][0].examples() if own else toy_examples()
    images = torch.stack([image for _, group in groups for _, image in group]).to(device)
    prompts = [prompt or text for text, group in groups for _ in group]
    rewards.check_prompts(prompts)
    found = []
    if own and not prompt:
        found.append(ranking(rewards, groups, device))
    found += findings(rewards, images, prompts, len(groups[0][1]))
    for what, good, finding in found:
        mark = "ok " if good else "BAD"
        print(f"{mark}  {what:<10}  {finding}")
    return sum(not good for _, good, _ in found)
