"""The doctor: every rule finds the fault it is for, in a run that has it, and no rule fires on a
healthy run.

The runs were made by this repository and lie in tests/data/, their numbers rounded: those with a
fault by assignments/faults.py (24 steps of the c2i toy), the healthy ones by the training scripts,
with the settings that stand in them; some were stopped before their last step. `pytest --slow -m
slow` makes the faulty ones anew.
"""

import json
from pathlib import Path

import pytest
from conftest import read_metrics

from assignments.faults import FAULTS, make_run
from harness import doctor
from harness.doctor import diagnose, early_warning

DATA = Path(__file__).parents[1] / "data"
FAULTY = sorted((DATA / "faulty").glob("*.json"))
HEALTHY = sorted((DATA / "healthy").glob("*.json"))

# The fault that was put in -> the rule that names it.
RULE = {
    "no_spread": "no spread within groups",
    "saturated_reward": "constant reward",
    "clones": "identical images",
    "missing_rewards": "missing rewards",
    "reward_hacking": "reward hacking",
    "reversed_reward": "the reward falls",
    "kl_runaway": "KL runs away",
    "entropy_collapse": "entropy is gone",
    "sampler_mismatch": "sampler and learner disagree",
    "stale_sampler": "sampler and learner disagree",
    "always_clipped": "gradient always clipped",
    "lr_without_effect": "no effect",
    "self_reference": "the reference moves",
    "too_many_epochs": "updates too far",
    "weights_reset": "back at the start",
}


def faults_of(metrics, settings):
    return [finding.name for finding in diagnose(metrics, settings) if finding.kind == "fault"]


def read(path):
    run = json.loads(path.read_text())
    return run["metrics"], run["settings"]


def test_every_fault_of_the_course_has_a_run_and_a_rule():
    assert set(RULE) == set(FAULTS) == {path.stem for path in FAULTY}
    untested = {rule.name for rule in doctor.FAULTS} - set(RULE.values())
    # These have tests of their own, below.
    assert untested == {"the reward does not rise", "training and evaluation disagree"}


@pytest.mark.parametrize("path", FAULTY, ids=lambda path: path.stem)
def test_a_rule_finds_its_fault(path):
    assert RULE[path.stem] in faults_of(*read(path))


@pytest.mark.parametrize("path", HEALTHY, ids=lambda path: path.stem)
def test_no_rule_fires_on_a_healthy_run(path):
    """At its end, nor while it goes on."""
    metrics, settings = read(path)
    for steps in range(1, len(metrics) + 1):
        assert faults_of(metrics[:steps], settings) == [], f"after {steps} steps"
        assert early_warning(metrics[:steps]) is None


def test_the_healthy_runs_are_of_all_kinds():
    settings = [read(path)[1] for path in HEALTHY]
    assert len(settings) >= 10
    assert {s["recipe"] for s in settings} == {"paper", "diverse"}
    assert any(".py:" in s["reward"] for s in settings)          # a reward of one's own
    assert {path.stem[:3] for path in HEALTHY} == {"c2i", "t2i"}


