"""The scripts as a user runs them: files, resume, errors, and the result that the README promises."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

import argrpo
import experiment
import toy
import train_c2i
import train_t2i

ROOT = Path(__file__).parent.parent
QUICK = ["--preset", "toy", "--steps", "4", "--prompts-per-step", "2", "--group-size", "4", "--eval-images", "24", "--save-every", "2"]


def read_metrics(out):
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


def without_times(metrics):
    return [{name: value for name, value in m.items() if "seconds" not in name} for m in metrics]


def test_a_run_leaves_what_the_design_promises(tmp_path):
    out = tmp_path / "run"
    summary = train_c2i.main(QUICK + ["--out", str(out), "--reward", "shapes,jpeg:0.01"])
    files = {"config.json", "metrics.jsonl", "summary.json", "before_after.png", "curves.png", "last.pt", "previous.pt",
             "model.pt"}
    assert {path.name for path in out.iterdir()} == files
    assert summary == json.loads((out / "summary.json").read_text())
    kept = {"diversity_kept", *(f"diversity_kept/{part}" for part in ("distance", "centres", "sizes", "layouts"))}
    for scores in (summary["before"], summary["after"]):
        assert set(scores) - kept == {"reward", "reward/shapes", "reward/jpeg", "verified", "entropy", "diversity"}
        assert scores["verified"] == scores["reward/shapes"]
        assert scores["reward"] == pytest.approx(scores["reward/shapes"] + 0.01 * scores["reward/jpeg"], abs=1e-5)
    metrics = read_metrics(out)
    assert [m["step"] for m in metrics] == [0, 1, 2, 3]
    assert {"reward", "reward/shapes", "reward/jpeg", "reward_std", "flat_groups", "kl", "entropy", "clip_frac", "ratio_max",
            "mismatch", "grad_norm", "diversity", "seconds", "seconds_rollout", "seconds_reward",
            "seconds_update"} <= set(metrics[0])
    config = json.loads((out / "config.json").read_text())
    assert config["settings"]["group_size"] == 4 and config["torch"] == torch.__version__ and config["argrpo"]


@pytest.mark.parametrize("samples", [4, 8])
def test_the_gallery_shows_every_prompts_own_pictures(samples):
    """Six at most; with fewer samples, a row never runs into the next prompt's."""
    settings = train_c2i.Settings(eval_images=3 * samples)
    prompts = argrpo.Prompts(["prompt 0", "prompt 1", "prompt 2"], torch.arange(3))

    def reward_fn(pictures, texts):
        return torch.tensor([float(text[-1]) for text in texts]), {}
    model, vq = toy.load("c2i")
    for text, pictures, rewards in experiment.evaluate(model, vq, prompts, reward_fn, settings)[1]:
        assert len(pictures) == len(rewards) == min(samples, 6) and set(rewards) == {float(text[-1])}


def test_model_pt_is_the_trained_model_in_llamagens_format(tmp_path):
    train_c2i.main(QUICK + ["--out", str(tmp_path)])
    state = torch.load(tmp_path / "model.pt", weights_only=True)
    trained = torch.load(tmp_path / "last.pt", weights_only=True)["model"]
    model = argrpo.load_weights(argrpo.Transformer(toy.CONFIGS["c2i"]), tmp_path / "model.pt")
    assert list(state) == ["model"]
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, trained[name]) and torch.equal(tensor, state["model"][name])
    start, _ = toy.load("c2i")
    assert any(not torch.equal(a, b) for a, b in zip(model.parameters(), start.parameters()))


def test_the_same_seed_gives_the_same_run_and_another_seed_another(tmp_path):
    for name, seed in (("a", "1"), ("b", "1"), ("c", "2")):
        train_c2i.main(QUICK + ["--out", str(tmp_path / name), "--seed", seed])
    a, b, c = (without_times(read_metrics(tmp_path / name)) for name in "abc")
    assert a == b and a != c


