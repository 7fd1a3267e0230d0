"""The scripts as a user runs them: files, resume, errors, and the result in the README."""

import io
import json
import math
import os
import shutil
import signal
import subprocess
import sys
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import fields
from pathlib import Path

import pytest
import torch
from conftest import read_metrics, trained_weights

import argrpo
import toy
import train_c2i
import train_t2i
from evaluate import EvaluateSettings
from harness import options
from harness.before_after import evaluate
from harness.checkpoints import save_checkpoint
from harness.logs import one_line_errors
from pretrained import load_weights
from sample import SampleSettings

ROOT = Path(__file__).parents[2]
# The evaluations draw up to 12 prompts in a pass: what takes time is the number of passes.
QUICK = ["--preset", "toy", "--steps", "4", "--prompts-per-step", "2", "--group-size", "4",
         "--rollout-prompts", "12", "--eval-images", "24", "--save-every", "2",
         "--progress-every", "4"]
HEAVY = ("torchvision", "open_clip", "transformers", "timm", "huggingface_hub", "matplotlib")


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A run that is over, for tests that only look at it: (its folder, what it printed)."""
    out = tmp_path_factory.mktemp("runs") / "finished"
    printed = io.StringIO()
    with pytest.MonkeyPatch.context() as patch, redirect_stdout(printed), redirect_stderr(printed):
        patch.setattr("harness.gallery.SECONDS", 0)      # of its closer look, a single place
        train_c2i.main(QUICK + ["--out", str(out), "--reward", "shapes,jpeg:0.01"])
    return out, printed.getvalue()


@pytest.fixture
def another(finished, tmp_path):
    """A copy of that run, for tests that change it."""
    return Path(shutil.copytree(finished[0], tmp_path / "another"))


KEPT = ("", "/distance", "/centres", "/sizes", "/layouts")               # D, and its parts


def test_a_run_leaves_what_the_design_promises(finished):
    out, printed = finished
    assert f"look at {out}/report.html" in printed
    files = {"config.json", "metrics.jsonl", "summary.json", "before_after.png", "curves.png",
             "last.pt", "previous.pt", "model.pt", "report.html", "report.npz", "progress",
             "progress.gif"}
    assert {path.name for path in out.iterdir()} == files
    summary = json.loads((out / "summary.json").read_text())
    names = {"reward", "reward/shapes", "reward/jpeg", "verified", "entropy", "diversity"}
    for scores in (summary["before"], summary["after"]):
        assert {name for name in scores if not name.startswith("diversity_kept")} == names
        assert scores["verified"] == scores["reward/shapes"]
        total = scores["reward/shapes"] + 0.01 * scores["reward/jpeg"]
        assert scores["reward"] == pytest.approx(total, abs=1e-5)
    assert {f"diversity_kept{part}" for part in KEPT} <= set(summary["after"])
    config = json.loads((out / "config.json").read_text())
    assert config["settings"]["group_size"] == 4
    assert config["torch"] == torch.__version__ and config["argrpo"]


def test_a_run_logs_every_step(finished):
    metrics = read_metrics(finished[0], seconds=True)
    assert [m["step"] for m in metrics] == [0, 1, 2, 3]
    seconds = [f"seconds_{part}" for part in ("rollout", "reward", "reference", "update")]
    names = {"reward", "reward/shapes", "reward/jpeg", "reward_std", "flat_groups", "kl", "entropy",
             "clip_frac", "ratio_max", "mismatch", "grad_norm", "diversity", "seconds", *seconds}
    for m in metrics:
        assert names <= set(m) and all(m[part] > 0 for part in seconds)
        assert m["seconds"] == pytest.approx(sum(m[part] for part in seconds))


@pytest.mark.parametrize("samples", [4, 8])
def test_the_gallery_shows_every_prompts_own_pictures(samples):
    """Six at most; with fewer samples, a row never runs into the next prompt's."""
    settings = train_c2i.C2iSettings(eval_images=3 * samples)
    prompts = argrpo.Prompts(["prompt 0", "prompt 1", "prompt 2"], torch.arange(3))

    def reward_fn(pictures, texts):
        return torch.tensor([float(text[-1]) for text in texts]), {}
    model, vq = toy.load("c2i")
    _, gallery = evaluate(model, vq, prompts, reward_fn, settings)
    assert gallery["pictures"].shape[:2] == (3, min(samples, 6))
    assert gallery["texts"].tolist() == ["prompt 2", "prompt 1", "prompt 0"]
    assert (gallery["scores"][0] == [[2.0], [1.0], [0.0]]).all()


