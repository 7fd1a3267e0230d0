"""How sure a number is: intervals by bootstrap."""

from collections import namedtuple

import torch

Interval = namedtuple("Interval", "value low high")


def bootstrap(statistic, *columns, rounds=2000, level=0.95, seed=0):
    """A statistic and its percentile bootstrap interval (Efron 1979), as an Interval.

    columns are tensors (M,) with a number for each prompt, or for each image: NaN where it is not
    known.  statistic maps them, as tensors (..., M), to (...).  What is drawn again, with
    replacement, are whole rows: numbers of the same prompt stay together, so that the difference of
    two columns is a paired one.  The interval holds `level` of the results; both ends are NaN for
    fewer than two rows."""
    columns = [column.double() for column in columns]
    count, value = len(columns[0]), statistic(*columns).item()
    if count < 2:
        return Interval(value, float("nan"), float("nan"))
    rows = torch.randint(count, (rounds, count), generator=torch.Generator().manual_seed(seed))
    results = statistic(*[column[rows] for column in columns])                       # (rounds,)
    tails = torch.tensor([(1 - level) / 2, (1 + level) / 2], dtype=results.dtype)
    return Interval(value, *results.nanquantile(tails).tolist())


def mean(column):
    """The mean of what is known: (..., M) -> (...)."""
    return column.nanmean(dim=-1)


def difference(before, after):
    """How much the mean has changed, over the rows that both know."""
    return (after - before).nanmean(dim=-1)


def ratio(before, after):
    """The mean after over the mean before, each over the rows that it knows."""
    return mean(after) / mean(before)