def test_resuming_a_stopped_run_gives_the_run_that_never_stopped(tmp_path):
    """SIGINT in the middle: the step is finished, everything saved, the status is 130; --resume does the rest."""
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    options = QUICK + ["--steps", "30"]
    train_c2i.main(options + ["--out", str(whole)])
    process = subprocess.Popen([sys.executable, ROOT / "train_c2i.py", *options, "--out", str(stopped)], cwd=tmp_path,
                               stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    deadline = time.time() + 60
    while not (stopped / "metrics.jsonl").exists() or not read_metrics(stopped):
        assert process.poll() is None and time.time() < deadline
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 128 + signal.SIGINT and f"continue with: python train_c2i.py --resume {stopped}" in errors
    assert 0 < len(read_metrics(stopped)) < 30
    train_c2i.main(["--resume", str(stopped)])
    assert without_times(read_metrics(stopped)) == without_times(read_metrics(whole))
    a, b = (torch.load(out / "model.pt", weights_only=True)["model"] for out in (whole, stopped))
    assert all(torch.equal(a[name], b[name]) for name in a)
    before, after = (json.loads((out / "summary.json").read_text())["after"] for out in (whole, stopped))
    assert before == after


def test_steps_that_were_logged_but_not_saved_run_again(tmp_path):
    """As after `kill -9` between two checkpoints: the log is ahead of last.pt."""
    train_c2i.main(QUICK + ["--out", str(tmp_path)])
    complete = without_times(read_metrics(tmp_path))
    model, optimizer = toy.load("c2i")[0], None
    optimizer = argrpo.make_optimizer(model, argrpo.GRPOConfig())
    experiment.save_checkpoint(tmp_path / "start.pt", 0, model, optimizer)
    os.replace(tmp_path / "start.pt", tmp_path / "last.pt")
    train_c2i.main(["--resume", str(tmp_path)])
    assert without_times(read_metrics(tmp_path)) == complete


def test_an_earlier_run_is_never_overwritten(tmp_path, capsys):
    train_c2i.main(QUICK + ["--out", str(tmp_path)])
    before = (tmp_path / "metrics.jsonl").read_bytes()
    with pytest.raises(SystemExit) as stop:
        train_c2i.main(QUICK + ["--out", str(tmp_path)])
    assert stop.value.code == 2 and f"{tmp_path} already holds a run" in capsys.readouterr().err
    assert (tmp_path / "metrics.jsonl").read_bytes() == before


def test_resuming_with_another_setting_is_refused(tmp_path, capsys):
    train_c2i.main(QUICK + ["--out", str(tmp_path)])
    with pytest.raises(SystemExit) as stop:
        train_c2i.main(["--resume", str(tmp_path), "--group-size", "8"])
    assert stop.value.code == 2 and "group_size was 4 and cannot become 8" in capsys.readouterr().err


@pytest.mark.parametrize("options, message", [
    (["--preset", "toyy"], "unknown preset 'toyy': there are toy, B-256"),
    (["--preset", "toy", "--group-size", "1"], "group_size must be at least 2"),
    (["--preset", "toy", "--lr", "nan"], "lr must be a finite number of at least 0, not nan"),
    (["--preset", "toy", "--reward", "beauty"], "unknown reward 'beauty'"),
    (["--preset", "toy", "--reward", "mine.py:f"], "no such reward file: mine.py"),
    (["--preset", "toy", "--eval-cfg-scales", "1,high"], "eval_cfg_scales must be numbers of at least 0 such as 1,7.5, not '1,high'"),
    (["--preset", "B-256", "--reward", "jpeg", "--gpt-ckpt", "nowhere.pt"], "nowhere.pt: no such file or folder in"),
    (["--preset", "toy", "--classes", "one pink circle"], "no class is named 'one pink circle': did you mean"),
    (["--resume", "nowhere"], "nothing to resume: there is no nowhere"),
    (["--stepps", "3"], "unrecognized arguments: --stepps 3"),
    (["--step", "3"], "unrecognized arguments: --step 3"),
])
def test_bad_options_end_with_one_line_and_leave_nothing(options, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as stop:
        train_c2i.main(options)
    assert stop.value.code == 2 and message in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_the_diverse_recipe_is_a_preset_of_settings(tmp_path):
    def settings(*options):
        return experiment.parse_settings(train_c2i.Settings, train_c2i.PRESETS, "toy", ["--out", str(tmp_path), *options], "x", "",
                                         train_c2i.DIVERSE)
    paper, diverse, mine = settings(), settings("--recipe", "diverse"), settings("--recipe", "diverse", "--diversity-bonus", "0.1")
    names = ("kl_beta", "rehearsal", "diversity_bonus", "prompts_per_step")
    assert [getattr(paper, name) for name in names] == [0.01, 0.0, 0.0, 8]
    assert [getattr(diverse, name) for name in names] == [0.0, 0.3, 0.2, 16]
    assert mine.diversity_bonus == 0.1 and mine.rehearsal == 0.3
    with pytest.raises(ValueError, match="unknown recipe 'wild'"):
        settings("--recipe", "wild")


@pytest.mark.parametrize("distance", ["pixels", "codes"])
def test_a_diverse_run_of_the_toy(distance, tmp_path):
    summary = train_c2i.main(QUICK + ["--recipe", "diverse", "--bonus-distance", distance, "--eval-images", "270",
                                      "--out", str(tmp_path / "run")])
    parts = [summary["after"][f"diversity_kept/{part}"] for part in ("distance", "centres", "sizes", "layouts")]
    assert summary["after"]["diversity_kept"] == pytest.approx(sum(parts) / 4) and all(part > 0.5 for part in parts)
    metrics = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert all(m["rehearsal"] > 0 for m in metrics) and [m["step"] for m in metrics if "diversity_kept" in m] == [0]


T2I_KINDS = {"verified", "verified/seen", "verified/unseen", "verified/counting", "verified/position"}


def test_a_t2i_run_reports_every_kind_of_caption_at_every_guidance(tmp_path):
    summary = train_t2i.main(QUICK + ["--eval-images", "120", "--eval-cfg-scales", "1,7.5", "--out", str(tmp_path / "run")])
    for scores in (summary["before"], summary["after"]):
        assert T2I_KINDS <= set(scores) and set(scores["guidance"]) == {"7.5"}             # 1 is the rollout's own
        assert T2I_KINDS <= set(scores["guidance"]["7.5"])
        # Every caption is seen or unseen, and counts or places.
        for a, b in (("seen", "unseen"), ("counting", "position")):
            low, high = sorted((scores[f"verified/{a}"], scores[f"verified/{b}"]))
            assert low <= scores["verified"] <= high
    assert summary == json.loads((tmp_path / "run" / "summary.json").read_text())
    assert len(read_metrics(tmp_path / "run")) == 4


def test_t2i_trains_on_no_composition_that_pretraining_never_saw():
    texts, eval_texts = train_t2i.choose_captions(train_t2i.Settings(preset="toy"))
    assert not set(texts) & toy.UNSEEN and toy.UNSEEN <= set(eval_texts)
    assert sum(toy.parse(text).relation is None for text in texts) == len(texts) / 2


def test_t2i_on_captions_from_a_file(tmp_path):
    (tmp_path / "mine.jsonl").write_text('{"prompt": "Two red circles"}\n{"prompt": "a red circle above  a blue square"}\n')
    train_t2i.main(QUICK + ["--prompts", str(tmp_path / "mine.jsonl"), "--out", str(tmp_path / "run")])
    (tmp_path / "other.txt").write_text("a photo of an otter\n")
    with pytest.raises(SystemExit):
        train_t2i.main(QUICK + ["--prompts", str(tmp_path / "other.txt"), "--out", str(tmp_path / "other")])
    assert not (tmp_path / "other").exists()


def test_composed_captions_are_held_out_for_evaluation():
    texts, eval_texts = train_t2i.choose_captions(train_t2i.Settings(preset="t2i-XL-256", composed=100))
    assert len(texts) == 100 and len(eval_texts) == 64 and not set(texts) & set(eval_texts)


@pytest.mark.parametrize("options, message", [
    (["--preset", "B-256"], "unknown preset 'B-256': there are toy, t2i-XL-256, t2i-XL-512"),
    (["--preset", "toy", "--prompts", "nowhere.txt"], "no such file of captions: nowhere.txt"),
    (["--preset", "t2i-XL-256", "--reward", "jpeg", "--gpt-ckpt", "nowhere.pt"], "nowhere.pt: no such file or folder"),
])
def test_bad_t2i_options_end_with_one_line(options, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as stop:
        train_t2i.main(options)
    assert stop.value.code == 2 and message in capsys.readouterr().err and not list(tmp_path.iterdir())


def test_help_explains_every_option(capsys):
    with pytest.raises(SystemExit) as stop:
        train_c2i.main(["--help"])
    text = capsys.readouterr().out
    assert stop.value.code == 0
    for name, comment in experiment.field_comments(experiment.Settings).items():
        assert "--" + name.replace("_", "-") in text
        assert " ".join(comment.split()[:3]) in " ".join(text.split())


def test_a_failing_write_keeps_the_previous_checkpoint(tmp_path):
    path = tmp_path / "last.pt"
    experiment.write_atomically(path, lambda file: file.write(b"good"))

    def fail(file):
        file.write(b"half")
        raise OSError("no space left on device")

    with pytest.raises(OSError):
        experiment.write_atomically(path, fail)
    assert path.read_bytes() == b"good"


@pytest.mark.slow
def test_the_default_run_reaches_what_the_readme_says(tmp_path):
    summary = train_c2i.main(["--preset", "toy", "--out", str(tmp_path)])
    before, after = summary["before"], summary["after"]
    assert before["verified"] <= 0.65 and after["verified"] >= 0.88
    assert 0 < after["diversity"] < before["diversity"] and 0 < after["entropy"] < before["entropy"]