def test_model_pt_is_the_trained_model_in_llamagens_format(finished):
    out, _ = finished
    state = torch.load(out / "model.pt", weights_only=True)
    trained = torch.load(out / "last.pt", weights_only=True)["model"]
    model = load_weights(argrpo.Transformer(toy.CONFIGS["c2i"]), out / "model.pt")
    assert list(state) == ["model"]
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, trained[name]) and torch.equal(tensor, state["model"][name])
    start, _ = toy.load("c2i")
    assert any(not torch.equal(a, b) for a, b in zip(model.parameters(), start.parameters()))


def test_the_same_seed_gives_the_same_run_and_another_seed_another(tmp_path, quick):
    runs = {"first": "0", "same": "0", "other": "1"}
    for name, seed in runs.items():
        train_c2i.main(QUICK + ["--steps", "1", "--out", str(tmp_path / name), "--seed", seed])
    first, same, other = (read_metrics(tmp_path / name) for name in runs)
    assert first == same and first != other


INTERRUPTED = """
import os, signal
calls = 0
def light(images, prompts):
    global calls
    calls += 1
    if calls == int(os.environ.get("INTERRUPT_CALL", -1)):
        os.kill(os.getpid(), signal.SIGINT)
    return images.mean(dim=(1, 2, 3))
"""


def test_resuming_a_stopped_run_gives_the_run_that_never_stopped(tmp_path, monkeypatch, capsys,
                                                                 quick):
    """SIGINT in the middle: the step is finished, everything saved, the status is 130.

    --resume does the rest."""
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    (tmp_path / "mine.py").write_text(INTERRUPTED)
    given = QUICK + ["--steps", "3", "--reward", f"{tmp_path}/mine.py:light"]
    train_c2i.main(given + ["--out", str(whole)])
    (tmp_path / "mine.py").write_text(INTERRUPTED)       # so that it is read, and counts, anew
    monkeypatch.setenv("INTERRUPT_CALL", "2")    # the first call is the evaluation's
    with pytest.raises(SystemExit) as stop:
        train_c2i.main(given + ["--out", str(stopped)])
    assert stop.value.code == 128 + signal.SIGINT
    assert f"continue with: python train_c2i.py --resume {stopped}" in capsys.readouterr().err
    assert [m["step"] for m in read_metrics(stopped)] == [0]
    monkeypatch.delenv("INTERRUPT_CALL")
    train_c2i.main(["--resume", str(stopped)])
    assert read_metrics(stopped) == read_metrics(whole)
    a, b = trained_weights(whole), trained_weights(stopped)
    assert all(torch.equal(a[name], b[name]) for name in a)
    a, b = (json.loads((out / "summary.json").read_text())["after"] for out in (whole, stopped))
    assert a == b


@pytest.mark.slow
def test_steps_that_were_logged_but_not_saved_run_again(another, no_pictures):
    """As after `kill -9` between two checkpoints: the log is ahead of last.pt."""
    complete = read_metrics(another)
    model, _ = toy.load("c2i")
    optimizer = argrpo.make_optimizer(model, argrpo.GRPOConfig())
    save_checkpoint(another / "start.pt", 0, model, optimizer)
    os.replace(another / "start.pt", another / "last.pt")
    train_c2i.main(["--resume", str(another)])
    assert read_metrics(another) == complete


def test_an_earlier_run_is_never_overwritten(finished, capsys):
    out, _ = finished
    before = (out / "metrics.jsonl").read_bytes()
    with pytest.raises(SystemExit) as stop:
        train_c2i.main(QUICK + ["--out", str(out)])
    assert stop.value.code == 2
    assert f"{out} already holds a run" in capsys.readouterr().err
    assert (out / "metrics.jsonl").read_bytes() == before


@pytest.mark.parametrize("name", ["model.pt", "last.pt", "summary.json", "notes.txt"])
def test_a_new_run_takes_an_empty_folder(name, tmp_path, capsys):
    (tmp_path / name).write_text("mine")
    (tmp_path / ".hidden").write_text("")
    with pytest.raises(SystemExit) as stop:
        train_c2i.main(QUICK + ["--out", str(tmp_path)])
    assert stop.value.code == 2 and f"holds {name}, but no run" in capsys.readouterr().err
    assert (tmp_path / name).read_text() == "mine"


