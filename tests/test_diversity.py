"""How varied pictures are, which are right, and the diversity bonus: diversity.py's first half."""

import math

import pytest
import torch
from conftest import Blocks, Loop, same

import argrpo
from argrpo import GRPOConfig
from diversity import DiversityBonus, are_verdicts, diversity_bonus, group_diversity, right_images
from vqgan import VQConfig, VQModel

# --- how varied, and what is right -----------------------------------------------------------

def test_diversity_by_hand():
    """Two groups of two: black and white differ by 1 everywhere, two equal pictures by 0."""
    black, white = torch.zeros(3, 2, 2), torch.ones(3, 2, 2)
    assert group_diversity(torch.stack([black, white, white, white]), 2).tolist() == [1.0, 0.0]


def test_diversity_is_a_mean_over_pairs():
    """Of brightness 0, 0 and 0.6 the pairs differ by 0, 0.6 and 0.6."""
    images = torch.tensor([0.0, 0.0, 0.6]).view(3, 1, 1, 1).expand(3, 3, 2, 2)
    same(group_diversity(images, 3), [0.4], "mean L1 distance per pixel over the pairs of a group")


def test_verdicts_are_zeros_and_ones():
    assert are_verdicts(torch.tensor([0.0, 1.0, math.nan])), "a missing verdict is still none"
    assert not are_verdicts(torch.tensor([0.0, 1.0, 0.5]))


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


def test_what_is_right_is_asked_group_by_group():
    rewards = torch.tensor([0.1, 0.2, 0.3, 0.4, 5.0, 6.0, 7.0, 8.0])
    assert right_images(rewards, 4).tolist() == [[False, False, True, True]] * 2


# --- the diversity bonus ---------------------------------------------------------------------

def test_bonus_by_hand():
    """Right images at 0, 0 and 3 on a line: mean distances 1.5, 1.5 and 3, of mean 2.

    The wrong one, far away, changes nothing, and the distance's scale does not matter."""
    rewards = torch.tensor([1.0, 1.0, 0.0, 1.0])
    places = torch.tensor([[0.0], [0.0], [100.0], [3.0]])
    bonus = diversity_bonus(rewards, places, 4, weight=0.2)
    same(bonus, 0.2 * torch.tensor([-0.25, -0.25, 0.0, 0.5]),
         "weight * (d / mean(d) - 1), d the mean distance to the other right images")
    same(diversity_bonus(rewards, 7 * places, 4, weight=0.2), bonus, "the scale does not matter")


@pytest.mark.parametrize("rewards", [
    torch.tensor([1.0, 0, 1, 1, 0, 1, 1, 1]),
    torch.rand(8),
    torch.tensor([1.0, math.nan, 1, 1] * 2)])
def test_bonus_sums_to_zero_and_ignores_wrong_images(rewards):
    features = torch.randn(8, 3, 4)
    bonus = diversity_bonus(rewards, features, 4, weight=0.5)
    same(bonus.view(2, 4).sum(dim=1), torch.zeros(2), "the bonus moves reward, and adds none")
    graded = not ((rewards == 0) | (rewards == 1) | rewards.isnan()).all()
    for r, b in zip(rewards.split(4), bonus.split(4)):
        wrong = r <= r.nanmedian() if graded else r != 1
        assert (b[wrong] == 0).all(), "a wrong image gets no bonus"
        assert (b != 0).any() == (int((~wrong).sum()) >= 3), "from three right images on"


def test_bonus_of_graded_rewards_follows_their_spread():
    """Above the median of 8 are 4 images; ten times the rewards, ten times the bonus."""
    rewards, features = torch.rand(8) / 2, torch.randn(8, 5)
    small, large = (diversity_bonus(scale * rewards, features, 8, weight=0.5) for scale in (1, 10))
    assert (small != 0).sum() == 4
    same(large, 10 * small, "graded rewards: the unit is the group's standard deviation")


def test_two_right_images_or_equal_ones_share_nothing():
    two, all_right = torch.tensor([1.0, 1.0, 0.0, 0.0]), torch.ones(4)
    assert (diversity_bonus(two, torch.randn(4, 2), 4, weight=1.0) == 0).all()
    assert (diversity_bonus(all_right, torch.zeros(4, 2), 4, weight=1.0) == 0).all()


@pytest.mark.parametrize("distance", ["pixels", "codes"])
def test_the_bonus_as_advantages(distance):
    """Of the rewards and the bonus together, which compares pictures or the codes they are of."""
    vq = VQModel(VQConfig(ch=8, ch_mult=(1, 1), z_channels=8, codebook_size=5,
                          codebook_embed_dim=4))
    rewards, images = torch.tensor([1.0, 1.0, 0.0, 1.0]), torch.rand(4, 3, 8, 8)
    tokens = torch.randint(5, (4, 16))
    features = images if distance == "pixels" else vq.quantize.codes()[tokens]
    total = rewards + diversity_bonus(rewards, features, 4, 0.3)
    for scale in (True, False):
        bonus = DiversityBonus(vq, GRPOConfig(group_size=4, scale_advantages=scale), 0.3, distance)
        right = argrpo.group_advantages(total, 4, scale=scale)
        same(bonus(rewards, images, tokens, torch.tensor([0]), 0), right,
             f"group_advantages(rewards + bonus of {distance}), with scale_advantages {scale}")


def test_the_bonus_leaves_what_it_is_given_alone():
    given = torch.rand(8), torch.rand(8, 3, 2, 2)
    before = [x.clone() for x in given]
    group_diversity(given[1], 4), right_images(given[0], 4), diversity_bonus(*given, 4, 0.5)
    DiversityBonus(None, GRPOConfig(group_size=4), 0.5)(*given, None, None, 0)
    for x, was in zip(given, before):
        assert torch.equal(x, was), "rewards and images belong to the loop"


def test_the_bonus_in_the_loop():
    """Each step's advantages are those of the step's own rewards and images."""
    config = GRPOConfig(group_size=3)
    bonus = DiversityBonus(Blocks(), config, 0.5)
    for step in Loop(seams=dict(advantage_fn=bonus)).steps:
        total = step.rewards + diversity_bonus(step.rewards, step.images, 3, 0.5)
        same(step.advantages, argrpo.group_advantages(total, 3), "rewards plus their bonus")
