"""Comparing checkpoints: many pictures of each, what they are worth, and the table of it.

Each picture has a random stream of its own.  What picture number i becomes depends on the seed, on
i and on its prompt: not on what is drawn beside it, on how many processes draw, nor on what
interrupted them (but for rounding, which may differ with the number of rows).  So pictures of two
checkpoints can be compared one by one.

What is drawn or scored is kept, but for the scores of a user's own reward files.  It is found again
by a key that holds all that it depends on, weights and source code included.

Everything measured is first a number of each prompt: the mean over its pictures, or how much they
differ.  So intervals are over prompts, and differences are paired prompt by prompt.
"""

import ast
import hashlib
import inspect
import json
import math
from functools import partial
from modulefinder import ModuleFinder
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from tqdm import tqdm

import argrpo
import reward
import toy
from harness.device import Sampler
from harness.logs import write_atomically, write_json
from harness.page import read, sheet
from reward import to_uint8

SHARD = 64                                       # pictures of a file


# ---------------------------------------------------------------------------------------------
# Keys
# ---------------------------------------------------------------------------------------------

def digest(*things):
    """A few letters that tell these tensors and texts, or whatever prints differently, from others.
    """
    total = hashlib.blake2b(digest_size=8)
    for thing in things:
        if isinstance(thing, torch.Tensor):
            total.update(f"{thing.dtype} {tuple(thing.shape)}".encode())
            total.update(thing.detach().cpu().flatten().view(torch.uint8).numpy())
        else:
            total.update(repr(thing).encode())
    return total.hexdigest()


def source(path):
    """A digest of a Python file, and of all files beside it or of this house that it imports, also
    inside functions.  Comments do not count."""
    path = Path(path).resolve()
    finder = ModuleFinder([str(path.parent), str(Path(__file__).parents[1])])
    finder.run_script(str(path))
    files = {module.__file__ for module in finder.modules.values() if module.__file__}
    return digest(str(path), *[ast.dump(ast.parse(Path(file).read_bytes()))
                               for file in sorted(files)])


def fingerprint(module):
    """What tells a module from others: its weights, its configuration and its source."""
    return digest(source(inspect.getsourcefile(type(module))), vars(module).get("config"),
                  *module.state_dict().values())


# ---------------------------------------------------------------------------------------------
# Drawing
# ---------------------------------------------------------------------------------------------

def draw(model, vq, prompts, index, numbers, seed, best_of=1, **policy):
    """The pictures with those numbers, of the prompts at index (B,): images (B, 3, H, W) in [0, 1]
    and logp (B, N).  policy is what `generate` takes: cfg_scale, temperature, top_k, top_p.

    Of best_of draws, each is the one that the model itself finds likeliest."""
    device = next(model.parameters()).device
    keys = [(number,) if k == 0 else (number, k) for number in numbers for k in range(best_of)]
    streams = [argrpo.rng_for(device, seed, "image", *key) for key in keys]
    uniform = torch.stack([torch.rand(model.config.block_size, generator=rng, dtype=torch.float64,
                                      device=device) for rng in streams])
    _, logp, images = argrpo.draw_images(model, vq, prompts, index.repeat_interleave(best_of),
                                         None, uniform=uniform, micro_batch=16, **policy)
    likeliest = logp.sum(1).view(-1, best_of).argmax(1)                              # (B,)
    kept = torch.arange(len(index), device=likeliest.device) * best_of + likeliest
    return images[kept], logp[kept]


DRAWING = inspect.getsource(draw)


def drawing_of(model, vq, prompts, index, seed, size, **policy):
    """Everything that pictures depend on, by name.  A device has random streams of its own."""
    conditions = [part for k in range(len(prompts.texts))
                  for part in prompts.pick(torch.tensor([k]), "cpu")]
    return dict(transformer=fingerprint(model), tokenizer=fingerprint(vq),
                prompts=digest(prompts.texts, index, *conditions), code=digest(DRAWING),
                device=next(model.parameters()).device.type, seed=seed, size=size, shard=SHARD,
                images=len(index), **policy)