def test_a_run_is_resumed_from_another_folder(another, tmp_path, monkeypatch):
    """Its files are meant from where it began.  What is no file there stays as it is."""
    config = json.loads((another / "config.json").read_text())
    (tmp_path / "mine.pt").write_text("")
    config["folder"] = str(tmp_path)
    config["settings"] |= dict(gpt_ckpt="mine.pt", vq_ckpt="some/repo",
                               watch="jpeg,w.py:f:2,~/h.py:f")
    (another / "config.json").write_text(json.dumps(config))
    (tmp_path / "elsewhere").mkdir()
    for folder, prefix in ((tmp_path, ""), (tmp_path / "elsewhere", f"{tmp_path}/")):
        monkeypatch.chdir(folder)
        found = options.resumed(train_c2i.C2iSettings, {"resume": str(another)})
        assert found.out == str(another), "it goes on in the folder that is named, a copy"
        assert found.gpt_ckpt == prefix + "mine.pt" and found.vq_ckpt == "some/repo"
        home = str(Path.home()) if prefix else "~"
        assert found.watch == f"jpeg,{prefix}w.py:f:2,{home}/h.py:f"


@pytest.mark.parametrize("encoding", ["ascii", "cp1252"])
def test_a_terminal_without_unicode_ends_nothing(encoding, monkeypatch):
    shown = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(shown, encoding))
    with one_line_errors():
        print("a \u72d7, drawn", flush=True)
    assert shown.getvalue() == b"a ?, drawn\n"


