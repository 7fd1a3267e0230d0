"""The public tests:  pytest -m part1, or all of one item:  pytest -k "2.5".

Each test is a check in checks/ with inputs of the public seed; expected.pt holds what a right
solution computes from them.  A failing test names the property, and shows the smallest input that
fails.
"""

from pathlib import Path

import my_reward
import pytest
import torch
from checks import CHECKS, LEVELS, Draw, flat, part1, part2, part3, same  # noqa: F401

import argrpo
import toy

try:
    import tomllib
except ModuleNotFoundError:
    import tomli as tomllib

HERE = Path(__file__).parent
EXPECTED = torch.load(HERE / "expected.pt", weights_only=True)
SEED = EXPECTED["seed"]
torch.set_num_threads(1)


@pytest.mark.parametrize("check", [
    pytest.param(check, id=f"{check.item} {check.says}", marks=getattr(pytest.mark,
                                                                       f"part{check.item[0]}"))
    for check in CHECKS])
def test_property(check):
    for level in range(LEVELS):
        draw = Draw(SEED, check.says, level)
        got = flat(check.compute(argrpo, draw))
        wanted = EXPECTED[check.says][level]
        assert same(got, wanted, check.tolerance), (
            f"{check.item}: not so: {check.says}\ninputs {draw.seen[:3]}\nexpected {wanted}\n"
            f"got {got}")


@pytest.mark.part4
def test_my_reward_gives_a_number_for_each_picture():
    rewards = torch.as_tensor(my_reward.my_reward(torch.rand(5, 3, 24, 24), toy.CLASSES[:5]))
    assert rewards.shape == (5,) and rewards.isfinite().all()


@pytest.mark.part4
def test_answers_are_complete():
    answers = tomllib.loads((HERE / "answers.toml").read_text("utf-8"))
    runs = sorted(path.name for path in (HERE / "debug").glob("run_*"))
    assert sorted(answers) == runs, "answers.toml has one table for each folder in debug"
    for run in runs:
        answer = answers[run]
        assert answer["fault"] in EXPECTED["faults"], f"{run}: no such fault in the README's list"
        assert answer["metric"] and answer["step"] >= 0, f"{run}: metric and step are missing"
