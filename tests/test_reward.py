"""The reward signature, the registry, weights, and rewards from a user's own file."""

import pytest
import torch

from reward import REGISTRY, RewardSet, build_rewards, register

CPU = torch.device("cpu")
IMAGES = torch.rand(4, 3, 24, 24)
PROMPTS = ["one red circle"] * 4


def test_weighted_sum_of_unweighted_parts():
    total, parts = build_rewards("brightness:2, contrast:-0.5", CPU)(IMAGES, PROMPTS)
    torch.testing.assert_close(parts["brightness"], IMAGES.mean(dim=(1, 2, 3)))
    torch.testing.assert_close(total, 2 * parts["brightness"] - 0.5 * parts["contrast"])


@pytest.mark.parametrize("name", ["shapes", "jpeg", "jpeg_large", "brightness", "contrast"])
def test_rewards_without_a_model_score_a_batch(name):
    total, parts = build_rewards(name, CPU)(IMAGES, PROMPTS)
    assert total.shape == (4,) and total.dtype == torch.float32 and list(parts) == [name]
    torch.testing.assert_close(build_rewards(name, CPU)(IMAGES[2:3], PROMPTS[2:3])[0], total[2:3])


def test_jpeg_prefers_the_plain_picture():
    plain, noise = torch.full((1, 3, 24, 24), 0.5), torch.rand(1, 3, 24, 24)
    small, large = build_rewards("jpeg", CPU), build_rewards("jpeg_large", CPU)
    assert small(plain, ["a"])[0] > small(noise, ["a"])[0]
    torch.testing.assert_close(large(noise, ["a"])[0], -small(noise, ["a"])[0])


def test_contrast_by_hand():
    half = torch.zeros(1, 3, 2, 2)
    half[..., 0] = 1                                             # std of (1, 0, 1, 0), unbiased: 1 / sqrt(3)
    torch.testing.assert_close(build_rewards("contrast", CPU)(half, ["a"])[0], torch.tensor([3 ** -0.5]))


def test_a_reward_from_the_users_own_file(tmp_path):
    file = tmp_path / "mine.py"
    file.write_text("""
def redness(images, prompts):
    red, green, blue = images.mean(dim=(2, 3)).unbind(dim=1)
    return red - (green + blue) / 2

class Words:
    def __init__(self, device):
        self.device = device
    def __call__(self, images, prompts):
        return images.new_tensor([len(prompt.split()) for prompt in prompts])
""")
    total, parts = build_rewards(f"{file}:redness:3,{file}:Words", CPU)(IMAGES, PROMPTS)
    assert list(parts) == ["redness", "Words"]
    torch.testing.assert_close(parts["Words"], torch.full((4,), 3.0))
    torch.testing.assert_close(total, 3 * parts["redness"] + 3)
    with pytest.raises(ValueError, match="no function 'blueness'; it has redness, Words"):
        build_rewards(f"{file}:blueness", CPU)


@pytest.mark.parametrize("spec, message", [
    ("", "no reward given: choose with --reward from aesthetic"),
    ("brightness,", "cannot read ''"),
    ("nonsense", "unknown reward 'nonsense': there are aesthetic, brightness"),
    ("brightness:heavy", "weight of reward 'brightness' must be a finite number, not 'heavy'"),
    ("brightness:nan", "finite number, not 'nan'"),
    ("brightness,brightness:2", "named twice"),
    ("missing.py:f", "no such reward file: missing.py"),
])
def test_specs_that_cannot_be_understood(spec, message):
    with pytest.raises(ValueError, match=message):
        build_rewards(spec, CPU)


@pytest.mark.parametrize("scores, message", [
    (torch.zeros(4, 1), r"'mine' must return a tensor of shape \(4,\), one score per image, not \(4, 1\)"),
    (torch.zeros(3), r"not \(3,\)"),
    ([0.0] * 4, "not list"),
    (torch.tensor([0.0, 1.0, float("nan"), 0.0]), "gave nan to image 2, prompt 'one red circle'"),
    (torch.tensor([0.0, float("inf"), 0.0, 0.0]), "gave inf to image 1"),
])
def test_scores_that_are_not_one_finite_number_per_image(scores, message):
    with pytest.raises(ValueError, match=message):
        RewardSet({"mine": (lambda images, prompts: scores, 1.0)})(IMAGES, PROMPTS)


def test_registering_a_reward():
    @register("constant")
    def constant(device):
        return lambda images, prompts: torch.ones(len(prompts), device=device)

    try:
        assert build_rewards("constant:2", CPU)(IMAGES, PROMPTS)[0].tolist() == [2.0] * 4
    finally:
        del REGISTRY["constant"]
    with pytest.raises(ValueError, match="already a reward named 'jpeg'"):
        register("jpeg")(constant)