def draw_shards(model, vq, prompts, index, folder, seed, size=None, shard=(0, 1), **policy):
    """Draws picture i of prompt index[i], for all i, into files of SHARD pictures in the folder.

    A file, such as 00003.npz, holds `images` (n, H, W, 3) uint8, at most `size` pixels wide,
    `entropy` (n,), -log pi a token, and as JSON the `drawing` that made them.  Files that are there
    are kept: a draw goes on where it stopped.  shard = (rank, count) takes this process's share.
    Raises ValueError if the folder holds pictures of another model or other settings."""
    rank, count = shard
    folder.mkdir(parents=True, exist_ok=True)
    drawing = drawing_of(model, vq, prompts, index, seed, size, **policy)
    for path in shards(folder):
        known = json.loads(str(read_shard(path, "drawing", "{}")))
        others = {name for name in {**drawing, **known} if drawing.get(name) != known.get(name)}
        if others:
            raise ValueError(f"{folder} holds pictures of another model, other prompts or settings "
                             f"({', '.join(sorted(others))}): name another folder, or remove it")
    mine = list(enumerate(torch.arange(len(index)).split(SHARD)))[rank::count]
    left = [(k, numbers) for k, numbers in mine if not shard_path(folder, k).exists()]
    sampler = Sampler()(model)
    if rank == 0:
        left = tqdm(left, desc=f"drawing {folder.name}", unit="shard")
    for k, numbers in left:
        images, logp = draw(sampler, vq, prompts, index[numbers], numbers.tolist(), seed, **policy)
        arrays = dict(images=to_uint8(reduced(images.cpu(), size)),
                      entropy=-logp.mean(1).float().cpu(), drawing=json.dumps(drawing))
        write_atomically(shard_path(folder, k), partial(np.savez, **arrays))


def reduced(images, size=None):
    """Images (B, 3, H, W) in [0, 1] resized to at most size x size."""
    if size is None or images.shape[-1] <= size:
        return images
    images = F.interpolate(images, size=(size, size), mode="bicubic", antialias=True)
    return images.clamp(0, 1)


def shard_path(folder, k):
    return folder / f"{k:05}.npz"


def shards(folder):
    """The complete shards of a folder, in order: their paths."""
    return sorted(folder.glob("[0-9][0-9][0-9][0-9][0-9].npz"))


def read_shard(path, name="images", default=None):
    """An array of a shard, or the default if it has none of that name.  Raises ValueError, naming
    the file, for a damaged one: it is drawn again if it is removed."""
    return read(path, lambda file: np.load(file).get(name, default))


def read_shards(folder, name="images"):
    """One array of all shards, joined."""
    return np.concatenate([read_shard(path, name) for path in shards(folder)])


def as_images(pictures):
    """(n, H, W, 3) uint8 -> (n, 3, H, W) float in [0, 1]."""
    return torch.as_tensor(pictures).permute(0, 3, 1, 2).float() / 255


# ---------------------------------------------------------------------------------------------
# Scoring: numbers of each picture, and of each prompt
# ---------------------------------------------------------------------------------------------

def judges_of(reward_fn, spec, measure):
    """What scores pictures: [(key, function(images, texts) -> {name: (B,)}), ...].

    reward_fn is the RewardSet of the spec, maybe empty; measure is such a function, or None.  A key
    says what its scores depend on besides pictures and texts.  It is None for a user's own file:
    nobody knows what that reads."""
    judges = []
    for (name, weighted), (file, own, _) in zip(reward_fn.rewards.items(), reward.items_of(spec)):
        key = None if file else f"{name} {source(reward.file_of(own.partition(':')[0]))}"
        judges.append((key, partial(parts_of, reward.RewardSet({name: weighted}))))
    if measure is not None:
        judges.append((f"measured {source(inspect.getsourcefile(measure))}", measure))
    return judges


def parts_of(reward_fn, images, texts):
    return reward_fn(images, texts)[1]


def score_shards(folder, texts, judges, device):
    """Scores of all pictures, {name: (B,)}.  texts are their prompts, judges as of `judges_of`.

    What a judge with a key says of these pictures and texts is kept in files beside the shards."""
    columns, first = {}, 0
    for path in shards(folder):
        kept, pictures = path.with_suffix(".json"), torch.from_numpy(read_shard(path))
        known = read(kept, json.load)
        some = texts[first:first + len(pictures)]
        first += len(pictures)
        for judge, function in judges:
            key = f"{judge} {digest(pictures, some)}"
            scores = known.get(key)
            if scores is None:
                found = function(as_images(pictures).to(device), some)
                scores = {name: part.tolist() for name, part in found.items()}
                if judge:
                    known[key] = scores
                    write_json(kept, known)
            for name, values in scores.items():
                columns.setdefault(name, []).extend(values)
    columns["entropy"] = read_shards(folder, "entropy").tolist()
    return {name: torch.tensor(values) for name, values in columns.items()}


