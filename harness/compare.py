"""Comparing checkpoints: many pictures of each, what they are worth, and the table of it.

Each picture has a random stream of its own.  What picture number i becomes depends on the seed, on
i and on its prompt: not on what is drawn beside it, on how many processes draw, nor on what
interrupted them (but for rounding, which may differ with the number of rows).  So pictures of two
checkpoints can be compared one by one.

Everything measured is first a number of each prompt: the mean over its pictures, or how much they
differ.  So intervals are over prompts, and differences are paired prompt by prompt.
"""

import hashlib
import json
import math
import os

import numpy as np
import torch
import torch.nn.functional as F
from tqdm import tqdm

import argrpo
import toy
from harness.checkpoints import write_atomically, write_json
from harness.page import sheet
from reward import to_uint8

SHARD = 64                                       # pictures of a file


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


def fingerprint(model):
    """A few letters that tell one model's weights from another's."""
    digest = hashlib.blake2b(digest_size=8)
    for name, p in model.state_dict().items():
        some = p.detach().flatten()[:64].float().cpu()
        digest.update(f"{name} {p.float().sum().item():.6e} {some.tolist()}".encode())
    return digest.hexdigest()


def draw_shards(model, vq, prompts, index, folder, seed, size=None, shard=(0, 1), **policy):
    """Draws picture i of prompt index[i], for all i, into files of SHARD pictures in the folder.

    A file, such as 00003.npz, holds `images` (n, H, W, 3) uint8, at most `size` pixels wide, and
    `entropy` (n,), -log pi a token.  Files that are there are kept: a draw goes on where it
    stopped.  shard = (rank, count) takes this process's share of the files.
    Raises ValueError if the folder holds pictures of another model or other settings."""
    rank, count = shard
    folder.mkdir(parents=True, exist_ok=True)
    texts = hashlib.blake2b(repr(prompts.texts).encode(), digest_size=8).hexdigest()
    made = dict(model=fingerprint(model), seed=seed, size=size, images=len(index), prompts=texts,
                **policy)
    path = folder / "drawn.json"
    if path.exists() and json.loads(path.read_text()) != made:
        raise ValueError(f"{folder} holds pictures of another model, other prompts or settings: "
                         "name another folder, or remove it")
    if rank == 0 and not path.exists():
        write_json(path, made)
    mine = list(enumerate(torch.arange(len(index)).split(SHARD)))[rank::count]
    left = [(k, numbers) for k, numbers in mine if not shard_path(folder, k).exists()]
    for k, numbers in tqdm(left, desc=f"drawing {folder.name}", unit="shard", disable=rank > 0
                           or bool(os.environ.get("TQDM_DISABLE"))):
        images, logp = draw(model, vq, prompts, index[numbers], numbers.tolist(), seed, **policy)
        arrays = dict(images=to_uint8(reduced(images.cpu(), size)),
                      entropy=-logp.mean(1).float().cpu())
        write_atomically(shard_path(folder, k), lambda file, a=arrays: np.savez(file, **a))


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


def read_shard(path, name="images"):
    with np.load(path) as file:
        return file[name]


def read_shards(folder, name="images"):
    """One array of all shards, joined."""
    return np.concatenate([read_shard(path, name) for path in shards(folder)])


