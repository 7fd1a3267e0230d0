"""What drawn pictures are worth: numbers of each picture, of each prompt, and the table of several
checkpoints.

Everything is first a number of each prompt: the mean over its pictures, or how much they differ.
So intervals are over prompts, and differences between checkpoints are paired prompt by prompt.
"""

import json
import math

import torch
import torch.nn.functional as F

from harness.checkpoints import write_json
from harness.drawing import as_images, read_shard, read_shards, shards
from harness.statistics import bootstrap, difference, mean, ratio
from reward import build_rewards

# What pictures are also compared by, besides pixels: the rewards that have features.
FEATURES = ("imagenet", "clip")


def feature_function(name, device):
    """images (B, 3, H, W) in [0, 1] -> (B, C) of length one, by the reward of that name.

    Raises ValueError if it has no features."""
    [(reward, _)] = build_rewards(name, device).rewards.values()
    if not hasattr(reward, "features"):
        raise ValueError(f"reward {name!r} has no features; {' and '.join(FEATURES)} have")
    return lambda images: reward.features(images.to(device))


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


def distances(folder, index, count, features):
    """How much the pictures of a prompt differ: {"distance/pixels": (count,), "distance/<name>"}.

    Pixels: the mean L1 distance of two pictures, of at most 64 x 64 pixels.  Features: 1 minus the
    mean cosine.  features is {name: function}."""
    seen = {name: [] for name in ("pixels", *features)}
    for path in shards(folder):
        images = as_images(read_shard(path))
        side = min(64, images.shape[-1])
        small = F.interpolate(images, size=(side, side), mode="area")
        seen["pixels"].append((255 * small).round().byte().flatten(1))
        for name, function in features.items():
            seen[name].append(function(images).cpu())
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


# ---------------------------------------------------------------------------------------------
# GenEval's summary
# ---------------------------------------------------------------------------------------------

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


def overall(*columns):
    """The mean of the categories' means, for `bootstrap`."""
    return torch.stack([mean(column) for column in columns]).mean(dim=0)


# ---------------------------------------------------------------------------------------------
# The table
# ---------------------------------------------------------------------------------------------

def compare(tables, kept=()):
    """Rows of the table: {metric: [{"value", "low", "high", "change"} of each checkpoint]}.

    tables are the checkpoints' {metric: (M,)}, the first of them the base.  kept names metrics of
    which the ratio to the base's is reported, too, and as D the mean of these ratios."""
    rows, base = {}, tables[0]
    for name in base:
        if all(table[name].isnan().all() for table in tables):
            continue
        rows[name] = [cell(mean, [table[name]], difference, [base[name], table[name]])
                      for table in tables]
    categories = [name for name in base if name.startswith("geneval/")]
    if categories:
        columns = [[table[name] for name in categories] for table in tables]
        rows["geneval/overall"] = [cell(overall, own, overall_change, columns[0] + own)
                                   for own in columns]
    if kept:
        columns = [[table[name] for name in kept] for table in tables]
        rows["D"] = [cell(mean_ratio, columns[0] + own) for own in columns]
        for name in kept:
            rows[f"D/{name.removeprefix('spread/')}"] = [
                cell(ratio, [base[name], table[name]]) for table in tables]
    return rows


def halves(columns):
    """Columns of the base, and those of another checkpoint."""
    return columns[:len(columns) // 2], columns[len(columns) // 2:]


def overall_change(*columns):
    before, after = halves(columns)
    return overall(*after) - overall(*before)


def mean_ratio(*columns):
    """D: the mean of the ratios of columns after to columns before."""
    return torch.stack([ratio(*pair) for pair in zip(*halves(columns))]).mean(dim=0)


def cell(statistic, columns, change=None, pair=()):
    """A value with its interval, and the change to the base with its own."""
    found = bootstrap(statistic, *columns)._asdict()
    if change is not None:
        found["change"] = bootstrap(change, *pair)._asdict()
    return found


def in_words(found, first):
    """A cell of the table as text; the first column has no change."""
    text = f"{found['value']:.4g}"
    if not math.isnan(found.get("low", math.nan)):
        text += f" [{found['low']:.3g}, {found['high']:.3g}]"
    change = found.get("change")
    if first or not change or math.isnan(change["low"]):
        return text
    if change["low"] <= 0 <= change["high"]:
        return text + " (no difference beyond noise)"
    return text + f" ({change['value']:+.3g})"