def by_prompt(values, count):
    """The mean of each prompt's known values: values (B,), equally many of each, prompt after
    prompt -> (count,), NaN if none is known."""
    return values.double().view(count, -1).nanmean(dim=1)


def small_pixels(images):
    """Images (B, 3, H, W) in [0, 1] -> (B, C) uint8, their pixels at 64 x 64 at most."""
    side = min(64, images.shape[-1])
    small = F.interpolate(images, size=(side, side), mode="area")
    return to_uint8(small).movedim(-1, 1).flatten(1)


@torch.no_grad()
def distances(folder, count, features, device):
    """How much the pictures of a prompt differ: {"distance/pixels": (count,), "distance/<name>"}.

    Pixels: the mean L1 distance of two pictures.  Features, of length one: 1 minus the mean cosine,
    which is half the mean square of their L2 distance.  features is {name: function}, asked about
    pictures on the device.  Pictures are equally many of each prompt; of one alone it is NaN."""
    found = {}
    for name, function in {"pixels": small_pixels, **features}.items():
        x = torch.cat([function(as_images(read_shard(path)).to(device)).cpu()
                       for path in shards(folder)])                                  # (B, C)
        if name == "pixels":
            values = [torch.pdist(own / 255, p=1).mean() / own.shape[1] for own in x.chunk(count)]
        else:
            values = [torch.pdist(own.float()).square().mean() / 2 for own in x.chunk(count)]
        found[f"distance/{name}"] = torch.stack(values)
    return found


def geneval_summary(right, tags):
    """GenEval's figures as columns (M,): right (M,) is each prompt's share of right pictures, tags
    its category.

    All pictures; prompts with a right picture at least; and the pictures of each category, NaN
    outside of it.  The overall score is the mean of the categories' (`overall`): each counts the
    same, however many prompts it has."""
    columns = {"geneval pictures": right, "geneval prompts": (right > 0).double()}
    for tag in dict.fromkeys(tags):
        outside = torch.tensor([other != tag for other in tags])
        columns[f"geneval/{tag}"] = right.double().masked_fill(outside, math.nan)
    return columns


def columns_of(folder, texts, tags, reward_fn, settings, device):
    """Everything about the pictures in a folder, settings.samples of each text: {metric: (M,)}.

    reward_fn is a RewardSet: by the features of a reward that has some it is said, too, how much
    pictures differ.  tags are GenEval's categories of the texts, or [].  settings has preset
    and task: pictures of the toy are measured by its verifier."""
    drawn = [text for text in texts for _ in range(settings.samples)]
    rewards = {name: function for name, (function, _) in reward_fn.rewards.items()}
    measure = getattr(rewards.get("imagenet"), "right_class", None)
    if settings.preset == "toy":
        measure = toy.verify_by_kind if settings.task == "t2i" else toy.verify_all
    judges = judges_of(reward_fn, settings.rewards, measure)
    scores = score_shards(folder, drawn, judges, device)
    columns = {name: by_prompt(values, len(texts)) for name, values in scores.items()}
    if tags and "geneval" in columns:            # right is what meets all demands
        columns |= geneval_summary(by_prompt(scores["geneval"] >= 1, len(texts)), tags)
    features = {name: function.features for name, function in rewards.items()
                if hasattr(function, "features")}
    columns |= distances(folder, len(texts), features, device)
    if settings.preset == "toy":
        for name, values in toy.spread_by_prompt(as_images(read_shards(folder)), drawn).items():
            known = [values.get(text, math.nan) for text in texts]
            columns[f"spread/{name}"] = torch.tensor(known, dtype=torch.float64)
    return columns


# ---------------------------------------------------------------------------------------------
# How sure a number is
# ---------------------------------------------------------------------------------------------

def bootstrap(statistic, *columns, rounds=2000, level=0.95, seed=0):
    """A statistic and its percentile bootstrap interval (Efron 1979): {"value", "low", "high"}.

    columns are tensors (K, M) with a number for each prompt, or for each image: NaN where it is not
    known.  statistic takes them, or (K, rounds, M), and gives a number, or (rounds,).
    What is drawn again, with replacement, are whole rows: numbers of the same prompt stay together,
    so that the difference of two columns is a paired one.  The interval holds `level` of the
    results; both ends are NaN for fewer than two rows."""
    columns = [column.double() for column in columns]
    count, found = columns[0].shape[-1], {"value": statistic(*columns).item()}
    if count < 2:
        return found | {"low": math.nan, "high": math.nan}
    rows = torch.randint(count, (rounds, count), generator=torch.Generator().manual_seed(seed))
    results = statistic(*[column[..., rows] for column in columns])                  # (rounds,)
    tails = torch.tensor([(1 - level) / 2, (1 + level) / 2], dtype=results.dtype)
    return found | dict(zip(("low", "high"), results.nanquantile(tails).tolist()))


