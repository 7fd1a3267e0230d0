"""The rewards in examples/, which are there to be copied: what they say, and a run with each."""

import math
from pathlib import Path

import pytest
import torch
from conftest import read_metrics

import reward
import toy
import train_c2i
from rewards.__main__ import main

CPU = torch.device("cpu")
EXAMPLES = Path(__file__).parents[2] / "examples"
SPECS = {
    "Familiar": f"{EXAMPLES}/own_model.py:Familiar",
    "centred": f"{EXAMPLES}/may_miss.py:centred",
    "coloured": f"{EXAMPLES}/reads_prompt.py:coloured",
}


def test_every_example_is_tested():
    assert {spec.rpartition(":")[0] for spec in SPECS.values()} == {
        str(path) for path in EXAMPLES.glob("*.py")}


def scores(name, images, prompts):
    return reward.build_rewards(SPECS[name], CPU)(images, prompts)[0].tolist()


def test_a_model_of_ones_own_prefers_what_it_knows():
    scene = toy.render([[toy.Thing("red", "circle", 12, 12, 8, 8)]])
    noise = torch.rand(1, 3, 24, 24)
    known, unknown = scores("Familiar", torch.cat([scene, noise]), ["a", "b"])
    assert -0.1 < known <= 0 and unknown < 10 * known


def test_a_picture_without_content_is_missing():
    images = torch.zeros(3, 3, 9, 9)
    images[0, :, 4, 4] = 1                       # in the middle
    images[1, :, 8, 8] = 1                       # in a corner
    middle, corner, empty = scores("centred", images, ["a"] * 3)
    assert middle == pytest.approx(1) and corner == pytest.approx(0, abs=1e-6) and math.isnan(empty)


def test_the_prompts_colour_counts():
    red = torch.zeros(1, 3, 4, 4)
    red[:, 0] = 0.6
    right, wrong = scores("coloured", red.repeat(2, 1, 1, 1), ["one red circle", "a blue square"])
    assert right == pytest.approx(0.6 - 0.2) and wrong == pytest.approx(0 - 0.2)
    message = "'coloured' cannot judge 1 of 2 prompts: 'an otter'"
    with pytest.raises(reward.BadReward, match=message):
        reward.build_rewards(SPECS["coloured"], CPU).check_prompts(["an otter", "one red circle"])


@pytest.mark.parametrize("name", SPECS)
def test_each_passes_its_own_examination(name, capsys):
    assert main(["--check", SPECS[name], "--device", "cpu"]) == 0
    assert "BAD" not in capsys.readouterr().out


@pytest.mark.slow
def test_a_run_with_all_three(tmp_path, quick):
    train_c2i.main(["--preset", "toy", "--steps", "2", "--prompts-per-step", "2", "--group-size",
                    "4", "--eval-images", "8", "--reward", ",".join(SPECS.values()),
                    "--out", str(tmp_path / "run")])
    metrics = read_metrics(tmp_path / "run")
    assert len(metrics) == 2 and metrics[0]["grad_norm"] > 0
    assert {f"reward/{name}" for name in SPECS} <= set(metrics[0])
