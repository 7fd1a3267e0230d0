"""The doctor: every rule finds the fault it is for, in a run that has it, and no rule fires on a
healthy run.

The runs were made by this repository and lie in tests/data/, their numbers rounded: those with a
fault by assignments/faults.py (24 steps of the c2i toy), but for tiny_reward and huge_reward, which
the training scripts made as the healthy ones, with the settings that stand in them; some were
stopped before their last step. `pytest --slow -m slow` makes the faulty ones anew.
"""

import json
import math
from pathlib import Path

import pytest
from conftest import read_metrics

import report
from assignments.faults import FAULTS, make_run
from harness import doctor
from harness.doctor import diagnose, early_warning

DATA = Path(__file__).parents[1] / "data"
FAULTY = sorted((DATA / "faulty").glob("*.json"))
HEALTHY = sorted((DATA / "healthy").glob("*.json"))

# The fault that was put in -> the rule that names it.
SCALES = {"tiny_reward": "the reward's scale", "huge_reward": "the reward's scale"}
RULE = SCALES | {
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
    assert set(RULE) == {*FAULTS, *SCALES} == {path.stem for path in FAULTY}
    faults = {finding.name for finding in doctor.RULES.values() if finding.kind == "fault"}
    # These have tests of their own, below.
    assert faults - set(RULE.values()) == {"the reward does not rise",
                                           "training and evaluation disagree"}


@pytest.mark.parametrize("path", FAULTY, ids=lambda path: path.stem)
def test_a_rule_finds_its_fault(path):
    assert RULE[path.stem] in faults_of(*read(path))


@pytest.mark.parametrize("path", HEALTHY, ids=lambda path: path.stem)
def test_no_rule_fires_on_a_healthy_run(path):
    """At its end, nor while it goes on."""
    metrics, settings = read(path)
    for steps in range(1, len(metrics) + 1):
        assert faults_of(metrics[:steps], settings) == [], f"after {steps} steps"
        assert early_warning(metrics[:steps], settings) is None


@pytest.mark.parametrize("path", HEALTHY, ids=lambda path: path.stem)
def test_the_papers_recipe_loses_diversity_and_the_other_does_not(path):
    metrics, settings = read(path)
    lost = [f for f in diagnose(metrics, settings) if f.name == "less varied"]
    assert len(lost) == (settings["recipe"] == "paper")
    assert all(f.kind == "note" and "--recipe diverse" in f.advice for f in lost)


def test_the_healthy_runs_are_of_all_kinds():
    settings = [read(path)[1] for path in HEALTHY]
    assert len(settings) >= 10
    assert {s["recipe"] for s in settings} == {"paper", "diverse"}
    assert any(".py:" in s["reward"] for s in settings)          # a reward of one's own
    assert {path.stem[:3] for path in HEALTHY} == {"c2i", "t2i"}


@pytest.mark.slow
@pytest.mark.parametrize("fault", FAULTS)
def test_a_rule_finds_its_fault_in_a_run_made_now(fault, tmp_path):
    make_run(tmp_path, fault, seed=1, steps=24)
    metrics = read_metrics(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    assert RULE[fault] in faults_of(metrics, config["settings"])


@pytest.mark.parametrize("path", FAULTY, ids=lambda path: path.stem)
@pytest.mark.parametrize("lost", [None, math.nan])
def test_a_step_without_rewards_silences_no_rule(lost, path):
    """One in the middle, and one at the end: as a reward leaves it that fails for a moment."""
    metrics, settings = read(path)
    for t in (len(metrics) // 2, len(metrics) - 1):
        metrics[t] = metrics[t] | {name: lost for name in metrics[t] if name.startswith("reward")}
        metrics[t] |= {"reward_std": 0.0, "flat_groups": 1.0, "missing": 1.0, "verified": lost}
    assert RULE[path.stem] in faults_of(metrics, settings)


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
    for after, falls in ((-0.95, False), (-1.2, True)):          # as of jpeg, which is negative
        summary = {"before": {"reward": -1.0}, "after": {"reward": after}}
        names = [f.name for f in diagnose(healthy(), SETTINGS, summary)]
        assert ("training and evaluation disagree" in names) == falls, f"from -1 to {after}"


def test_the_command_hears_of_the_evaluations_too(tmp_path, capsys):
    run = json.loads((DATA / "stuck_prompts.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({"settings": run["settings"]}))
    (tmp_path / "summary.json").write_text(json.dumps(run["summary"]))
    (tmp_path / "metrics.jsonl").write_text("\n".join(map(json.dumps, run["metrics"])))
    report.main(["--doctor", str(tmp_path)])
    assert "doctor: training and evaluation disagree" in capsys.readouterr().out


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


@pytest.mark.parametrize("spread, flat, wrong", [
    (0.5, 0.0, False), (1e-3, 0.0, False), (1e-5, 0.0, True), (1e15, 0.0, False), (1e19, 0.0, True),
    (math.inf, 0.5, True), (None, 0.5, True), (1e-4, 0.9, False), (1e-6, 0.9, True),
    (0.0, 1.0, False),
])
def test_the_scale_that_training_can_use(spread, flat, wrong):
    """Of the groups that have a spread: flat ones count as 0 in reward_std.  In the log None is an
    infinite one."""
    metrics = healthy(reward_std=lambda i: spread, flat_groups=lambda i: flat)
    assert ("the reward's scale" in faults_of(metrics, SETTINGS)) == wrong
    unscaled = SETTINGS | {"scale_advantages": False}
    assert "the reward's scale" not in faults_of(metrics, unscaled)


def test_the_scale_is_said_with_what_to_do():
    metrics = healthy(reward_std=lambda i: 5e-7, flat_groups=lambda i: 0.0)
    line, *_ = doctor.report(metrics, SETTINGS)
    assert "the reward's scale: rewards differ by 5e-07 within a group" in line
    assert "advantages have 0.5% of their size" in line and "multiply the weight" in line


def test_lost_diversity_is_measured_by_the_best_that_is_known():
    metrics = healthy(diversity=lambda i: 0.1 if i < 30 else 0.05)

    def said(metrics, **summary):
        return " ".join(f.what for f in diagnose(metrics, SETTINGS, summary))

    assert "50% of the diversity" in said(metrics)
    before, after = {"diversity": 0.1}, {"diversity": 0.04}
    assert "60% of the diversity" in said(metrics, before=before, after=after)
    rough = [m | {"diversity_kept": 0.3 if m["step"] % 5 == 0 else None} for m in metrics]
    assert "70% of the diversity" in said(rough, before=before, after=after)
    assert "79% of the diversity" in said(rough, before=before,
                                          after=after | {"diversity_kept": 0.21})
    assert "diversity" not in said(rough, before=before, after=after | {"diversity_kept": 0.96})
    for unknown in (None, math.nan):
        assert "60% of the diversity" in said(metrics, before=before,
                                              after=after | {"diversity_kept": unknown})
    assert "diversity" not in said(healthy(diversity=lambda i: 0.0))


@pytest.mark.parametrize("strange", [None, math.nan, math.inf, -math.inf])
def test_a_metric_that_is_missing_or_infinite_is_left_out(strange):
    """In a step, or always."""
    metrics = healthy(72, reward=lambda i: 0.5 + 0.05 * (-1) ** i)
    names = [name for name in metrics[0] if name not in ("step", "flat_groups")]
    for t in (0, 30, 71):
        metrics[t] = metrics[t] | dict.fromkeys(names, strange)
    assert faults_of(metrics, SETTINGS) == ["the reward does not rise"]
    for name in [*names, "flat_groups", "reward_std", "verified"]:
        diagnose(healthy(**{"reward_std": lambda i: 0.3, name: lambda i: strange}), SETTINGS)
    diagnose([{"step": i} | dict.fromkeys(names, strange) for i in range(72)], SETTINGS)


def test_rewards_whose_squares_overflow():
    metrics = healthy(reward=lambda i: (-1) ** i * 1e300, reward_std=lambda i: 1e308)
    assert "the reward's scale" in faults_of(metrics, SETTINGS)


def test_the_step_of_a_reset_is_that_of_the_log():
    metrics = healthy(kl=lambda i: None if i in (3, 7) else 0.0 if i == 20 else 0.1)
    found, = [f for f in diagnose(metrics, SETTINGS) if f.name == "back at the start"]
    assert "at step 20" in found.what


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
    assert early_warning(flat[:4], SETTINGS) is None
    assert "nothing is learned" in early_warning(flat[:5], SETTINGS)
    assert early_warning(flat[:5] + healthy()[5:6], SETTINGS) is None
    for lost in (None, math.nan):
        one = [*flat[:4], flat[4] | {"reward": lost}]
        average = f"the same reward ({flat[3]['reward']:.4g} on average)"
        assert average in early_warning(one, SETTINGS)
        unjudged = [m | {"reward": lost} for m in one]
        assert "no image has had a reward" in early_warning(unjudged, SETTINGS)
