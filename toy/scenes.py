"""The toy's prompts, the scenes that fulfil them, and the pictures of the scenes."""

from itertools import combinations, cycle
from typing import NamedTuple

import torch
import torch.nn.functional as F

SIZE = 24                                        # pixels
GROUND = torch.tensor([0.12, 0.12, 0.12])
PALETTE = {"red": (0.90, 0.20, 0.15), "green": (0.20, 0.80, 0.25), "blue": (0.20, 0.35, 0.95)}
SHAPES = ("circle", "square", "triangle")
COUNTS = ("one", "two", "three")
PLACES = ("above", "below", "left of", "right of")
THINGS = [(colour, shape) for colour in PALETTE for shape in SHAPES]

# ---------------------------------------------------------------------------------------------
# Prompts
# ---------------------------------------------------------------------------------------------


class Request(NamedTuple):
    """What a prompt asks for: the things, and the relation of the first to the second, if any."""
    things: tuple            # of (colour, shape)
    relation: str | None     # one of PLACES


# The 27 classes, in the order of their labels: class k is CLASSES[k].
COUNTED = {f"{count} {colour} {shape}{'s' * (n > 1)}": Request(((colour, shape),) * n, None)
           for n, count in enumerate(COUNTS, start=1) for colour, shape in THINGS}
CLASSES = list(COUNTED)
# The 288 captions of two different things: 36 pairs, each in both orders and four places.  Pair k
# has the captions PAIRS[8 * k:8 * k + 8].
PLACED = {f"a {' '.join(first)} {place} a {' '.join(second)}": Request((first, second), place)
          for one, other in combinations(THINGS, 2)
          for first, second in ((one, other), (other, one)) for place in PLACES}
PAIRS = list(PLACED)

# Compositions that t2i never sees in pretraining, though all of their words are familiar: three
# classes, and five of the 36 pairs of things, in all eight relations to each other.
UNSEEN_CLASSES = ["two green circles", "two red triangles", "three blue squares"]
UNSEEN_PAIRS = [caption for k in range(3, 36, 7) for caption in PAIRS[8 * k:8 * k + 8]]
UNSEEN = {*UNSEEN_CLASSES, *UNSEEN_PAIRS}
SEEN_CLASSES = [caption for caption in CLASSES if caption not in UNSEEN]
SEEN_PAIRS = [caption for caption in PAIRS if caption not in UNSEEN]


def mixed(pairs, counted):
    """One pair, one counted caption, and so on through all pairs."""
    return [text for both in zip(pairs, cycle(counted)) for text in both]


def parse(prompt):
    """The prompt as a Request.  Raises ValueError if it is none of the toy's, word for word."""
    request = COUNTED.get(prompt) or PLACED.get(prompt)
    if request is None:
        raise ValueError(f"the toy cannot draw or verify {prompt!r}: ask for one of its classes, "
                         f"such as {CLASSES[9]!r}, or for a pair, such as {PAIRS[0]!r}")
    return request


# ---------------------------------------------------------------------------------------------
# Scenes
# ---------------------------------------------------------------------------------------------

class Thing(NamedTuple):
    colour: str
    shape: str
    x: float                 # centre, in pixels from the left
    y: float                 # centre, in pixels from the top
    width: float
    height: float


def holds(relation, a, b, gap=0.0):
    """Whether thing a stands in the relation to b: clear of it by `gap` pixels that way."""
    dx = abs(a.x - b.x) - (a.width + b.width) / 2
    dy = abs(a.y - b.y) - (a.height + b.height) / 2
    return {
        "above": a.y < b.y and dy >= gap,
        "below": a.y > b.y and dy >= gap,
        "left of": a.x < b.x and dx >= gap,
        "right of": a.x > b.x and dx >= gap,
    }[relation]


def make_scene(prompt, rng):
    """A random scene that fulfils the prompt: a list of Things, at least four pixels apart.

    Boxes are 8 or 12 pixels wide (8 when there are three) and lie on the grid of the tokenizer's
    patches."""
    request = parse(prompt)
    places = PLACES if request.relation is None else (request.relation,)
    while True:                                  # start over until everything fits
        things = []
        for colour, shape in request.things:
            size = 8 if len(request.things) == 3 else rng.choice((8, 12))
            x, y = (4 * rng.randint(0, (SIZE - size) // 4) + size / 2 for _ in range(2))
            things.append(Thing(colour, shape, x, y, size, size))
        if all(any(holds(place, a, b, gap=4) for place in places)
               for a, b in combinations(things, 2)):
            return things


# ---------------------------------------------------------------------------------------------
# Pictures
# ---------------------------------------------------------------------------------------------

SUPERSAMPLE = 4                                  # points per pixel, in each direction


def stencil(shape, boxes):
    """How much of each pixel a circle, a square or a triangle in each box would cover.

    boxes (K, 4): centre x, centre y, width, height, in pixels.  Returns (K, SIZE, SIZE) in
    [0, 1]."""
    points = (torch.arange(SIZE * SUPERSAMPLE, device=boxes.device) + 0.5) / SUPERSAMPLE
    x, y, width, height = (column[:, None, None] for column in boxes.unbind(-1))     # (K, 1, 1)
    u = (points[None, None, :] - x) / (width / 2)        # (K, 1, points), -1 .. 1 within the box
    v = (points[None, :, None] - y) / (height / 2)       # (K, points, 1)
    if shape == "circle":
        inside = u * u + v * v <= 1                                        # (K, points, points)
    elif shape == "square":
        inside = (u.abs() <= 1) & (v.abs() <= 1)
    else:
        inside = (v.abs() <= 1) & (u.abs() <= (v + 1) / 2)                           # tip up
    return F.avg_pool2d(inside[:, None].float(), SUPERSAMPLE)[:, 0]


def render(scenes):
    """Pictures of the scenes: (B, 3, SIZE, SIZE) in [0, 1]."""
    images = GROUND.view(1, 3, 1, 1).repeat(len(scenes), 1, SIZE, SIZE)
    for image, scene in zip(images, scenes):
        for thing in scene:
            alpha = stencil(thing.shape, torch.tensor([thing[2:]]))        # (1, SIZE, SIZE)
            colour = torch.tensor(PALETTE[thing.colour]).view(3, 1, 1)
            image.copy_(image * (1 - alpha) + colour * alpha)
    return images
