"""The toy's verifier: it reads the things off a picture's pixels and compares them with the prompt.

Shapes: K is the number of blobs in all pictures together.
"""

import math
from collections import Counter
from itertools import permutations

import torch
import torch.nn.functional as F

from toy.scenes import GROUND, PALETTE, SHAPES, SIZE, UNSEEN, Thing, holds, parse, stencil

# What a blob must be to count as a thing.
MIN_OVERLAP = 0.85                               # soft intersection over union with the shape
ASPECT = (0.75, 1.34)                            # width / height
RADIUS = (3.0, 6.5)                              # pixels
MAX_STRAY = 0.25                                 # largest deviation of the ground, per channel

# ---------------------------------------------------------------------------------------------
# From pixels to things
# ---------------------------------------------------------------------------------------------


def connected_components(mask):
    """mask (B, H, W) bool -> labels (B, H, W): 0 outside, and in each component the number of its
    last pixel, counted from 1."""
    numbers = torch.arange(1, mask[0].numel() + 1, device=mask.device).float()
    labels = numbers.view(1, *mask.shape[1:]) * mask
    busy = mask.flatten(1).any(dim=1)            # most masks are empty, and need no work
    while True:                                  # the largest number floods its component
        flooded = F.max_pool2d(labels[busy, None], 3, stride=1, padding=1)[:, 0] * mask[busy]
        if torch.equal(flooded, labels[busy]):
            return labels
        labels[busy] = flooded


def unmix(images):
    """How much of each colour every pixel holds: images (B, 3, H, W) -> alpha (B, 3, H, W).

    A pixel is the ground plus alpha_c (colour_c - ground): three equations for three alphas."""
    ground = GROUND.to(images.device)
    colours = torch.tensor(list(PALETTE.values()), device=images.device)             # (3, rgb)
    basis = torch.linalg.inv(colours - ground)
    alpha = torch.einsum("brhw,rc->bchw", images - ground.view(3, 1, 1), basis)
    return alpha.clamp(0, 1)


def find_blobs(planes):
    """The blobs of the planes (B * 3, H, W): the plane of each (K,), and its area (K, H, W).

    The area is the blob's own pixels and the half-covered ones around them."""
    labels = connected_components(planes > 0.5)
    numbers = torch.arange(1, SIZE * SIZE + 1, device=planes.device)
    # One pixel of each component has the component's number.
    plane, pixel = (labels.flatten(1) == numbers).nonzero(as_tuple=True)             # (K,), (K,)
    blob = (labels[plane] == numbers[pixel].view(-1, 1, 1)).float()
    return plane, F.max_pool2d(blob[:, None], 3, stride=1, padding=1)[:, 0]


def bounding_boxes(soft):
    """soft masks (K, H, W) -> boxes (K, 4): centre x, centre y, width, height, in pixels."""
    centres = torch.arange(SIZE, device=soft.device) + 0.5
    columns, rows = soft.amax(dim=1), soft.amax(dim=2)                     # (K, W), (K, H)
    width, height = columns.sum(-1), rows.sum(-1)
    x = (columns * centres).sum(-1) / width
    y = (rows * centres).sum(-1) / height
    return torch.stack([x, y, width, height], dim=-1)


def recognise(soft, boxes):
    """The shape (K,) that overlaps best when drawn into the same box, and whether it is good (K,).

    A triangle's tip and corners are too thin to show in the measured box: it is drawn that much
    larger."""
    larger = {"triangle": boxes + boxes.new_tensor([0.0, -0.5, 0.6, 1.0])}
    perfect = torch.stack([stencil(shape, larger.get(shape, boxes)) for shape in SHAPES], dim=1)
    both = torch.minimum(perfect, soft[:, None]).sum((2, 3))
    either = torch.maximum(perfect, soft[:, None]).sum((2, 3))
    overlap, shape = (both / either).max(dim=1)                            # (K,), (K,)
    width, height = boxes[:, 2], boxes[:, 3]
    aspect, radius = width / height, (width + height) / 4
    good = overlap >= MIN_OVERLAP
    good &= (aspect >= ASPECT[0]) & (aspect <= ASPECT[1])
    good &= (radius >= RADIUS[0]) & (radius <= RADIUS[1])
    return shape, good


def ground_is_clean(images, image, area):
    """Whether all that is outside the blobs' areas looks like the ground: (B,) bool.

    image (K,) says which image an area (K, H, W) belongs to."""
    covered = area.new_zeros(len(images), SIZE, SIZE).index_add(0, image, area) > 0
    deviation = (images - GROUND.to(images.device).view(3, 1, 1)).abs().amax(dim=1)
    return (deviation * ~covered).amax(dim=(1, 2)) <= MAX_STRAY


