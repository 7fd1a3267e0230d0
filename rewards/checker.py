"""Examines a reward: `python -m rewards --check SPEC`, and a part of `--selftest`.

A reward is examined on pictures that the toy draws before training, or, if it has a method
`examples()`, on those that it brings along: [(prompt, [(what it shows, image (3, H, W)), ...]),
...], as many pictures for each prompt, the best first.  Each finding says in plain words whether
the reward does what training relies on: one finite number per image, the same for the same image,
whatever else is in the batch; and different ones within a group, for otherwise there is nothing to
learn from.
"""

import time

import torch

import toy
from argrpo import Prompts, draw_images, rng_for

PROMPTS, SAMPLES = 4, 8                          # of the toy's pictures: groups, and images of each


def toy_batch(device, prompts=PROMPTS, samples=SAMPLES):
    """Pictures of the toy in groups, (prompts * samples, 3, 24, 24), and the prompt of each."""
    model, vq = toy.load("c2i")
    index = torch.linspace(0, len(toy.CLASSES) - 1, prompts).long()
    classes = Prompts(toy.CLASSES, torch.arange(len(toy.CLASSES)))
    _, _, images = draw_images(model, vq, classes, index, rng_for("cpu", "check"),
                               samples_per_prompt=samples)
    texts, _, _ = classes.pick(index.repeat_interleave(samples), "cpu")
    return images.to(device), texts


def same(scores, total):
    """Whether two lots of scores of the same images are equal, but for rounding."""
    largest = total[~total.isnan()].abs().max().item()
    return torch.allclose(scores, total, rtol=1e-3, atol=1e-4 * max(1.0, largest), equal_nan=True)


def verdict(what, good, if_good, if_bad):
    """A finding: (what was examined, whether it is all right, the finding in plain words)."""
    return what, good, if_good if good else if_bad


def check(rewards, images, prompts, group_size):
    """Examines a RewardSet on groups of images: yields findings as `verdict` gives them."""
    original = images.clone()
    start = time.perf_counter()
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
    alone = [rewards(images[i:i + 1], prompts[i:i + 1])[0] for i in range(len(prompts))]
    yield verdict("batch", same(torch.cat(alone), total),
                  "an image scores alone as it does in the batch",
                  "an image's score depends on the others in the batch, or on the batch's size")

    groups = total.view(-1, group_size)
    spread = groups.std(dim=1).nanmean().item()
    flat = (groups.amax(dim=1) == groups.amin(dim=1)).float().mean().item()
    finding = (f"standard deviation {spread:.4g} within the groups, "
               f"{flat:.0%} of them without any")
    if flat == 1:
        finding += ": images of one prompt all score the same, so there is nothing to learn from"
    yield "spread", flat < 1, finding

    reads_prompts = False
    if len(set(prompts)) > 1:
        others, _ = rewards(images, prompts[group_size:] + prompts[:group_size])
        reads_prompts = not same(others, total)
    finding = "depends on the prompt" if reads_prompts else "does not depend on the prompt"
    yield "prompt", True, finding
    yield "speed", True, f"{milliseconds:.2f} ms per image, the first time, on {images.device}"


def ranked(rewards, groups, device):
    """Prints what each of a reward's own pictures scores: yields whether the best score best."""
    right = 0
    for prompt, pictures in groups:
        images = torch.stack([image for _, image in pictures]).to(device)
        scores = rewards(images, [prompt] * len(images))[0].tolist()
        print(f"{prompt}")
        for (what, _), score in zip(pictures, scores):
            print(f"    {score:8.3f}  {what}")
        right += scores[0] > max(scores[1:])
    finding = f"the first picture scores best for {right} of {len(groups)} prompts"
    yield verdict("ranking", right == len(groups), finding, finding)


def examine(rewards, prompt, device):
    """Prints what `check` finds on pictures of the toy, or on those that the reward brings along.
    Returns how many findings are bad."""
    known = {name: reward for name, (reward, _) in rewards.rewards.items()
             if hasattr(reward, "examples")}
    if known and len(rewards.rewards) > 1:
        raise ValueError(f"{', '.join(known)}: examine each by itself, on pictures of its own")
    findings = []
    if known:
        [reward] = known.values()
        groups = reward.examples()
        size = len(groups[0][1])
        images = torch.stack([image for _, group in groups for _, image in group]).to(device)
        prompts = [text for text, group in groups for _ in group]
        if not prompt:
            findings += ranked(rewards, groups, device)
    else:
        images, prompts = toy_batch(device)
        size = SAMPLES
    if prompt:
        prompts = [prompt] * len(prompts)
    rewards.check_prompts(prompts)
    findings += check(rewards, images, prompts, size)
    for what, good, finding in findings:
        mark = "ok " if good else "BAD"
        print(f"{mark}  {what:<10}  {finding}")
    return sum(not good for _, good, _ in findings)
