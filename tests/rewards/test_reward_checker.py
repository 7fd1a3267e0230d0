"""The command `python -m rewards`: scoring pictures, and examining a reward."""

import json
import math
from pathlib import Path

import pytest
import torch

from rewards.__main__ import main
from rewards.checker import scale

ROOT = Path(__file__).parents[2]


def test_scoring_pictures_from_the_command_line(capsys):
    picture = str(ROOT / "docs" / "toy_curves.png")
    assert main(["--reward", "brightness:2,contrast", "--device", "cpu", picture]) == 0
    line = json.loads(capsys.readouterr().out)
    assert line["image"] == picture
    assert line["reward"] == pytest.approx(2 * line["brightness"] + line["contrast"])


@pytest.mark.parametrize("spec, picture, message", [
    ("beauty", "docs/toy_curves.png", "unknown reward 'beauty'"),
    ("jpeg", "nowhere.png", "nowhere.png"),
])
def test_errors_are_one_line(spec, picture, message, capsys):
    assert main(["--reward", spec, picture]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and message in error and error.count("\n") == 1


@pytest.mark.parametrize("options", [[], ["--reward", "jpeg"],
                                     ["--reward", "jpeg", "--check", "jpeg", "a.png"]])
def test_what_is_to_be_done_must_be_said(options, capsys):
    with pytest.raises(SystemExit):
        main(options)
    assert "give --check SPEC, or --reward SPEC with pictures" in capsys.readouterr().err


BAD_REWARDS = """
import torch
calls = []
def constant(images, prompts):
    return torch.ones(len(prompts))
def relative(images, prompts):
    light = images.mean(dim=(1, 2, 3))
    return light - light.mean()
def moody(images, prompts):
    calls.append(0)
    return images.mean(dim=(1, 2, 3)) + 0.1 * len(calls)
def greedy(images, prompts):
    images.mul_(0.5)
    return images.mean(dim=(1, 2, 3))
def misshapen(images, prompts):
    return images.mean(dim=(2, 3))
def first(images, prompts):
    return torch.arange(len(prompts)).float() + images.mean(dim=(1, 2, 3))
def shy(images, prompts):
    return torch.full((len(prompts),), float("nan"))
shy.may_miss = True
"""


@pytest.mark.parametrize("name, finding", [
    ("constant", "nothing to learn from"),
    ("relative", "depends on the others in the batch"),
    ("moody", "other scores the second time"),
    ("greedy", "changes the images in place"),
    ("misshapen", "must return a tensor of shape"),
    ("first", "its place in the batch"),
    ("shy", "100% of the images got no score; images without a score teach nothing"),
])
def test_check_says_in_plain_words_what_is_wrong(name, finding, tmp_path, capsys):
    file = tmp_path / "mine.py"
    file.write_text(BAD_REWARDS)
    assert main(["--check", f"{file}:{name}", "--device", "cpu"]) != 0
    output = capsys.readouterr()
    assert finding in output.out + output.err


@pytest.mark.parametrize("spec, finding", [
    ("shapes:1e-7", "multiply the weight by 1e+07"),
    ("shapes:1e-5", "multiply the weight by 1e+05"),
    ("shapes:1e30", "have 0% of their size: multiply the weight by 1e-30"),
])
def test_check_names_a_scale_that_training_cannot_use(spec, finding, capsys):
    assert main(["--check", spec, "--device", "cpu"]) == 1
    [bad] = [line for line in capsys.readouterr().out.splitlines() if line.startswith("BAD")]
    assert bad.startswith("BAD  scale") and finding in bad


@pytest.mark.parametrize("spread, good", [
    (1e-4, False), (8e-4, False), (1.2e-3, True), (1.0, True), (1e15, True), (1e25, False),
])
def test_the_scale_that_training_can_use(spread, good):
    """At 1e-4, the std + 1e-4 is twice the std: half of an advantage is left."""
    whole = torch.tensor([0.0, 1.0, 1.0, 2.0]) * 1.5 ** 0.5              # std 1, as of the other
    missing = torch.tensor([0.0, 1.0, 2.0, math.nan])
    for group in (whole, missing):
        [(what, fine, text)] = scale(torch.cat([torch.zeros(4), spread * group]), 4)
        assert (what, fine) == ("scale", good), text
        assert ("multiply the weight" in text) == (not good)
        if spread == 1e-4:
            assert "50% of their size" in text and text.endswith("by 1e+04")


def test_an_infinite_sum_of_rewards_is_too_large():
    [(_, fine, text)] = scale(torch.tensor([0.0, 1.0, math.inf, 2.0]), 4)
    assert not fine and "multiply the weight by 1e-38" in text


def test_without_any_spread_there_is_no_scale():
    assert list(scale(torch.tensor([1.0, 1.0, 2.0, 2.0, math.nan, 3.0]), 2)) == []


@pytest.mark.parametrize("name, finding", [
    ("shapes", "depends on the prompt"),
    ("jpeg", "does not depend on the prompt"),
    ("contrast", "does not depend on the prompt"),
])
def test_check_finds_nothing_wrong_with_a_good_reward(name, finding, capsys):
    assert main(["--check", name, "--device", "cpu"]) == 0
    output = capsys.readouterr().out
    assert "BAD" not in output and f"  {finding}\n" in output
