"""How varied pictures are, which are right, and the diversity bonus: diversity.py's first half."""

import math

import pytest
import torch
from conftest import Blocks, Loop, brightness, same, tiny_model

import argrpo
from argrpo import GRPOConfig
from diversity import (
    DiversityBonus,
    Pixels,
    Rehearsal,
    energy_witness,
    group_diversity,
    right_images,
    unit_of,
)

# --- how varied, and what is right -----------------------------------------------------------

def test_diversity_by_hand():
    """Two groups of two: black and white differ by 1 everywhere, two equal pictures by 0."""
    black, white = torch.zeros(3, 2, 2), torch.ones(3, 2, 2)
    assert group_diversity(torch.stack([black, white, white, white]), 2).tolist() == [1.0, 0.0], (
        "the mean L1 distance of two images, 1 from black to white")


def test_diversity_is_a_mean_over_pairs():
    """Of brightness 0, 0 and 0.6 the pairs differ by 0, 0.6 and 0.6."""
    images = torch.tensor([0.0, 0.0, 0.6]).view(3, 1, 1, 1).expand(3, 3, 2, 2)
    same(group_diversity(images, 3), [0.4], "mean L1 distance per pixel over the pairs of a group")


def test_what_is_right():
    """Verdicts at 1; graded rewards above the median, or at a maximum that most share; never where
    all are equal."""
    def right(*rewards):
        return right_images(torch.tensor(rewards), 4)[0].tolist()

    assert right(0.0, 1.0, 1.0, math.nan) == [False, True, True, False], "verdicts: right is 1"
    assert right(0.1, 0.4, 0.2, 0.3) == [False, True, False, True], "graded: above the median"
    assert right(2.0, 2.0, 2.0, 0.5) == [True, True, True, False], "graded: most share the maximum"
    assert right(2.0, math.nan, 2.0, 0.5) == [True, False, True, False], "missing is never right"
    assert right(0.7, 0.7, 0.7, 0.7) == [False] * 4, "graded and all equal: none is better"
    assert right(1.0, 1.0, 1.0, 1.0) == [True] * 4, "verdicts may all be right"
    graded = torch.tensor([0.1, 0.4, math.nan, 0.3, 0.2, 0.5])
    assert right_images(graded, 6).tolist() == [[False, True, False, False, False, True]], (
        "the median is that of the known rewards")


def test_what_is_right_is_asked_group_by_group():
    rewards = torch.tensor([0.1, 0.2, 0.3, 0.4, 5.0, 6.0, 7.0, 8.0])
    assert right_images(rewards, 4).tolist() == [[False, False, True, True]] * 2, (
        "each group has its own median")


# --- the diversity bonus ---------------------------------------------------------------------

def on_a_line(*places):
    return torch.tensor(places)[:, None]


def witness(x, others, reference, **within):
    return energy_witness(x, others, reference, unit_of(reference), **within)


def test_the_witness_by_hand():
    """The policy's images at 0, 0 and 4 on a line, the reference's at 0 and 2, which are 2 apart.

    Mean distances to the policy's others are 2, 2 and 4, to the reference 1, 1 and 3."""
    own = on_a_line(0.0, 0.0, 4.0)
    d = witness(own, own[:0], on_a_line(0.0, 2.0), within=1.0)
    same(d, [(2 - 1) / 2, (2 - 1) / 2, (4 - 3) / 2], "own distance minus the reference's, in units")
    d = witness(own, own[:0], on_a_line(0.0, 2.0), within=2.0)
    same(d, [(4 - 1) / 2, (4 - 1) / 2, (8 - 3) / 2], "`within` weighs the policy's own distances")


def test_the_policys_images_are_those_of_earlier_groups_too():
    """At 0, with earlier ones at 3 and 6: a mean distance of 4.5 to the policy's others."""
    d = witness(on_a_line(0.0), on_a_line(3.0, 6.0), on_a_line(0.0, 2.0), within=1.0)
    same(d, [(4.5 - 1) / 2], "all images of the policy count, but not the image itself")


