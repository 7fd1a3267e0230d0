"""The toy: a world of shapes, small enough that all of AR-GRPO runs on a laptop's CPU.

Pictures are 24 x 24 pixels: circles, squares and triangles in red, green and blue on a dark grey
ground.  A prompt says what should be there,

    "two red circles"                            count x colour x shape: the 27 classes of c2i,
    "a blue triangle above a green square"       and, for t2i, two objects and where they are,

and since the world is procedural, a program can read the objects off a picture's pixels and say
whether the prompt came true: a miniature GenEval, the reward named "shapes".

The models are `VQModel` and `Transformer`, the very classes that hold LlamaGen, at small size.
They lie pretrained in `weights/`, in LlamaGen's checkpoint format.  To make them from nothing
(minutes on two cores):

    python toy.py                     # renders scenes, trains the tokenizer and both transformers
    python toy.py --out my_weights    # the same, somewhere else

Pretraining stops early on purpose: the models know what scenes look like but get about half of
them wrong, which leaves reinforcement learning something to do.
"""

import argparse
import math
import random
import re
from collections import Counter
from itertools import combinations
from math import isqrt
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from tqdm import tqdm

from argrpo import GPTConfig, Transformer, load_weights, paint
from vqgan import VQConfig, VQModel

SIZE = 24                                        # pixels
GROUND = torch.tensor([0.12, 0.12, 0.12])
COLOURS = {"red": (0.90, 0.20, 0.15), "green": (0.20, 0.80, 0.25), "blue": (0.20, 0.35, 0.95)}
SHAPES = ("circle", "square", "triangle")
COUNTS = ("one", "two", "three")
RELATIONS = ("above", "below", "left of", "right of")
WEIGHTS = Path(__file__).parent / "weights"

# ---------------------------------------------------------------------------------------------
# Prompts
# ---------------------------------------------------------------------------------------------

def plural(shape, count):
    return shape if count == 1 else shape + "s"


# The 27 classes: class k is CLASSES[k].
CLASSES = [f"{COUNTS[n - 1]} {colour} {plural(shape, n)}" for n in (1, 2, 3) for colour in COLOURS for shape in SHAPES]
THINGS = [(colour, shape) for colour in COLOURS for shape in SHAPES]
PAIRS = [f"a {a[0]} {a[1]} {relation} a {b[0]} {b[1]}"
         for two in combinations(THINGS, 2) for a, b in (two, two[::-1]) for relation in RELATIONS]
# Compositions that t2i never sees in pretraining, though all of their words are familiar: three classes, and
# five of the 36 pairs of things, in all eight relations to each other.
UNSEEN_CLASSES = ["two green circles", "two red triangles", "three blue squares"]
UNSEEN_PAIRS = [caption for k in range(3, 36, 7) for caption in PAIRS[8 * k:8 * k + 8]]
UNSEEN = {*UNSEEN_CLASSES, *UNSEEN_PAIRS}
SEEN_CLASSES = [caption for caption in CLASSES if caption not in UNSEEN]
SEEN_PAIRS = [caption for caption in PAIRS if caption not in UNSEEN]

COUNT_PROMPT = re.compile(rf"({'|'.join(COUNTS)}) ({'|'.join(COLOURS)}) ({'|'.join(SHAPES)})s?$")
THING = rf"a ({'|'.join(COLOURS)}) ({'|'.join(SHAPES)})"
PAIR_PROMPT = re.compile(rf"{THING} ({'|'.join(RELATIONS)}) {THING}$")


class Request(NamedTuple):
    """What a prompt asks for: the things, and the relation of the first to the second, if any."""
    things: tuple            # of (colour, shape)
    relation: str | None


def parse(prompt):
    """The prompt as a Request.  Raises ValueError if the toy's world has no such thing."""
    if match := COUNT_PROMPT.search(prompt):
        count, colour, shape = match.groups()
        return Request(((colour, shape),) * (COUNTS.index(count) + 1), None)
    if match := PAIR_PROMPT.search(prompt):
        colour_a, shape_a, relation, colour_b, shape_b = match.groups()
        return Request(((colour_a, shape_a), (colour_b, shape_b)), relation)
    raise ValueError(f"the toy cannot draw or verify {prompt!r}: ask for one of its classes, such as {CLASSES[9]!r}, "
                     f"or for a pair, such as {PAIRS[0]!r}")


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
    """Whether thing a stands in the relation to b: clear of it by `gap` pixels in that direction."""
    dx = abs(a.x - b.x) - (a.width + b.width) / 2
    dy = abs(a.y - b.y) - (a.height + b.height) / 2
    return {"above": a.y < b.y and dy >= gap, "below": a.y > b.y and dy >= gap,
            "left of": a.x < b.x and dx >= gap, "right of": a.x > b.x and dx >= gap}[relation]