@pytest.mark.slow
@pytest.mark.parametrize("fault", RULE)
def test_a_rule_finds_its_fault_in_a_run_made_now(fault, tmp_path):
    make_run(tmp_path, fault, seed=1, steps=24)
    metrics = read_metrics(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    assert RULE[fault] in faults_of(metrics, config["settings"])


# --- what no short run of the toy shows --------------------------------------------------------

def healthy(steps=60, **changes):
    """Metrics like a healthy run's, but for the changes: {metric: (step) -> value}."""
    functions = dict(
        reward=lambda i: 0.5 + 0.4 * i / steps + 0.03 * (-1) ** i, flat_groups=lambda i: 0.1,
        kl=lambda i: 0.1 * i / (i + 20), entropy=lambda i: 0.3 - 0.1 * i / steps,
        grad_norm=lambda i: 0.2, clip_frac=lambda i: 0.0, ratio_max=lambda i: 1.0,
        loss=lambda i: 1e-3, mismatch_mean=lambda i: 1e-7, missing=lambda i: 0.0,
        diversity=lambda i: 0.1)
    functions |= changes
    return [{"step": i, **{name: f(i) for name, f in functions.items()}} for i in range(steps)]


SETTINGS = dict(max_grad_norm=1.0, cfg_scale=1.0, logprob_cfg="guided", device="cpu")


def test_a_measure_that_falls_at_once_is_hacking_too():
    """Before the second time that it is measured, so that no slow fall is to be seen."""
    rising = {"reward": lambda t: 0.2 + t / 100, "reward/pleasing": lambda t: 0.2 + t / 100}
    metrics = healthy(40, **rising, verified=lambda t: (0.7 if t == 0 else 0.0)
                      if t % 5 == 0 else None)
    assert "reward hacking" in faults_of(metrics, SETTINGS)


def test_an_evaluation_that_falls_while_the_reward_rises():
    """A run of which every step trained on the same eight prompts (`pick_prompts` always answered
    as for step 0)."""
    run = json.loads((DATA / "stuck_prompts.json").read_text())
    found = diagnose(run["metrics"], run["settings"], run["summary"])
    assert [f.name for f in found if f.kind == "fault"] == ["training and evaluation disagree"]
    assert "falls, from 0.597 to 0.458" in found[0].what
    assert faults_of(run["metrics"], run["settings"]) == [], "only the evaluation shows it"
    summary = {"before": {"reward": 0.6}, "after": {"reward": 0.58}}
    assert all(f.kind == "note" for f in diagnose(healthy(), SETTINGS, summary)), "within its noise"


def test_the_made_up_healthy_metrics_are_healthy():
    assert faults_of(healthy(), SETTINGS) == []


def test_a_reward_that_does_not_rise_is_noticed_after_sixty_steps():
    noise = {"reward": lambda i: 0.5 + 0.05 * (-1) ** i}
    assert faults_of(healthy(72, **noise), SETTINGS) == ["the reward does not rise"]
    assert faults_of(healthy(59, **noise), SETTINGS) == []


def test_the_loss_near_zero_is_explained_and_no_fault():
    note, = diagnose(healthy(), SETTINGS)
    assert note.kind == "note" and note.name == "why is the loss 0?"
    assert "advantages of a group add up to zero" in note.advice
    assert diagnose(healthy(loss=lambda i: 0.7), SETTINGS) == []


def test_flat_groups_at_the_end_of_a_run_that_learned_are_no_fault():
    learned = healthy(flat_groups=lambda i: min(1.0, i / 40))
    assert [finding.name for finding in diagnose(learned, SETTINGS)] == [
        "why is the loss 0?", "nothing left to learn"]


def test_rounding_of_a_gpu_and_of_guidance_is_no_mismatch():
    metrics = healthy(mismatch_mean=lambda i: 0.03)
    assert faults_of(metrics, SETTINGS) == ["sampler and learner disagree"]
    assert faults_of(metrics, SETTINGS | {"device": "cuda:0"}) == []
    metrics = healthy(mismatch_mean=lambda i: 0.2)
    gpu = SETTINGS | {"device": "cuda:0"}
    assert faults_of(metrics, gpu) == ["sampler and learner disagree"]
    assert faults_of(metrics, gpu | {"cfg_scale": 7.5}) == []
    official = SETTINGS | {"cfg_scale": 2.0, "logprob_cfg": "none"}
    assert faults_of(healthy(mismatch_mean=lambda i: 0.3), official) == []


def test_a_watched_reward_that_falls_is_hacking_and_one_that_rises_is_not():
    falls = {"watch/clip": lambda i: 0.8 - 0.5 * i / 60 if i % 5 == 0 else None}
    rises = {"watch/clip": lambda i: 0.8 + 0.5 * i / 60 if i % 5 == 0 else None}
    assert faults_of(healthy(**falls), SETTINGS) == ["reward hacking"]
    assert faults_of(healthy(**rises), SETTINGS) == []


def test_a_few_steps_say_nothing():
    assert diagnose(healthy()[:7], SETTINGS) == []
    assert diagnose([], SETTINGS) == []
    assert "too few" in doctor.report(healthy()[:7], SETTINGS)[0]


def test_the_report_is_lines_of_plain_text():
    lines = doctor.report(healthy(missing=lambda i: 0.5), SETTINGS)
    assert lines[0].startswith("doctor: missing rewards: the reward cannot judge 50% of the images")
    assert lines[1].startswith("note: why is the loss 0?")
    assert doctor.report(healthy(), SETTINGS)[0] == "doctor: nothing wrong"


def test_the_early_warning_waits_for_five_flat_steps_in_a_row():
    flat = healthy(flat_groups=lambda i: 1.0)
    assert early_warning(flat[:4]) is None
    assert "nothing is learned" in early_warning(flat[:5])
    assert early_warning(flat[:5] + healthy()[5:6]) is None