def test_what_the_reference_draws_more_of_is_worth_more():
    """Nine of ten images lie at 0, where the reference has half of them."""
    own = on_a_line(*[0.0] * 9, 1.0)
    d = witness(own, own[:0], on_a_line(*[0.0, 1.0] * 8))
    assert (d[9] > d[:9]).all(), (
        "the tenth image is what the reference draws in half of its pictures")


def test_where_both_are_alike_no_image_is_favoured():
    """The same 400 images on both sides: the witness is constant up to the image itself."""
    x = torch.randn(400, 3)
    d = witness(x, x[:0], x.clone(), within=1.0)
    assert d.std() < 0.01, "equally distributed: no image is worth more than another"


def test_a_pyramid_of_pixels_sees_sizes():
    """Two squares of 12 pixels and two of 8 at other places: pixel by pixel any two of them differ,
    and only the coarsest level tells which are of one size."""
    images = torch.zeros(4, 3, 24, 24)
    for image, (place, size) in zip(images, [(0, 12), (12, 12), (0, 8), (12, 8)]):
        image[:, place:place + size, place:place + size] = 1
    pixels = Pixels()
    levels = pixels.levels(pixels.describe(images))
    assert [level.shape[1] for level in levels] == [3, 27, 1728], "1 x 1, 3 x 3 and 24 x 24 cells"
    coarse = torch.cdist(levels[0], levels[0], p=1)
    assert coarse[0, 1] == 0 == coarse[2, 3] and coarse[0, 2] > 0.1, (
        "the mean over the whole picture tells the two sizes apart")
    same(levels[0][0], torch.full((3,), 144 / 576), "the mean over the picture", atol=0.002)


def test_large_images_are_remembered_small():
    described = Pixels().describe(torch.rand(2, 3, 256, 256))
    assert described.shape == (2, 3, 24, 24) and described.dtype == torch.uint8, (
        "at most 24 x 24 pixels of one byte are remembered")


class Known:
    """In the place of a Rehearsal: right images of the reference, at places on a line."""

    def __init__(self, prompts=("a", "b"), **config):
        self.prompts = argrpo.Prompts(list(prompts), torch.arange(len(prompts)))
        self.config = GRPOConfig(group_size=4, **config)
        self.features, self.asked, self.names = self, [], list(prompts)
        self.described = {text: on_a_line(0.0, 1.0) for text in prompts}

    def describe(self, images):
        return images.flatten(1)[:, :1]

    def levels(self, described):
        return [described, 3 * described]        # the second says the same in other units

    def remember(self, index):
        self.asked.append(index.tolist())


PLACES = torch.tensor([0.0, 0.0, 5.0, 1.0, 0.0, 1.0, 0.0, 1.0])          # of two groups of four
VERDICTS = torch.tensor([1.0, 1.0, 0.0, 1.0, 1.0, 1.0, 1.0, 1.0])


def bonus_of(bonus, rewards=VERDICTS, places=PLACES, index=(0, 1), step=0):
    """What the bonus adds to `group_advantages`."""
    c = bonus.rehearsal.config
    plain = argrpo.group_advantages(rewards, 4, scale=c.scale_advantages)
    images = places.view(-1, 1, 1, 1)
    return bonus(rewards, images, images, torch.tensor(index), step) - plain


def test_the_bonus_by_hand():
    """Of the first group 0, 0 and 1 are right, of the second all; the reference is at 0 and 1.

    For the first: own distances 1/2, 1/2, 1 times 1.15 minus 1/2, in units of 1; of mean 0.2667."""
    known = Known()
    d = torch.tensor([0.075, 0.075, 0.65])
    right = torch.zeros(8)
    right[[0, 1, 3]] = 2 * (d - d.mean())
    same(bonus_of(DiversityBonus(known, 2.0)), right,
         "weight * (d - mean of d) of the right images, averaged over levels; nothing for others")
    assert known.asked == [[0, 1]], "the reference draws what comes up for the first time"


def test_the_bonus_moves_advantage_and_adds_none():
    added = bonus_of(DiversityBonus(Known(), 6.0), places=torch.rand(8)).view(2, 4)
    same(added.sum(dim=1), torch.zeros(2), "it sums to zero in every group")
    assert added[0, 2] == 0 and (added[1] != 0).any(), "none for a wrong image, some for all right"