def test_watched_rewards_are_asked_about_the_prompts(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    Path("w.py").write_text("def f(images, prompts):\n    return images.mean((1, 2, 3))\n"
                            "def refuse(prompts):\n    raise ValueError('no text in quotes')\n"
                            "f.check_prompts = refuse\n")
    with pytest.raises(SystemExit) as stop:
        train_c2i.main(QUICK + ["--watch", "w.py:f"])
    assert stop.value.code == 2 and "no text in quotes" in capsys.readouterr().err


def test_watched_rewards_are_asked_about_all_captions(tmp_path):
    """Those to train on, too, which every fifth step draws: before any model is loaded."""
    file = tmp_path / "w.py"
    file.write_text("def f(images, prompts):\n    return images.mean((1, 2, 3))\n"
                    "def refuse(prompts):\n    raise ValueError(f'these {len(prompts)}')\n"
                    "f.check_prompts = refuse\n")
    settings = train_t2i.T2iSettings(preset="t2i-XL-256", reward="jpeg", composed=9,
                                     watch=f"{file}:f")
    with pytest.raises(ValueError, match=f"these {9 + 64}"):
        train_t2i.load(settings, torch.device("cpu"))


def test_resuming_with_another_setting_is_refused(finished, capsys):
    with pytest.raises(SystemExit) as stop:
        train_c2i.main(["--resume", str(finished[0]), "--group-size", "8"])
    assert stop.value.code == 2
    assert "group_size was 4 and cannot become 8" in capsys.readouterr().err


def test_a_run_of_another_version_is_not_resumed(another, capsys, quick):
    """A setting that this version does not know; one that it has in addition gets its default."""
    config = json.loads((another / "config.json").read_text())
    del config["settings"]["save_every"]
    (another / "config.json").write_text(json.dumps(config))
    train_c2i.main(["--resume", str(another)])
    config["settings"]["inner_epochs"] = 1
    (another / "config.json").write_text(json.dumps(config))
    with pytest.raises(SystemExit) as stop:
        train_c2i.main(["--resume", str(another)])
    assert stop.value.code == 2
    assert "another version of this repository, with the setting inner" in capsys.readouterr().err


def test_a_model_of_hugging_face_is_no_run(tmp_path, capsys):
    (tmp_path / "config.json").write_text('{"model_type": "t5"}')
    with pytest.raises(SystemExit) as stop:
        train_c2i.main(["--resume", str(tmp_path)])
    assert stop.value.code == 2 and "nothing to resume: there is no" in capsys.readouterr().err


def test_a_sampler_that_disagrees_is_reported(finished, tmp_path, monkeypatch, capsys, quick):
    disagree = "sampler and learner disagree by "

    def warnings(name, *given):
        train_c2i.main(QUICK + ["--steps", "1", "--out", str(tmp_path / name), *given])
        return capsys.readouterr().err.count("step 1: " + disagree)

    assert disagree not in finished[1]
    assert warnings("asked for", "--cfg-scale", "3", "--logprob-cfg", "none") == 0
    honest = argrpo.generate
    monkeypatch.setattr(argrpo, "generate", lambda *a, temperature, **how: honest(
        *a, temperature=1.5, **how))
    assert warnings("warmer") == 1


SCALES = "eval_cfg_scales must be numbers of at least 0 such as 1,7.5, not '1,high'"


@pytest.mark.parametrize("given, message", [
    (["--preset", "toyy"], "unknown preset 'toyy': there are toy, B-256"),
    (["--preset", "toy", "--group-size", "1"], "group_size must be a finite number of at least 2"),
    (["--preset", "toy", "--lr", "nan"], "lr must be a finite number of at least 0, not nan"),
    (["--preset", "toy", "--reward", "beauty"], "unknown reward 'beauty'"),
    (["--preset", "toy", "--reward", "mine.py:f"], "no such reward file: mine.py"),
    (["--preset", "toy", "--eval-cfg-scales", "1,high"], SCALES),
    (["--preset", "B-256", "--reward", "jpeg", "--gpt-ckpt", "nowhere.pt"],
     "nowhere.pt: no such file or folder in"),
    (["--preset", "toy", "--classes", "one pink circle"], "no class is named 'one pink circle'"),
    (["--preset", "toy", "--bonus-features", "x"], "must be 'pixels' or 'imagenet', not"),
    (["--preset", "toy", "--recipe", "diverse", "--bonus-features", "imagenet"],
     "needs the package efficientnet_lite_pytorch: pip install -r requirements-rewards.txt"),
    (["--preset", "B-256", "--from-scratch", "--reward", "jpeg"], "--from-scratch is for the toy"),
    (["--resume", "nowhere"], "nothing to resume: there is no nowhere"),
    (["--resume", ""], "--resume is empty"),
    (["--out", ""], "--out is empty"),
    (["--stepps", "3"], "unrecognized arguments: --stepps 3"),
    (["--step", "3"], "unrecognized arguments: --step 3"),
    (["--inner-epochs", "2"], "unrecognized arguments: --inner-epochs 2"),
    (["--kl", "exact"], "unrecognized arguments: --kl exact"),
])
def test_bad_options_end_with_one_line_and_leave_nothing(given, message, tmp_path, monkeypatch,
                                                         capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sys.modules, "efficientnet_lite_pytorch", None)      # as if not installed
    with pytest.raises(SystemExit) as stop:
        train_c2i.main(given)
    assert stop.value.code == 2 and message in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("command", [train_t2i.T2iSettings, SampleSettings, EvaluateSettings])
def test_a_file_or_folder_that_is_given_has_a_name(command):
    """An empty one is a variable of the shell's that is not set, and no default."""
    names = {field.name for field in fields(command)} & {
        "out", "resume", "gpt_ckpt", "vq_ckpt", "prompts", "t5", "npz", "reference"}
    assert len(names) >= 6
    for name in names:
        option = "--" + name.replace("_", "-")
        with pytest.raises(ValueError, match=f"{option} is empty"):
            options.read_options(command, [option, ""], "command", "")


@pytest.mark.parametrize("bad, message", [
    (dict(group_size=1), "group_size must be a finite number of at least 2"),
    (dict(steps=0), "steps must be a finite number of at least 1, not 0"),
    (dict(update_epochs=0), "update_epochs must be a finite number of at least 1, not 0"),
    (dict(micro_batch=0), "micro_batch must be a finite number of at least 1, not 0"),
    (dict(rollout_prompts=-1), "rollout_prompts must be a finite number of at least 0, not -1"),
    (dict(lr=math.nan), "lr must be a finite number"),
    (dict(kl_beta=-1.0), "kl_beta must be a finite number of at least 0, not -1"),
    (dict(diversity_bonus=-1.0), "diversity_bonus must be a finite number of at least 0, not -1"),
    (dict(rehearsal=math.inf), "rehearsal must be a finite number of at least 0, not inf"),
    (dict(temperature=0.0), "temperature must be a finite number of at least 0.001"),
    (dict(logprob_cfg="both"), "logprob_cfg must be"),
    (dict(save_every=0), "save_every must be a finite number of at least 1, not 0"),
    (dict(eval_images=3), "eval_images must be a finite number of at least 4, not 3"),
])
def test_settings_are_checked(bad, message):
    with pytest.raises(ValueError, match=message):
        train_c2i.C2iSettings(**bad)


def test_recipes_are_presets_of_settings(tmp_path):
    def settings(*given):
        return options.parse_settings(train_c2i.C2iSettings,
                                      ["--out", str(tmp_path), *given], "")
    paper = settings()
    diverse, quick = (settings("--recipe", name) for name in ("diverse", "quick"))
    mine = settings("--recipe", "diverse", "--diversity-bonus", "0.1")
    names = ("kl_beta", "rehearsal", "diversity_bonus", "prompts_per_step", "steps", "group_size")
    assert [getattr(paper, name) for name in names] == [0.01, 0.0, 0.0, 16, 75, 8]
    assert [getattr(diverse, name) for name in names] == [0.0, 0.15, 5.0, 16, 225, 16], (
        "the recipe is laid over the preset, which has other steps and a smaller group")
    assert [getattr(quick, name) for name in names] == [0.0, 0.15, 2.5, 16, 78, 16], (
        "19,968 images of the policy, where the diverse recipe draws 57,600")
    assert quick.rehearsal_steps == diverse.rehearsal_steps > 0
    assert mine.diversity_bonus == 0.1 and mine.rehearsal == 0.15
    with pytest.raises(ValueError, match="unknown recipe 'wild': there are paper, quick, div"):
        settings("--recipe", "wild")


def test_what_the_command_line_changed_is_remembered(tmp_path):
    """What it repeats of the preset or the recipe is no change."""
    settings = options.parse_settings(
        train_c2i.C2iSettings,
        ["--out", str(tmp_path), "--recipe", "diverse", "--kl-beta", "0", "--seed", "3"], "")
    assert settings.given == {"out": str(tmp_path), "recipe": "diverse", "seed": 3}


def test_a_diverse_run_of_the_toy(tmp_path, no_pictures, capsys):
    summary = train_c2i.main(QUICK + ["--recipe", "diverse", "--classes", "0,5,13,21",
                                      "--steps", "2", "--rollout-prompts", "32", "--lr", "1e-4",
                                      "--rehearsal-groups", "8", "--rehearsal-steps", "2",
                                      "--eval-images", "200", "--out", str(tmp_path / "run")])
    kept, *parts = (summary["after"][f"diversity_kept{part}"] for part in KEPT)
    assert kept == pytest.approx(sum(parts) / 4) and all(part > 0.5 for part in parts)
    metrics = read_metrics(tmp_path / "run")
    assert all(m["rehearsal"] > 0 for m in metrics)
    assert [m["step"] for m in metrics if "diversity_kept" in m] == [0]
    said = f"{len(metrics)} steps, {len(metrics) * 2 * 4} images in all"
    assert said in capsys.readouterr().out, "what it takes is said before it starts"


@pytest.mark.slow
def test_a_run_with_all_memory_savers_and_the_compiler(tmp_path):
    """It draws the same, up to rounding, and ends with files as any other."""
    plain, saving = tmp_path / "plain", tmp_path / "saving"
    train_c2i.main(QUICK + ["--steps", "1", "--out", str(plain)])
    train_c2i.main(QUICK + ["--steps", "1", "--checkpointing", "--compile", "--rollout-prompts",
                            "1", "--micro-batch", "3", "--out", str(saving)])
    assert {path.name for path in saving.iterdir()} == {path.name for path in plain.iterdir()}
    assert read_metrics(saving)[0]["mismatch"] < 1e-4


T2I_KINDS = {"verified", *(f"verified/{k}" for k in ("seen", "unseen", "counting", "position"))}


def test_a_t2i_run_reports_every_kind_of_caption_at_every_guidance(tmp_path, quick):
    summary = train_t2i.main(QUICK + ["--steps", "1", "--eval-images",
                                      "48", "--eval-cfg-scales", "1,7.5",
                                      "--out", str(tmp_path / "run")])
    for scores in (summary["before"], summary["after"]):
        assert T2I_KINDS <= set(scores)
        assert set(scores["guidance"]) == {"7.5"}                        # 1 is the rollout's own
        assert T2I_KINDS <= set(scores["guidance"]["7.5"])
        # Every caption is seen or unseen, and counts or places.
        for a, b in (("seen", "unseen"), ("counting", "position")):
            low, high = sorted((scores[f"verified/{a}"], scores[f"verified/{b}"]))
            assert low <= scores["verified"] <= high
    assert summary == json.loads((tmp_path / "run" / "summary.json").read_text())
    assert len(read_metrics(tmp_path / "run")) == 1


def test_t2i_trains_on_no_composition_that_pretraining_never_saw():
    texts, eval_texts = train_t2i.choose_captions(train_t2i.T2iSettings(preset="toy"))
    assert not set(texts) & toy.UNSEEN and toy.UNSEEN <= set(eval_texts)
    assert sum(text in toy.CLASSES for text in texts) == len(texts) / 2


def test_t2i_on_captions_from_a_file(tmp_path, quick):
    mine, other = tmp_path / "mine.jsonl", tmp_path / "other.txt"
    mine.write_text('{"prompt": "Two red circles"}\n'
                    '{"prompt": "a red circle above  a blue square"}\n')
    train_t2i.main(QUICK + ["--steps", "1", "--prompts", str(mine), "--out", str(tmp_path / "run")])
    other.write_text("a photo of an otter\n")
    with pytest.raises(SystemExit):
        train_t2i.main(QUICK + ["--prompts", str(other), "--out", str(tmp_path / "other")])
    assert not (tmp_path / "other").exists()


def test_composed_captions_are_held_out_for_evaluation():
    settings = train_t2i.T2iSettings(preset="t2i-XL-256", composed=100)
    texts, eval_texts = train_t2i.choose_captions(settings)
    assert len(texts) == 100 and len(eval_texts) == 64 and not set(texts) & set(eval_texts)


@pytest.mark.parametrize("given, message", [
    (["--preset", "B-256"], "unknown preset 'B-256': there are toy, t2i-XL-256, t2i-XL-512"),
    (["--preset", "toy", "--prompts", "nowhere.txt"], "no such file of captions: nowhere.txt"),
    (["--preset", "t2i-XL-256", "--reward", "jpeg", "--gpt-ckpt", "nowhere.pt"],
     "nowhere.pt: no such file or folder"),
])
def test_bad_t2i_options_end_with_one_line(given, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as stop:
        train_t2i.main(given)
    assert stop.value.code == 2 and message in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_help_explains_every_option(capsys):
    with pytest.raises(SystemExit) as stop:
        train_c2i.main(["--help"])
    text = " ".join(capsys.readouterr().out.split())
    assert stop.value.code == 0
    comments = options.field_comments(train_c2i.C2iSettings)
    assert set(comments) == {field.name for field in fields(train_c2i.C2iSettings)}
    for name, comment in comments.items():
        assert "--" + name.replace("_", "-") in text
        assert " ".join(comment.split()[:3]) in text
    assert "a file, a folder, or a Hugging Face repo or repo:file" in text   # this is two lines


@pytest.mark.slow
def test_what_is_not_needed_is_not_loaded(tmp_path):
    """A run of the toy needs matplotlib, for its pictures, and no other of the large packages.

    What the import alone loads is in tests/rewards/test_reward.py."""
    given = QUICK + ["--steps", "1", "--out", str(tmp_path / "run")]
    program = (f"import sys, train_c2i\ntrain_c2i.main({given!r})\n"
               f"print('loaded:', *[name for name in {HEAVY!r} if name in sys.modules])")
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1].split() == ["loaded:", "matplotlib"]


@pytest.mark.slow
def test_the_default_run_reaches_what_the_readme_says(tmp_path):
    summary = train_c2i.main(["--preset", "toy", "--out", str(tmp_path)])
    before, after = summary["before"], summary["after"]
    assert before["verified"] <= 0.65 and after["verified"] >= 0.88
    assert 0 < after["diversity"] < before["diversity"] and 0 < after["entropy"] < before["entropy"]


def test_a_resumed_run_still_knows_what_its_command_line_had_changed(finished):
    """The page shows it: what was given at first, and what --resume was given."""
    found = options.resumed(train_c2i.C2iSettings, {"resume": str(finished[0]), "steps": 6})
    assert found.given["group_size"] == 4 and found.given["reward"] == "shapes,jpeg:0.01", (
        "the changes of the first command are kept")
    assert found.given["steps"] == found.steps == 6, "and those of this one are added"