def read_scenes(images):
    """Reads the things off pictures: images (B, 3, SIZE, SIZE) in [0, 1] -> B lists of Things.

    A picture that contains anything else, be it one misshapen blob or a stray stroke, gives None.
    """
    if images.shape[1:] != (3, SIZE, SIZE):
        raise ValueError(f"the toy's verifier reads images (B, 3, {SIZE}, {SIZE}), "
                         f"not {tuple(images.shape)}")
    images = images.float()
    planes = unmix(images).flatten(0, 1)                                   # (B * 3, H, W)
    plane, area = find_blobs(planes)                                       # (K,), (K, H, W)
    soft = planes[plane] * area                                            # (K, H, W)
    boxes = bounding_boxes(soft)                                           # (K, 4)
    shape, good = recognise(soft, boxes)                                   # (K,), (K,)
    image, colour = plane // 3, plane % 3
    clean = ground_is_clean(images, image, area)                           # (B,)
    clean[image[~good]] = False
    scenes = [[] for _ in images]
    for i, c, s, box in zip(image.tolist(), colour.tolist(), shape.tolist(), boxes.tolist()):
        scenes[i].append(Thing(list(PALETTE)[c], SHAPES[s], *box))
    return [scene if readable else None for scene, readable in zip(scenes, clean.tolist())]


# ---------------------------------------------------------------------------------------------
# Right or wrong
# ---------------------------------------------------------------------------------------------

def fulfils(scene, prompt):
    """Whether a scene, as read off a picture, is exactly what the prompt asks for."""
    things, relation = parse(prompt)
    if scene is None or len(scene) != len(things):
        return False
    return any(tuple(thing[:2] for thing in order) == things
               and (relation is None or holds(relation, *order)) for order in permutations(scene))


def verify(images, prompts):
    """The reward "shapes": 1 where a picture shows exactly what its prompt asks for, else 0.

    images (B, 3, SIZE, SIZE) in [0, 1], prompts B strings -> (B,) float."""
    scenes = read_scenes(images)
    right = [fulfils(scene, prompt) for scene, prompt in zip(scenes, prompts, strict=True)]
    return torch.tensor(right, dtype=torch.float32, device=images.device)


def verify_all(images, prompts):
    """What c2i's runs report: {"verified": (B,)}."""
    return {"verified": verify(images, prompts)}


def verify_by_kind(images, prompts):
    """What t2i's runs report: `verified` for all captions, and for each kind of caption apart.

    A kind's entries are NaN for captions of another kind."""
    right = verify(images, prompts)
    unseen = torch.tensor([prompt in UNSEEN for prompt in prompts], device=right.device)
    placed = torch.tensor([parse(prompt).relation is not None for prompt in prompts],
                          device=right.device)
    kinds = {"seen": ~unseen, "unseen": unseen, "counting": ~placed, "position": placed}
    return {"verified": right} | {f"verified/{kind}": right.masked_fill(~mask, torch.nan)
                                  for kind, mask in kinds.items()}


# ---------------------------------------------------------------------------------------------
# How varied the right pictures are
# ---------------------------------------------------------------------------------------------

def coarse_layout(scene, cell=8):
    """Which things are in which cells of a coarse grid, as one hashable value."""
    return tuple(sorted((thing.colour, thing.shape, int(thing.x // cell), int(thing.y // cell))
                        for thing in scene))


def distinct_in(n, values):
    """How many different values to expect in n of them, drawn without replacement.

    Needs len(values) >= n."""
    draws = math.comb(len(values), n)
    counts = Counter(values).values()
    return sum(1 - math.comb(len(values) - count, n) / draws for count in counts)


def spread(images, prompts):
    """How varied the right pictures of a prompt are.  Wrong ones do not count: junk is varied, too.

    images (B, 3, SIZE, SIZE) in [0, 1].  Returns the means over prompts of `spread_by_prompt`, or
    None where there are too few right pictures."""
    parts = spread_by_prompt(images, prompts)
    return {name: mean_if_any(list(values.values())) for name, values in parts.items()}


def mean_if_any(values):
    """The mean of a list of numbers, or None if it is empty."""
    return sum(values) / len(values) if values else None


def spread_by_prompt(images, prompts):
    """Four measures, {name: {prompt: value}}, of the prompts that have enough right pictures:

        distance    L1 per pixel between two pictures
        centres     standard deviation of the place of single things, in pixels
        sizes       standard deviation of the size of one or two things, in pixels
        layouts     how many different coarse layouts to expect in eight pictures
    """
    parts, right = {"distance": {}, "centres": {}, "sizes": {}, "layouts": {}}, {}
    for image, scene, prompt in zip(images, read_scenes(images), prompts, strict=True):
        if fulfils(scene, prompt):
            right.setdefault(prompt, []).append((image, scene))
    for prompt, pictures in right.items():
        if len(pictures) < 2:
            continue
        pixels = torch.stack([image.flatten() for image, _ in pictures])
        parts["distance"][prompt] = torch.pdist(pixels, p=1).mean().item() / pixels.shape[1]
        boxes = torch.tensor([thing[2:] for _, scene in pictures for thing in scene])      # (K, 4)
        if len(boxes) == len(pictures):
            parts["centres"][prompt] = boxes[:, :2].std(dim=0).mean().item()
        if len(parse(prompt).things) < 3:
            parts["sizes"][prompt] = boxes[:, 2:].mean(dim=1).std().item()
        if len(pictures) >= 8:
            layouts = [coarse_layout(scene) for _, scene in pictures]
            parts["layouts"][prompt] = distinct_in(8, layouts)
    return parts
