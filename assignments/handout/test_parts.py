"""The public tests:  pytest -m part1, or all of one item:  pytest -k "2.5".

Each test is a check in checks/ with inputs of the public seed; expected.pt holds what a right
solution computes from them.  A failing test names the property, and shows the smallest input that
fails.
"""

from pathlib import Path

import my_reward
import pytest
import torch
from checks import CHECKS, LEVELS, Draw, describe, flat, same, watched
from hints import HINTS

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
        with watched(argrpo, HINTS[check.item]) as calls:
            got = flat(check.compute(argrpo, Draw(SEED, check.says, level)))
        wanted = EXPECTED[check.says][level]
        if not same(got, wanted, check.tolerance):
            pytest.fail(f"{check.item}: {describe(check, calls, got, wanted)}", pytrace=False)


@pytest.mark.part4
def test_my_reward_gives_a_number_for_each_picture():
    rewards = torch.as_tensor(my_reward.my_reward(torch.rand(5, 3, 24, 24), toy.CLASSES[:5]))
    if rewards.shape != (5,) or not rewards.isfinite().all():
        pytest.fail(f"4.1: of 5 pictures my_reward must return 5 numbers, not {rewards}",
                    pytrace=False)


@pytest.mark.part4
def test_answers_are_complete():
    answers = tomllib.loads((HERE / "answers.toml").read_text("utf-8"))
    runs = sorted(path.name for path in (HERE / "debug").glob("run_*"))
    problems = [] if sorted(answers) == runs else [f"there must be a table for each of {runs}"]
    for run, answer in answers.items():
        if answer.get("fault") not in EXPECTED["faults"]:
            problems.append(f"{run}: fault must be one of the README's list")
        if not answer.get("metric") or answer.get("step", -1) < 0:
            problems.append(f"{run}: metric and step are missing")
    if problems:
        pytest.fail("4.2: answers.toml: " + "; ".join(problems), pytrace=False)