def make_scene(prompt, rng):
    """A random scene that fulfils the prompt: a list of Things, at least four pixels apart.

    Boxes are 8 or 12 pixels wide (8 when there are three) and lie on the grid of the tokenizer's patches."""
    request = parse(prompt)
    while True:                                  # start over until everything fits: no scene is ever half right
        things = []
        for colour, shape in request.things:
            size = 8 if len(request.things) == 3 else rng.choice((8, 12))
            left, top = (4 * rng.randint(0, (SIZE - size) // 4) for _ in range(2))
            thing = Thing(colour, shape, left + size / 2, top + size / 2, size, size)
            if all(any(holds(relation, thing, other, gap=4) for relation in RELATIONS) for other in things):
                things.append(thing)
        if len(things) == len(request.things) and (request.relation is None or holds(request.relation, *things, gap=4)):
            return things


def stencils(boxes, supersample=4):
    """How much of each pixel a circle, a square and a triangle in each box would cover.

    boxes (K, 4): centre x, centre y, width, height, in pixels.  Returns (K, 3, SIZE, SIZE) in [0, 1]."""
    steps = (torch.arange(SIZE * supersample, device=boxes.device) + 0.5) / supersample
    x, y, width, height = (column[:, None, None] for column in boxes.unbind(-1))
    u = (steps[None, None, :] - x) / (width / 2)                     # (K, 1, S) -1 .. 1 within the box
    v = (steps[None, :, None] - y) / (height / 2)                    # (K, S, 1)
    circle = u * u + v * v <= 1
    square = (u.abs() <= 1) & (v.abs() <= 1)
    triangle = (v.abs() <= 1) & (u.abs() <= (v + 1) / 2)             # tip up
    return F.avg_pool2d(torch.stack([circle, square, triangle], dim=1).float(), supersample)


def render(scenes):
    """Pictures of the scenes: (B, 3, SIZE, SIZE) in [0, 1]."""
    images = GROUND.view(1, 3, 1, 1).repeat(len(scenes), 1, SIZE, SIZE)
    for layer in range(max(len(scene) for scene in scenes)):             # the first thing of each scene, the second, ..
        for rows in torch.tensor([i for i, scene in enumerate(scenes) if len(scene) > layer]).split(500):
            things = [scenes[i][layer] for i in rows.tolist()]
            masks = stencils(torch.tensor([thing[2:] for thing in things]))                  # (b, 3, SIZE, SIZE)
            alpha = masks[range(len(things)), [SHAPES.index(thing.shape) for thing in things]][:, None]
            colour = torch.tensor([COLOURS[thing.colour] for thing in things])[:, :, None, None]
            images[rows] = images[rows] * (1 - alpha) + colour * alpha
    return images


# ---------------------------------------------------------------------------------------------
# The verifier: from pixels back to things
# ---------------------------------------------------------------------------------------------

MIN_OVERLAP = 0.85                               # soft intersection over union with the perfect shape
ASPECT = (0.75, 1.34)                            # width / height
RADIUS = (3.0, 6.5)                              # pixels
MAX_STRAY = 0.25                                 # how far the ground may be from its colour, per channel


def connected_components(mask):
    """mask (B, H, W) bool -> labels (B, H, W): 0 outside, and one number for all pixels that hang together."""
    labels = torch.arange(1, mask[0].numel() + 1, device=mask.device).float().view(1, *mask.shape[1:]) * mask
    busy = mask.flatten(1).any(dim=1)            # most masks are empty: no colour but the prompt's is in the picture
    while True:                                  # the largest number floods its component
        flooded = F.max_pool2d(labels[busy, None], 3, stride=1, padding=1)[:, 0] * mask[busy]
        if torch.equal(flooded, labels[busy]):
            return labels
        labels[busy] = flooded


def read_scenes(images):
    """Reads the things off pictures: images (B, 3, SIZE, SIZE) in [0, 1] -> B lists of Things.

    A picture that contains anything else, be it one misshapen blob or a stray stroke, gives None.
    """
    if images.shape[1:] != (3, SIZE, SIZE):
        raise ValueError(f"the toy's verifier reads images (B, 3, {SIZE}, {SIZE}), not {tuple(images.shape)}")
    images = images.float()
    # Unmix: every pixel is the ground plus alpha_c (colour_c - ground), three equations for three alphas.
    ground = GROUND.to(images.device).view(3, 1, 1)
    basis = torch.tensor(list(COLOURS.values()), device=images.device) - GROUND.to(images.device)        # (colours, rgb)
    alpha = torch.einsum("brhw,rc->bchw", images - ground, torch.linalg.inv(basis)).clamp(0, 1)          # (B, 3, H, W)
    planes = alpha.flatten(0, 1)                                                                         # (B * 3, H, W)
    labels = connected_components(planes > 0.5)
    # Number the components of all planes together: (plane, label) as one integer.
    pixels = SIZE * SIZE + 1
    offsets = pixels * torch.arange(len(planes), device=images.device).view(-1, 1, 1)
    components = torch.unique((labels.long() + offsets)[labels > 0])                                     # (K,)
    plane, label = components // pixels, components % pixels
    # One soft mask per component (K of them): its pixels and the half-covered ones around it.
    blob = (labels[plane] == label.view(-1, 1, 1)).float()
    grown = F.max_pool2d(blob[:, None], 3, stride=1, padding=1)[:, 0]                                    # (K, H, W)
    soft = planes[plane] * grown
    centre = torch.arange(SIZE, device=images.device) + 0.5
    columns, rows = soft.amax(dim=1), soft.amax(dim=2)                                                   # (K, W), (K, H)
    width, height = columns.sum(-1), rows.sum(-1)
    boxes = torch.stack([(columns * centre).sum(-1) / width, (rows * centre).sum(-1) / height, width, height], dim=-1)
    # Its shape is the one that overlaps best when drawn into the same box.  (A triangle's tip and
    # corners are too thin to show in the measured box: it is drawn that much larger.)
    perfect = stencils(boxes)                                                                            # (K, 3, H, W)
    perfect[:, 2] = stencils(boxes + boxes.new_tensor([0.0, -0.5, 0.6, 1.0]))[:, 2]
    overlap = (torch.minimum(perfect, soft[:, None]).sum((2, 3)) / torch.maximum(perfect, soft[:, None]).sum((2, 3)))
    overlap, shape = overlap.max(dim=1)
    aspect, radius = width / height, (width + height) / 4
    good = ((overlap >= MIN_OVERLAP) & (aspect >= ASPECT[0]) & (aspect <= ASPECT[1])
            & (radius >= RADIUS[0]) & (radius <= RADIUS[1]))
    # Whatever is not part of a thing must look like the ground.
    covered = torch.zeros(len(images), SIZE, SIZE, device=images.device).index_add(0, plane // 3, grown) > 0
    stray = ((images - ground).abs().amax(dim=1) * ~covered).amax(dim=(1, 2))
    scenes = [[] if clean else None for clean in (stray <= MAX_STRAY).tolist()]
    colours = list(COLOURS)
    for p, s, box, fine in zip(plane.tolist(), shape.tolist(), boxes.tolist(), good.tolist()):
        if not fine:
            scenes[p // 3] = None
        elif scenes[p // 3] is not None:
            scenes[p // 3].append(Thing(colours[p % 3], SHAPES[s], *box))
    return scenes


def fulfils(scene, prompt):
    """Whether a scene, as read off a picture, is exactly what the prompt asks for."""
    request = parse(prompt)
    if scene is None or sorted((t.colour, t.shape) for t in scene) != sorted(request.things):
        return False
    if request.relation is None:
        return True
    a, b = sorted(scene, key=lambda thing: (thing.colour, thing.shape) != request.things[0])     # a comes first
    return holds(request.relation, a, b)


def verify(images, prompts):
    """The reward "shapes": 1 where a picture shows exactly what its prompt asks for, else 0.

    images (B, 3, SIZE, SIZE) in [0, 1], prompts B strings -> (B,) float."""
    right = [fulfils(scene, prompt) for scene, prompt in zip(read_scenes(images), prompts, strict=True)]
    return torch.tensor(right, dtype=torch.float32, device=images.device)


def verify_all(images, prompts):
    """What c2i's runs report: {"verified": (B,)}."""
    return {"verified": verify(images, prompts)}


def verify_by_kind(images, prompts):
    """What t2i's runs report: the same, and for each kind of caption apart, NaN for captions of another kind."""
    right = verify(images, prompts)
    unseen = torch.tensor([prompt in UNSEEN for prompt in prompts], device=right.device)
    placed = torch.tensor([parse(prompt).relation is not None for prompt in prompts], device=right.device)
    kinds = {"seen": ~unseen, "unseen": unseen, "counting": ~placed, "position": placed}
    return {"verified": right} | {f"verified/{kind}": right.masked_fill(~mask, torch.nan) for kind, mask in kinds.items()}


def coarse_layout(scene, cell=8):
    """Which things are in which cells of a coarse grid, as one hashable value."""
    return tuple(sorted((t.colour, t.shape, int(t.x // cell), int(t.y // cell)) for t in scene))


def distinct_in(n, values):
    """How many different values to expect in n of them, drawn without replacement.  Needs len(values) >= n."""
    counts = Counter(values).values()
    return sum(1 - math.comb(len(values) - count, n) / math.comb(len(values), n) for count in counts)


def spread(images, prompts):
    """How varied the right pictures of a prompt are; wrong ones do not count, for junk is varied, too.

    images (B, 3, SIZE, SIZE) in [0, 1].  Four means over prompts: "distance", L1 per pixel between two
    pictures; "centres", the standard deviation of the place of single things, and "sizes", of the size of one or two
    things, in pixels; "layouts", how many different coarse layouts to expect in eight pictures.
    None where there are too few right pictures."""
    right = {}
    for image, scene, prompt in zip(images, read_scenes(images), prompts, strict=True):
        if fulfils(scene, prompt):
            right.setdefault(prompt, []).append((image, scene))
    parts = {"distance": [], "centres": [], "sizes": [], "layouts": []}
    for prompt, pictures in right.items():
        if len(pictures) < 2:
            continue
        pixels = torch.stack([image.flatten() for image, _ in pictures])
        parts["distance"].append(torch.pdist(pixels, p=1).mean().item() / pixels.shape[1])
        things = torch.tensor([thing[2:] for _, scene in pictures for thing in scene])             # (K, 4)
        if len(pictures) == len(things):
            parts["centres"].append(things[:, :2].std(dim=0).mean().item())
        if len(parse(prompt).things) < 3:
            parts["sizes"].append(things[:, 2:].mean(dim=1).std().item())
        if len(pictures) >= 8:
            parts["layouts"].append(distinct_in(8, [coarse_layout(scene) for _, scene in pictures]))
    return {name: sum(values) / len(values) if values else None for name, values in parts.items()}


# ---------------------------------------------------------------------------------------------
# Captions as features: what Flan-T5 does for LlamaGen
# ---------------------------------------------------------------------------------------------

WORDS = ["a", *COUNTS, *COLOURS, *SHAPES, *(s + "s" for s in SHAPES), "above", "below", "left", "right", "of"]
CAPTION_LENGTH = 8
CONTEXTS = (None, *RELATIONS)
CAPTION_DIM = len(CONTEXTS) * CAPTION_LENGTH * len(WORDS)


def encode_captions(captions):
    """Features (B, 8, CAPTION_DIM) and mask (B, 8) of captions, padded on the left as LlamaGen's are.

    A word's feature is one-hot in the word, its place and the caption's relation together.  The place has
    to be in it, for the transformer cannot tell: without rotation, all condition tokens are alike to its
    attention.  The relation is in it because T5, too, gives words in their context: the "red" of what
    stands above is not the "red" of what stands below."""
    features = torch.zeros(len(captions), CAPTION_LENGTH, CAPTION_DIM)
    mask = torch.zeros(len(captions), CAPTION_LENGTH, dtype=torch.bool)
    for b, caption in enumerate(captions):
        context = CONTEXTS.index(parse(caption).relation)
        words = (COUNT_PROMPT.search(caption) or PAIR_PROMPT.search(caption)).group().split()
        for place, word in enumerate(words):
            slot = CAPTION_LENGTH - len(words) + place
            features[b, slot, (context * CAPTION_LENGTH + place) * len(WORDS) + WORDS.index(word)] = 1
            mask[b, slot] = True
    return features, mask


# ---------------------------------------------------------------------------------------------
# The models
# ---------------------------------------------------------------------------------------------

VQ_CONFIG = VQConfig(ch=16, ch_mult=(1, 2, 2), z_channels=32, codebook_size=128, codebook_embed_dim=8)
GPT = dict(dim=128, n_layer=3, n_head=4, vocab_size=128, block_size=36, multiple_of=8)
CONFIGS = {
    "c2i": GPTConfig(**GPT, num_classes=len(CLASSES)),
    "t2i": GPTConfig(**GPT, model_type="t2i", cls_token_num=CAPTION_LENGTH, caption_dim=CAPTION_DIM),
}


def load(task, folder=WEIGHTS, gpt_path="", vq_path=""):
    """The pretrained toy, (Transformer, VQModel), for the task "c2i" or "t2i"; the paths name files of your own."""
    gpt = load_weights(Transformer(CONFIGS[task]), gpt_path or Path(folder) / f"toy_{task}.pt")
    return gpt, load_weights(VQModel(VQ_CONFIG), vq_path or Path(folder) / "toy_vq.pt").requires_grad_(False)


# ---------------------------------------------------------------------------------------------
# Pretraining, from nothing
# ---------------------------------------------------------------------------------------------

def batches(n, batch_size, steps, rng):
    """Indices of `steps` random batches out of n examples."""
    for _ in range(steps):
        yield torch.tensor(rng.sample(range(n), batch_size))


def cosine(step, steps, warmup=20):
    """Learning-rate factor: a short linear warm-up, then half a cosine down to zero."""
    return min(1.0, (step + 1) / warmup) * 0.5 * (1 + math.cos(math.pi * step / steps))


def pretrain(loss_of, model, steps, lr, weight_decay, data_size, batch_size, rng, name, after_step=None):
    """AdamW on loss_of(indices) with a cosine schedule.  The loop of all three pretrainings."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=weight_decay)
    bar = tqdm(batches(data_size, batch_size, steps, rng), total=steps, desc=name)
    for step, index in enumerate(bar):
        optimizer.param_groups[0]["lr"] = lr * cosine(step, steps)
        loss = loss_of(index)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        if after_step is not None:
            after_step(step)
        bar.set_postfix(loss=f"{loss.item():.3f}")
    return model


GROUND_CODE = 0                                  # the one code for a patch of nothing but ground


def ground_patches(images):
    """Which patches show nothing but ground: images (B, 3, SIZE, SIZE) in [0, 1] -> (B, N) bool."""
    f = 2 ** (len(VQ_CONFIG.ch_mult) - 1)
    far = (images - GROUND.view(1, 3, 1, 1)).abs().amax(dim=1, keepdim=True)         # (B, 1, SIZE, SIZE)
    return F.max_pool2d(far, f).flatten(1) < 0.01


@torch.no_grad()
def restart_dead_codes(vq, images, ground):
    """Moves the codes that training has not used lately onto features of the given pictures, of what is not ground."""
    latest = vq.quantize.codebook_used[-8192:].long()
    dead = (torch.bincount(latest, minlength=vq.config.codebook_size) == 0).nonzero()[:, 0]
    features = vq.features(images)[~ground]                          # (M, D)
    vq.quantize.embedding.weight[dead] = features[torch.randint(len(features), (len(dead),))]


def pretrain_vq(images, rng, steps=2400):
    """A tokenizer for the pictures (M, 3, SIZE, SIZE) in [0, 1]."""
    vq = VQModel(VQ_CONFIG)
    ground = ground_patches(images)                                  # (M, N)
    images = images * 2 - 1

    def loss_of(index):
        x, g = images[index], ground[index]
        z = vq.features(x)                                           # (b, N, D)
        code, vq_loss = vq.quantise(z, torch.where(g, GROUND_CODE, vq.quantize.nearest(z)))
        reconstruction = vq.paint(code, *[isqrt(z.shape[1])] * 2)
        # Left alone, the encoder tells of the neighbours in the ground's patches, and 80 codes look all the same.
        # The transformer would have to learn that noise, and GRPO to learn in spite of it.
        cosines = z[g] @ vq.quantize.codes().detach().T              # (K, V)
        ground_loss = F.cross_entropy(10 * cosines, torch.full((len(cosines),), GROUND_CODE))
        # A large weight on vq_loss freezes the codes before they are good, and the verifier sees it.
        return F.mse_loss(reconstruction, x) + 0.3 * F.l1_loss(reconstruction, x) + 0.1 * vq_loss + 0.02 * ground_loss

    def after_step(step):
        if step % 25 == 24 and step < 0.7 * steps:
            chosen = rng.sample(range(len(images)), 32)
            restart_dead_codes(vq, images[chosen], ground[chosen])

    return pretrain(loss_of, vq, steps, 5e-3, 0.0, len(images), 8, rng, "tokenizer", after_step)


# Early enough to leave reinforcement learning something to do.
STEPS = {"c2i": 800, "t2i": 1200}


def pretrain_gpt(task, tokens, cond, cond_mask, rng, steps):
    """A transformer that writes the tokens (M, N) under their conditions, by maximum likelihood."""
    gpt = Transformer(CONFIGS[task])

    def loss_of(index):
        c = cond[index]
        drop = torch.rand(len(index)) < 0.1      # sometimes no condition, so that guidance has a null branch
        c = torch.where(drop.view(-1, *[1] * (c.ndim - 1)), gpt.null_cond(c), c)
        logits = gpt(tokens[index], c, None if cond_mask is None else cond_mask[index])
        return F.cross_entropy(logits.flatten(0, 1), tokens[index].flatten())

    return pretrain(loss_of, gpt, steps, 3e-3, 0.05, len(tokens), 32, rng, task)


def save(model, path):
    """LlamaGen's checkpoint format, in half precision."""
    torch.save({"model": {name: w.half() for name, w in model.state_dict().items()}}, path)


def main(argv=None):
    parser = argparse.ArgumentParser(description="Pretrains the toy's tokenizer and transformers from nothing.")
    parser.add_argument("--out", type=Path, default=WEIGHTS, help="folder for the three checkpoints (default: weights)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--scenes", type=int, default=16000, help="pictures per task (default: 16000)")
    parser.add_argument("--only", choices=("vq", "c2i", "t2i"), help="remake this one, with the tokenizer in --out")
    args = parser.parse_args(argv)
    args.out.mkdir(parents=True, exist_ok=True)

    def rng(*purpose):                           # every purpose has a stream of its own, so that one can change alone
        torch.manual_seed(args.seed)
        return random.Random(f"{args.seed} {purpose}")

    pick = rng("t2i prompts").choice
    prompts = {"c2i": [CLASSES[k % len(CLASSES)] for k in range(args.scenes)],
               "t2i": [pick(SEEN_CLASSES if k % 2 else SEEN_PAIRS) for k in range(args.scenes)]}

    def pictures(task):
        stream = rng(task, "scenes")
        return render([make_scene(text, stream) for text in prompts[task]])

    if args.only in (None, "vq"):
        save(pretrain_vq(torch.cat([pictures(task) for task in prompts]), rng("tokenizer")), args.out / "toy_vq.pt")
    vq = load_weights(VQModel(VQ_CONFIG), args.out / "toy_vq.pt")        # in half precision, as everybody will have it
    for task, texts in prompts.items():
        if args.only in (None, task):
            with torch.no_grad():
                tokens = torch.cat([vq.encode(chunk * 2 - 1) for chunk in pictures(task).split(256)])
            right = verify(paint(vq, tokens[:2000]), texts[:2000]).mean()
            print(f"{task}: the verifier finds {right:.1%} of the tokenizer's reconstructions right")
            conditions = ((torch.tensor([CLASSES.index(text) for text in texts]), None) if task == "c2i"
                          else encode_captions(texts))
            save(pretrain_gpt(task, tokens, *conditions, rng(task), STEPS[task]), args.out / f"toy_{task}.pt")
    print(f"wrote {', '.join(str(path) for path in sorted(args.out.glob('toy_*.pt')))}")


if __name__ == "__main__":
    main()
