"""Intervals by bootstrap, and the numbers of a table that they belong to."""

import math
from itertools import product

import pytest
import torch

from harness.compare import (
    bootstrap,
    by_prompt,
    compare,
    difference,
    geneval_summary,
    in_words,
    mean,
    ratio,
)


def test_an_interval_by_hand():
    """Three numbers: all 27 samples of three are known, and so are their means."""
    column = torch.tensor([[0.0, 1.0, 5.0]])
    means = torch.tensor([sum(some) / 3 for some in product(*column.tolist(), repeat=3)]).double()
    right = means.quantile(torch.tensor([0.1, 0.9]).double())        # 1/3 and 11/3
    found = bootstrap(mean, column, rounds=20000, level=0.8)
    assert found["value"] == 2.0, "the value is that of all rows"
    assert [found["low"], found["high"]] == pytest.approx(right.tolist(), abs=1e-6), (
        "a level of 0.8 leaves a tenth of the resampled means below the interval, and above it; "
        "each resample has as many rows as there are")


def test_a_normal_mean_has_the_textbooks_interval():
    column = torch.randn(1, 400, generator=torch.Generator().manual_seed(1))
    found, error = bootstrap(mean, column), column.std().item() / 20
    for end, sign in (("low", -1), ("high", 1)):
        right = found["value"] + sign * 1.96 * error
        assert found[end] == pytest.approx(right, abs=0.1 * error + 1e-3)


def test_differences_are_paired():
    """What prompts differ in does not blur the difference of two checkpoints."""
    before = 100 * torch.rand(1, 50)
    found = bootstrap(difference, before, before + 1.0)
    assert list(found.values()) == pytest.approx([1.0, 1.0, 1.0], abs=1e-4), (
        "both numbers of a prompt are drawn together: every resample's difference is 1")


def test_what_is_unknown_is_left_out():
    """Of a difference in both; of a ratio of means in each, as D of a run does."""
    before, after = torch.tensor([[1.0, 3.0, math.nan]]), torch.tensor([[2.0, math.nan, 10.0]])
    assert mean(before) == 2, "the mean of 1 and 3"
    assert difference(before, after) == 1, "only the first row is known in both: 2 - 1"
    assert ratio(before, after) == 3, "of means, after over before: 6 / 2"


def test_the_same_seed_gives_the_same_interval_and_one_row_none():
    column = torch.rand(1, 9)
    assert bootstrap(mean, column) == bootstrap(mean, column) != bootstrap(mean, column, seed=1)
    assert math.isnan(bootstrap(mean, column[:, :1])["low"])


def test_the_mean_of_a_prompts_pictures():
    found = by_prompt(torch.tensor([1.0, 0.0, math.nan, 1.0, math.nan, math.nan]), 3)
    assert found[:2].tolist() == [0.5, 1.0], "a missing score (NaN) is left out of the mean"
    assert found[2].isnan(), "of a prompt without a score nothing is known"


def test_genevals_overall_score_is_the_mean_of_its_categories():
    """As GenEval's own script counts (on a file of 240 verdicts of 60 prompts all its figures and
    ours were equal, when it was run by hand)."""
    right, tags = torch.tensor([1.0, 0.2, 0.5, 0.0, 0.5]), ["counting", "counting", "colors",
                                                            "colors", "position"]
    columns = geneval_summary(right, tags)
    figures = {name: mean(column[None]).item() for name, column in columns.items()}
    assert figures == pytest.approx({
        "geneval pictures": 0.44, "geneval prompts": 0.8,        # one right picture is enough
        "geneval/counting": 0.6, "geneval/colors": 0.25, "geneval/position": 0.5}), (
        "all pictures; prompts with a right picture at least; the pictures of each category")
    categories = [column for name, column in columns.items() if "/" in name]
    assert mean(torch.stack(categories)).item() == pytest.approx(0.45), (
        "the overall score is the mean of the categories, not of the prompts")


def test_the_table_says_what_is_noise():
    base = {"right": torch.tensor([0.0, 1.0] * 20), "spread/size": torch.full((40,), 2.0)}
    same = {"right": base["right"].roll(1), "spread/size": torch.full((40,), 1.0)}
    better = {"right": torch.ones(40), "spread/size": torch.full((40,), 2.0)}
    rows = compare([base, better, same])
    words = [in_words(found, i == 0) for i, found in enumerate(rows["right"])]
    assert words[0].startswith("0.5 [") and "(" not in words[0]
    assert words[1].endswith("(+0.5)"), "a change is judged by its own interval, the paired one"
    assert words[2].endswith("(no difference beyond noise)"), (
        "where the interval of the change to the base, not to the one before, has 0")
    assert [found["value"] for found in rows["D"]] == [1.0, 1.0, 0.5], "the spread over the base's"


def test_d_is_the_mean_of_its_parts_ratios_whatever_their_units():
    """A distance that halves, and places, in pixels, that stay."""
    base = {"spread/distance": torch.full((9,), 0.1), "spread/centres": torch.full((9,), 5.0)}
    after = base | {"spread/distance": torch.full((9,), 0.05)}
    assert compare([base, after])["D"][1]["value"] == pytest.approx((0.5 + 1) / 2)


def test_genevals_categories_count_the_same_however_many_prompts_they_have():
    """Three prompts that count, all right, and one with a colour, which is wrong: a half, not three
    quarters.  The bootstrap's value, in the table."""
    right, tags = torch.tensor([1.0, 1.0, 1.0, 0.0]), ["counting"] * 3 + ["colors"]
    rows = compare([geneval_summary(right, tags)])
    assert rows["geneval pictures"][0]["value"] == 0.75, "the mean of all pictures"
    assert rows["geneval/overall"][0]["value"] == 0.5, (
        "GenEval's overall score is the mean of the categories' scores, not of the prompts'")