def mean(columns):
    """The mean of what is known, (K, ..., M) -> (...): the same weight for each of the K columns,
    such as GenEval's categories."""
    return columns.nanmean(dim=-1).mean(dim=0)


def difference(before, after):
    """How much the mean has changed, over the rows that both know."""
    return mean(after - before)


def ratio(before, after):
    """D: the mean of the ratios of the K columns after to those before, each the ratio of means
    over the rows that it knows."""
    return (after.nanmean(dim=-1) / before.nanmean(dim=-1)).mean(dim=0)


# ---------------------------------------------------------------------------------------------
# The table
# ---------------------------------------------------------------------------------------------

def compare(tables):
    """Rows of the table: {metric: [{"value", "low", "high", "change"} of each checkpoint]}.

    tables are the checkpoints' {metric: (M,)}, the first of them the base.  Of "spread/<part>" the
    ratios to the base's are reported, and as D the mean of these ratios."""
    parts = [name for name in tables[0] if name.startswith("spread/")]
    wanted = {name: [name] for name in tables[0] if name not in parts
              and not all(table[name].isnan().all() for table in tables)}
    wanted["geneval/overall"] = [name for name in tables[0] if name.startswith("geneval/")]
    wanted |= {"D": parts} | {f"D/{name.removeprefix('spread/')}": [name] for name in parts}
    rows = {}
    for row, names in wanted.items():
        if not names:                            # no captions of GenEval, or not the toy
            continue
        columns = [torch.stack([table[name] for name in names]) for table in tables]     # (K, M)
        if names[0] in parts:
            rows[row] = [bootstrap(ratio, columns[0], own) for own in columns]
        else:
            rows[row] = [bootstrap(mean, own) | {"change": bootstrap(difference, columns[0], own)}
                         for own in columns]
    return rows


def in_words(found, first):
    """A cell of the table as text; the first column has no change."""
    text = f"{found['value']:.4g}"
    if not math.isnan(found["low"]):
        text += f" [{found['low']:.3g}, {found['high']:.3g}]"
    change = found.get("change")
    if first or not change or math.isnan(change["low"]):
        return text
    if change["low"] <= 0 <= change["high"]:
        return text + " (no difference beyond noise)"
    return text + f" ({change['value']:+.3g})"


def as_markdown(rows, figures, labels, settings, count):
    """The table: rows as of `compare`, below them figures [{name: number} of each checkpoint]."""
    cells = {"": labels}
    cells |= {name: [in_words(found, i == 0) for i, found in enumerate(row)]
              for name, row in rows.items()}
    cells |= {name: [f"{some[name]:.4g}" for some in figures] for name in figures[0]}
    lines = [f"| {' | '.join(map(in_a_cell, [name, *row]))} |" for name, row in cells.items()]
    return "\n".join([
        f"{count} prompts, {settings.samples} pictures of each, guidance {settings.cfg_scale:g}, "
        f"temperature {settings.temperature:g}, seed {settings.seed}. In brackets: 95% intervals, "
        "by bootstrap over prompts; in parentheses: the change to "
        f"{labels[0]}, paired prompt by prompt.", "",
        lines[0].replace("|  |", "| |", 1), "|---" * (len(labels) + 1) + "|", *lines[1:], "", ""])


def in_a_cell(text):
    """A text without what would end a cell or a row of a Markdown table."""
    return " ".join(text.replace("|", "\\|").split())


def draw_grid(path, folders, texts, samples, labels, prompts=8, each=4):
    """The same pictures of all checkpoints side by side, a row a prompt, in one picture."""
    blocks = []
    for k in torch.linspace(0, len(texts) - 1, min(prompts, len(texts))).long().tolist():
        numbers = range(k * samples, k * samples + min(each, samples))
        for folder in folders:
            pictures = [read_shard(shard_path(folder, i // SHARD))[i % SHARD] for i in numbers]
            blocks.append((texts[k], np.stack(pictures), ()))
    side = blocks[0][1].shape[2]
    sheet(blocks, len(labels), side * max(1, 72 // side), labels).save(path)