def test_earlier_groups_of_the_prompt_count_and_only_four_of_them():
    bonus = DiversityBonus(Known(), 2.0)
    first = bonus_of(bonus)
    again = bonus_of(bonus)
    assert not torch.allclose(first, again), "the second time the first group is remembered"
    for step in range(6):
        bonus_of(bonus, step=step)
    assert [len(groups) for groups in bonus.recent.values()] == [4, 4], (
        "the last four groups of each prompt")
    assert [len(group) for group in bonus.recent["a"]] == [3] * 4, "right images only"


def test_the_newest_groups_are_remembered_not_the_oldest():
    """Seven groups whose images stand at 0, 1, ... 6: those at 3 to 6 are left, in this order."""
    bonus = DiversityBonus(Known(), 2.0)
    for step in range(7):
        bonus_of(bonus, places=torch.full((8,), float(step)), step=step)
    assert [group.unique().tolist() for group in bonus.recent["a"]] == [[3], [4], [5], [6]], (
        "the newest four, the oldest of them first")


def test_a_prompt_that_stands_twice_shares_its_memory():
    bonus = DiversityBonus(Known(prompts=("a", "a")), 2.0)
    bonus_of(bonus)
    assert list(bonus.recent) == ["a"] and len(bonus.recent["a"]) == 2, "one text, one memory"


def test_all_processes_remember_the_same_groups():
    """What the other process has drawn comes through `gather`, in the processes' order."""
    theirs = [("b", on_a_line(7.0))]
    bonus = DiversityBonus(Known(), 2.0, gather=lambda mine: [theirs, mine])
    bonus_of(bonus)
    assert [len(group) for group in bonus.recent["b"]] == [1, 4], "their group, then ours"
    assert list(bonus.recent) == ["b", "a"], "what the other process drew is remembered, too"


def test_too_few_right_images_get_no_bonus():
    known = Known()
    one = torch.tensor([1.0, 0, 0, 0, 1, 0, 0, 0])
    assert (bonus_of(DiversityBonus(known, 2.0), rewards=one) == 0).all(), "nothing to move"
    known.described = {"a": on_a_line(0.0), "b": on_a_line(0.0)[:0]}
    assert (bonus_of(DiversityBonus(known, 2.0)) == 0).all(), "the reference has nothing to show"


@pytest.mark.parametrize("scale", [True, False])
def test_scaled_or_not_the_rewards_advantages_stay_what_they_are(scale):
    """Wrong images have `group_advantages`' own, and graded rewards are right above the median."""
    graded = torch.rand(8)
    added = bonus_of(DiversityBonus(Known(scale_advantages=scale), 2.0), rewards=graded,
                     places=1 + torch.rand(8))
    assert torch.equal(added.view(2, 4) != 0, right_images(graded, 4)), (
        "the bonus is for right images, and changes no other advantage")


def test_the_bonus_leaves_what_it_is_given_alone():
    given = torch.rand(8), torch.rand(8, 3, 2, 2)
    before = [x.clone() for x in given]
    group_diversity(given[1], 4), right_images(given[0], 4)
    DiversityBonus(Known(), 0.5)(*given, None, torch.tensor([0, 1]), 0)
    for x, was in zip(given, before):
        assert torch.equal(x, was), "rewards and images belong to the loop"


def test_the_bonus_in_the_loop():
    """A step's advantages are those of its own rewards, plus something for its right images."""
    reference = tiny_model(block_size=4, n_layer=1)
    loop = Loop(group_size=6)
    rehearsal = Rehearsal(reference, Blocks(), loop.prompts, brightness, loop.config, 0.0, 4,
                          Pixels())
    bonus = DiversityBonus(rehearsal, 0.5)
    for step in Loop(group_size=6, seams=dict(advantage_fn=bonus)).steps:
        plain = argrpo.group_advantages(step.rewards, 6)
        added = (step.advantages - plain).view(-1, 6)
        assert (added.abs() > 1e-6).any() and (added[~right_images(step.rewards, 6)] == 0).all(), (
            "something for right images, and nothing for wrong ones")
        same(added.sum(dim=1), torch.zeros(len(added)), "moved among a group's right images")