def read_pictures(folder, numbers):
    """The pictures with those numbers: (n, H, W, 3) uint8."""
    return np.stack([read_shard(shard_path(folder, i // SHARD))[i % SHARD] for i in numbers])


def as_images(pictures):
    """(n, H, W, 3) uint8 -> (n, 3, H, W) float in [0, 1]."""
    return torch.from_numpy(pictures).permute(0, 3, 1, 2).float() / 255


# ---------------------------------------------------------------------------------------------
# Scoring: numbers of each picture, and of each prompt
# ---------------------------------------------------------------------------------------------

def score_shards(folder, texts, reward_fn, measure, device):
    """Scores of all pictures, {name: (B,)}, in files beside the shards: each is computed once.

    texts are the pictures' prompts.  reward_fn is a RewardSet or None, measure(images, texts) ->
    {name: (B,)} or None."""
    columns, first = {}, 0
    names = [] if reward_fn is None else list(reward_fn.rewards)
    for path in shards(folder):
        kept = path.with_suffix(".json")
        scores = json.loads(kept.read_text()) if kept.exists() else {}
        pictures = read_shard(path)
        some = texts[first:first + len(pictures)]
        first += len(pictures)
        images = as_images(pictures).to(device)
        if set(names) - set(scores):
            _, parts = reward_fn(images, some)
            scores |= {name: part.tolist() for name, part in parts.items()}
        if measure is not None and "measured" not in scores:
            scores["measured"] = {name: part.tolist()
                                  for name, part in measure(images, some).items()}
        write_json(kept, scores)
        flat = {name: scores[name] for name in names} | scores.get("measured", {})
        for name, values in flat.items():
            columns.setdefault(name, []).extend(values)
    columns["entropy"] = read_shards(folder, "entropy").tolist()
    return {name: torch.tensor(values) for name, values in columns.items()}


def by_prompt(values, index, count):
    """The mean of each prompt's known values: values (B,), index (B,) -> (count,), NaN if none."""
    known = ~values.isnan()
    total = torch.zeros(count, dtype=torch.float64)
    total = total.index_add(0, index[known], values[known].double())
    return total / torch.bincount(index[known], minlength=count)


@torch.no_grad()
def distances(folder, index, count, features, device):
    """How much the pictures of a prompt differ: {"distance/pixels": (count,), "distance/<name>"}.

    Pixels: the mean L1 distance of two pictures, of at most 64 x 64 pixels.  Features: 1 minus the
    mean cosine.  features is {name: function}, asked about pictures on the device."""
    seen = {name: [] for name in ("pixels", *features)}
    for path in shards(folder):
        images = as_images(read_shard(path))
        side = min(64, images.shape[-1])
        small = F.interpolate(images, size=(side, side), mode="area")
        seen["pixels"].append(to_uint8(small).movedim(-1, 1).flatten(1))
        for name, function in features.items():
            seen[name].append(function(images.to(device)).cpu())
    found = {f"distance/{name}": torch.full((count,), math.nan) for name in seen}
    for name, batches in seen.items():
        x = torch.cat(batches)
        for k in range(count):
            own = x[index == k].float()
            n = len(own)
            if n < 2:
                continue
            if name == "pixels":
                value = torch.pdist(own / 255, p=1).mean() / own.shape[1]
            else:
                value = 1 - ((own @ own.T).sum() - n) / (n * (n - 1))
            found[f"distance/{name}"][k] = value
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


def columns_of(folder, texts, tags, index, reward_fn, settings, device):
    """Everything about the pictures in a folder, those of texts[index[i]]: {metric: (M,)}.

    reward_fn is a RewardSet or None: by the features of a reward that has some it is said, too, how
    much pictures differ.  tags are GenEval's categories of the texts, or [].  settings has preset
    and task: pictures of the toy are measured by its verifier."""
    drawn, rewards, measure = [texts[k] for k in index.tolist()], {}, None
    if reward_fn is not None:
        rewards = {name: function for name, (function, _) in reward_fn.rewards.items()}
    if settings.preset == "toy":
        measure = toy.verify_by_kind if settings.task == "t2i" else toy.verify_all
    elif "imagenet" in rewards:
        measure = rewards["imagenet"].right_class
    scores = score_shards(folder, drawn, reward_fn, measure, device)
    columns = {name: by_prompt(values, index, len(texts)) for name, values in scores.items()}
    if tags and "geneval" in columns:            # right is what meets all demands
        right = by_prompt((scores["geneval"] >= 1).double(), index, len(texts))
        columns |= geneval_summary(right, tags)
    features = {name: function.features for name, function in rewards.items()
                if hasattr(function, "features")}
    columns |= distances(folder, index, len(texts), features, device)
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

    columns are tensors (..., M) with a number for each prompt, or for each image: NaN where it is
    not known.  statistic takes them, or with more axes before the last one, and gives a number.
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


def mean(column):
    """The mean of what is known: (..., M) -> (...)."""
    return column.nanmean(dim=-1)


def difference(before, after):
    """How much the mean has changed, over the rows that both know."""
    return (after - before).nanmean(dim=-1)


def ratio(before, after):
    """The mean after over the mean before, each over the rows that it knows."""
    return mean(after) / mean(before)


def overall(columns):
    """The mean of the categories' means: (K, ..., M) -> (...)."""
    return mean(columns).mean(dim=0)


def overall_difference(before, after):
    return overall(after) - overall(before)


def overall_ratio(before, after):
    """D: the mean of the ratios of K columns after to K columns before."""
    return ratio(before, after).mean(dim=0)


# ---------------------------------------------------------------------------------------------
# The table
# ---------------------------------------------------------------------------------------------

def compare(tables):
    """Rows of the table: {metric: [{"value", "low", "high", "change"} of each checkpoint]}.

    tables are the checkpoints' {metric: (M,)}, the first of them the base.  Of "spread/<part>" the
    ratios to the base's are reported, and as D the mean of these ratios."""
    base, rows = tables[0], {}
    parts = [name for name in base if name.startswith("spread/")]
    categories = [name for name in base if name.startswith("geneval/")]
    for name in base:
        unknown = all(table[name].isnan().all() for table in tables)
        if name not in parts and not unknown:
            rows[name] = [with_change(mean, difference, base[name], table[name])
                          for table in tables]
    if categories:
        columns = [stacked(table, categories) for table in tables]
        rows["geneval/overall"] = [with_change(overall, overall_difference, columns[0], own)
                                   for own in columns]
    if parts:
        columns = [stacked(table, parts) for table in tables]
        rows["D"] = [bootstrap(overall_ratio, columns[0], own) for own in columns]
    for name in parts:
        rows[f"D/{name.removeprefix('spread/')}"] = [
            bootstrap(ratio, base[name], table[name]) for table in tables]
    return rows


def stacked(table, names):
    """Columns of those names as one tensor (K, M)."""
    return torch.stack([table[name] for name in names])


def with_change(statistic, change, base, own):
    """The statistic of a checkpoint's column or columns, and the change to the base's."""
    return bootstrap(statistic, own) | {"change": bootstrap(change, base, own)}


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
    cells = {name: [in_words(found, i == 0) for i, found in enumerate(row)]
             for name, row in rows.items()}
    cells |= {name: [f"{some[name]:.4g}" for some in figures] for name in figures[0]}
    lines = [f"{count} prompts, {settings.samples} pictures of each, guidance "
             f"{settings.cfg_scale:g}, temperature {settings.temperature:g}, seed {settings.seed}. "
             "In brackets: 95% intervals, by bootstrap over prompts; in parentheses: the change to "
             f"{labels[0]}, paired prompt by prompt.", "",
             f"| | {' | '.join(labels)} |", "|---" * (len(labels) + 1) + "|"]
    lines += [f"| {name} | {' | '.join(row)} |" for name, row in cells.items()]
    return "\n".join([*lines, "", ""])


def draw_grid(path, folders, texts, index, labels, prompts=8, each=4):
    """The same pictures of all checkpoints side by side, a row a prompt, in one picture."""
    blocks = []
    for k in torch.linspace(0, len(texts) - 1, min(prompts, len(texts))).long().tolist():
        numbers = (index == k).nonzero()[:each, 0].tolist()
        for folder in folders:
            blocks.append((texts[k], read_pictures(folder, numbers), ()))
    side = blocks[0][1].shape[2]
    sheet(blocks, len(labels), side * max(1, 72 // side), labels).save(path)
