"""What a run shows of itself: progress, the page and what it is made from, watching, logging."""

import dataclasses
import io
import json
import math
import re
import shutil
import subprocess
import sys
import time
import warnings
from importlib.util import find_spec
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest
import torch
from conftest import Blocks, read_metrics, tiny_model, trained_weights
from PIL import Image

import argrpo
import harness.page
import harness.run
import harness.selftest
import report
import toy
import train_c2i
from harness import gallery, options
from harness.before_after import Watched, evaluate
from harness.device import CheckpointedBlock
from harness.gallery import SHARE, Progress
from harness.options import RunSettings
from harness.page import (
    RunData,
    all_results,
    charts,
    choices,
    common_prompts,
    curves,
    highest,
    page,
    read_run,
    rewards_of,
    sheet_of_pairs,
    shown_scores,
    smooth,
    sprite,
)
from reward import RewardSet, to_uint8

ROOT = Path(__file__).parents[2]
QUICK = ["--preset", "toy", "--steps", "6", "--prompts-per-step", "2", "--group-size", "4",
         "--rollout-prompts", "12", "--eval-images", "24"]


@pytest.fixture(scope="module", autouse=True)
def drawn_once():
    """The same curves are drawn once for all tests: pages of copies of a run have the same."""
    drawn, plot = {}, harness.page.plot

    def remembered(*what, **how):
        key = repr((what, how))
        if key not in drawn:
            drawn[key] = plot(*what, **how)
        return drawn[key]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("harness.page.plot", remembered)
        yield


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A run that is over, and watched a reward; tests only look at it."""
    out = tmp_path_factory.mktemp("runs") / "finished"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("harness.gallery.SHARE", 100)              # so that no picture is left out
        patch.setattr("harness.gallery.SECONDS", 0)              # of the closer look, one place
        log = ["--log", "tensorboard"] if find_spec("tensorboard") else []
        train_c2i.main(QUICK + ["--out", str(out), "--watch", "brightness", "--lr", "0.001",
                                "--progress-every", "3", *log])
    return out


@pytest.fixture
def killed(finished, tmp_path):
    """The same, as if it had been killed while it wrote a line of its log."""
    out = Path(shutil.copytree(finished, tmp_path / "killed"))
    for name in ("summary.json", "report.html", "progress.gif", "model.pt"):
        (out / name).unlink()
    log = out / "metrics.jsonl"
    log.write_text(log.read_text()[:-40])
    with np.load(out / "report.npz") as file:
        arrays = dict(file)
    begun = {name: arrays[name] for name in ("texts", "names", "before", "scores_before")}
    gallery.write_arrays(out / "report.npz", begun)
    return out


# --- progress ----------------------------------------------------------------------------------

def test_what_is_shown_and_watched_changes_no_bit_of_the_training(finished, tmp_path,
                                                                  no_pictures):
    plain = tmp_path / "plain"
    train_c2i.main(QUICK + ["--out", str(plain), "--lr", "0.001", "--progress-every", "0"])
    a, b = trained_weights(finished), trained_weights(plain)
    assert all(torch.equal(a[name], b[name]) for name in a)
    watched = read_metrics(finished)
    for m in watched:
        m.pop("watch/brightness", None)
    assert watched == read_metrics(plain)
    assert not (plain / "progress").exists() and not (plain / "progress.gif").exists()


def test_the_animation_shows_every_moment_once(finished):
    frames = sorted((finished / "progress").iterdir())
    assert [frame.name for frame in frames] == ["000000.png", "000003.png", "000006.png"]
    animation = Image.open(finished / "progress.gif")
    assert animation.n_frames == len(frames)
    assert animation.size == Image.open(frames[0]).size
    animation.seek(animation.n_frames - 1)
    assert animation.info["duration"] == 3000                    # it stands still at its end


def test_the_time_of_all_pictures_of_progress_counts(tmp_path, monkeypatch):
    """By a clock that is 1, 2, 3, .. seconds later whenever it is asked."""
    model, vq = toy.load("c2i")
    settings = RunSettings(prompts_per_step=1, group_size=4, rollout_prompts=1)
    progress = Progress(vq, argrpo.Prompts(["one red circle"], torch.tensor([0])), None, settings,
                        toy.verify_all, tmp_path, started=0.0)
    clock = iter([0.0, 1.0, 1.0, 3.0])
    monkeypatch.setattr("harness.gallery.time.perf_counter", lambda: next(clock))
    for done in (0, 10):
        progress.draw(model, done)
    assert (progress.spent, progress.last) == (1.0 + 2.0, 2.0)


def test_progress_takes_a_twentieth_of_the_time_at_most(monkeypatch):
    """A picture is left out if it would take the pictures over their share."""
    now = [100.0]
    monkeypatch.setattr("harness.gallery.time.perf_counter", lambda: now[0])
    settings = RunSettings(progress_every=10, steps=25)
    progress = Progress(None, argrpo.Prompts(["a"], torch.tensor([0])), None, settings, None,
                        None, started=100.0)
    assert progress.is_due(0)
    progress.spent = progress.last = 2.0                         # of the first picture
    now[0] = 100 + 3.9 / SHARE
    assert not progress.is_due(10)
    now[0] = 100 + 4.1 / SHARE
    assert progress.is_due(10) and not progress.is_due(11)
    assert progress.is_due(25), "the last step's picture is due, whatever its number"
    assert not Progress(None, progress.prompts, None, RunSettings(progress_every=0), None, None,
                        0.0).is_due(0)


# --- what a run leaves for its page ------------------------------------------------------------

@pytest.fixture(scope="module")
def closely(request):
    """Arrays of a closer look at a changed policy, with what they were made from."""
    torch.manual_seed(1)
    settings = train_c2i.C2iSettings(preset="toy", eval_images=8, cfg_scale=2.0, temperature=0.9)
    prompts = argrpo.Prompts(toy.CLASSES, torch.arange(27))
    (model, vq), (reference, _) = toy.load("c2i"), toy.load("c2i")
    with torch.no_grad():
        for p in model.parameters():
            p += 0.01 * torch.randn_like(p)

    def reward_fn(images, texts):
        right = toy.verify(images, texts)
        return right, {"shapes": right}

    patch = pytest.MonkeyPatch()
    patch.setattr(gallery, "SECONDS", 1000)                      # whatever else the machine does
    request.addfinalizer(patch.undo)
    _, before = evaluate(reference, vq, prompts, reward_fn, settings)
    _, after = evaluate(model, vq, prompts, reward_fn, settings)
    arrays = gallery.mind_arrays(reference, model, vq, prompts, before, after, settings)
    return arrays, model, reference, vq, settings


def test_the_closer_look_asks_the_policies_that_draw(closely):
    """Entropy and log-probability are those of token_logp, with guidance and temperature."""
    arrays, model, reference, _, settings = closely
    tokens = torch.from_numpy(arrays["mind_tokens"])
    labels = torch.tensor([toy.CLASSES.index(text) for text in arrays["mind_texts"].tolist()])
    for k, policy in enumerate((reference, model)):
        with torch.no_grad():
            logp, entropy = argrpo.token_logp(policy, tokens, labels, cfg_scale=settings.cfg_scale,
                                              temperature=settings.temperature)
        torch.testing.assert_close(torch.from_numpy(arrays["mind_logp"][k]), logp, rtol=1e-3,
                                   atol=1e-4)
        torch.testing.assert_close(torch.from_numpy(arrays["mind_entropy"][k]), entropy, rtol=1e-3,
                                   atol=1e-4)
    prompts = argrpo.Prompts(toy.CLASSES, torch.arange(27))
    with torch.no_grad():
        before, after = (gallery.code_logp(policy, prompts, labels, tokens, settings)
                         for policy in (reference, model))
    kl = (after.exp() * (after - before)).sum(-1)
    assert kl.max() > 0.01, "the policies differ"
    torch.testing.assert_close(torch.from_numpy(arrays["mind_kl"]), kl, rtol=1e-3, atol=1e-4,
                               msg="KL(after || before): what the new policy draws counts")


def test_the_five_likeliest_codes_are_in_order_and_hold_most(closely):
    chances = np.exp(closely[0]["mind_top_logp"])                                # (2, Q, N, 5)
    assert (np.diff(chances, axis=-1) <= 0).all()
    assert (chances.sum(-1) < 1 + 1e-4).all() and chances.sum(-1).mean() > 0.9


def test_a_code_is_painted_in_its_place_in_the_picture(closely):
    """Where the code is the one that stands there, its patch is cut from the picture itself; where
    it is another, from the picture with that code exchanged."""
    arrays, _, _, vq, _ = closely
    tokens, top = arrays["mind_tokens"], arrays["mind_top"]
    patches, number = arrays["mind_patches"], arrays["mind_patch_of"]
    assert (number >= 0).all()
    q, place = 1, 14                                             # row 2, column 2 of six
    picture = arrays["mind_pictures"][q]
    here = picture[4:16, 4:16]                                   # patches of 4 pixels, and a margin
    seen = set()
    for when in (0, 1):
        for k in range(5):
            code = top[when, q, place, k]
            exchanged = torch.from_numpy(tokens[q]).clone()
            exchanged[place] = code
            whole = to_uint8(argrpo.to_images(vq, exchanged[None]))[0].numpy()
            patch = patches[number[when, q, place, k]].astype(int)
            assert np.abs(patch - whole[4:16, 4:16]).max() <= 1
            seen.add(bool(code == tokens[q, place]))
            if code == tokens[q, place]:
                assert np.abs(patch - here).max() <= 1
    assert seen == {True, False}


def test_the_best_of_each_prompt_comes_first():
    """Of equal ones the picture that changed more; one without a reward last."""
    before, after = np.zeros((3, 2, 4, 4, 3), np.uint8), np.zeros((3, 2, 4, 4, 3), np.uint8)
    after[2, 1] = 9
    arrays = dict(before=before, after=after,
                  scores_before=np.float32([[[0.1, np.nan], [np.nan, 0.5], [0, 0]]]),
                  scores_after=np.float32([[[0.3, 9], [9, 0.9], [np.inf, np.inf]]]))
    old, new = rewards_of(arrays)
    assert highest(new - old, arrays, 3) == [(2, 1), (1, 1), (0, 0)]
    assert highest(-new, arrays, 2) == [(0, 0), (1, 1)]


def test_what_fell_far_has_changed_most():
    """Three prompts whose rewards fall by 0.8, rise by 0.3, and stay."""
    pictures = np.zeros((3, 1, 4, 4, 3), np.uint8)
    old, new = np.float32([[[0.9], [0.5], [0.4]], [[0.1], [0.8], [0.4]]])
    arrays = dict(before=pictures, after=pictures, scores_before=old[None], scores_after=new[None])
    shown = choices(arrays)
    assert shown["Most changed"] == [(0, 0), (1, 0), (2, 0)], "by the size of the change"
    assert shown["Best"][0] == (1, 0) and shown["Worst"][0] == (0, 0), "by the reward after"


def test_below_each_picture_stands_its_own_reward(monkeypatch):
    drawn = []

    def sheet(blocks, *given):
        drawn.extend(blocks)
        return Image.new("RGB", (1, 1))
    monkeypatch.setattr("harness.page.sheet", sheet)
    pictures = np.zeros((1, 2, 4, 4, 3), np.uint8)
    arrays = dict(texts=np.array(["a"]), before=pictures, after=pictures + 1,
                  scores_before=np.float32([[[0.1, 0.2]]]), scores_after=np.float32([[[0.3, 0.4]]]))
    sheet_of_pairs(RunData("run", Path("run"), {}, {}, [], {}, arrays))
    assert [(int(some.max()), notes) for _, some, notes in drawn] == [
        (0, ["0.10", "0.20"]), (1, ["0.30", "0.40"])]


def test_only_a_score_that_repeats_another_before_and_after_is_left_out():
    old, same_after = np.float32([[[0.1]], [[0.1]], [[0.2]]]), np.float32([[[0.5]]] * 3)
    arrays = dict(names=np.array(["reward", "reward/shapes", "other"]), scores_before=old,
                  scores_after=same_after)
    assert shown_scores(arrays) == [(0, "reward"), (2, "other")]


def test_a_curve_is_smoothed_to_either_side():
    """A jump in the middle of 41 points: two to either side are averaged."""
    values = [value for _, value in smooth([(i, float(i >= 20)) for i in range(41)])]
    assert values[17:23] == pytest.approx([0, 0.2, 0.4, 0.6, 0.8, 1]), "no curve lags behind"


def test_patches_that_took_too_long_are_marked(closely, monkeypatch):
    arrays, _, _, vq, _ = closely
    monkeypatch.setattr(gallery, "SECONDS", -1)
    top, kl = torch.from_numpy(arrays["mind_top"]), torch.from_numpy(arrays["mind_kl"])
    tokens = torch.from_numpy(arrays["mind_tokens"])
    patches, number = gallery.painted_patches(vq, tokens, top, kl)
    place = kl.mean(dim=0).argmax()                              # only the first, most changed one
    assert (number[:, :, place] >= 0).all() and number.max() == len(patches) - 1
    assert sum((number[:, :, other] == -1).all().item() for other in range(36)) == 35


def test_a_sprite_holds_every_patch():
    patches = np.arange(7)[:, None, None, None] + np.zeros((1, 900, 900, 3), np.uint8)
    sheet, columns = sprite(patches.astype(np.uint8))
    assert columns == 2 and sheet.shape == (4 * 900, 2 * 900, 3)
    for k in range(7):
        row, column = divmod(k, columns)
        assert (sheet[row * 900:(row + 1) * 900, column * 900:(column + 1) * 900] == k).all()


# --- the page ----------------------------------------------------------------------------------

def test_the_page_of_a_run_says_everything_and_needs_nothing(finished):
    text = (finished / "report.html").read_text()
    for section in ("run", "doctor", "pictures", "curves", "minds"):
        assert f'<section id="{section}">' in text
    loads = r"""(src|href)=["']?(?!["']|data:|#|\{)"""
    assert not re.search(loads, text), "the page loads something"
    assert "http:" not in text and "https:" not in text
    assert "finished" in text and "<td>lr</td><td>0.001</td>" in text
    assert "watch/brightness" in text and "shapes" in text       # below the pictures
    for title in ("Best", "Worst", "Most changed", "All prompts"):
        assert title in text
    assert "Too few steps to say anything" in text               # the doctor, after 6 steps


@pytest.mark.slow
def test_report_loads_no_model_and_no_reward(finished, tmp_path):
    """Not even torch."""
    program = ("import sys, report; report.main(sys.argv[1:]); "
               "print({'torch', 'argrpo', 'toy', 'reward', 'vqgan'} & set(sys.modules))")
    done = subprocess.run([sys.executable, "-c", program, str(finished), "--out",
                           str(tmp_path / "page.html")], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "set()"
    assert (tmp_path / "page.html").read_text() == (finished / "report.html").read_text()


PICTURES = ["report.html", "curves.png", "before_after.png", "progress.gif"]


def test_report_makes_again_all_that_the_end_of_a_run_draws(finished, tmp_path, capsys):
    """Equal to the byte."""
    out = Path(shutil.copytree(finished, tmp_path / finished.name))
    for name in PICTURES:
        (out / name).unlink()
    report.main([str(out)])
    assert capsys.readouterr().out.splitlines() == [f"wrote {out / name}" for name in PICTURES]
    for name in PICTURES:
        assert (out / name).read_bytes() == (finished / name).read_bytes(), name


def test_a_damaged_file_is_named(killed, capsys):
    for name in ("report.npz", "summary.json", "config.json"):
        (killed / name).write_bytes(bytes(100))                  # as after a power cut
        with pytest.raises(SystemExit) as stop:
            report.main([str(killed)])
        assert stop.value.code == 2 and f"{name} is damaged" in capsys.readouterr().err


def test_a_log_that_ends_in_zeros_is_read_up_to_them(killed):
    with open(killed / "metrics.jsonl", "ab") as log:
        log.write(b"\n" + bytes(50))
    assert len(read_run(killed).metrics) == 5


@pytest.mark.slow
def test_the_page_of_a_run_that_was_killed(killed):
    report.main([str(killed)])
    text = (killed / "report.html").read_text()
    assert "5 of 6 steps" in text and "not finished" in text
    assert "no pictures after training yet" in text and "data:image/png" in text
    assert "measured at the end of a run" in text and "data:image/svg+xml" in text


def test_the_page_of_a_run_that_has_only_begun(killed):
    for path in killed.iterdir():
        if path.name != "config.json":
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    report.main([str(killed)])
    text = (killed / "report.html").read_text()
    assert "0 of 6 steps" in text and "No step is done yet" in text
    assert {path.name for path in killed.iterdir()} == {"config.json", "report.html"}


def test_what_was_given_stands_on_the_page_but_no_more(finished):
    run = read_run(finished)
    assert set(run.config["given"]) >= {"lr", "watch", "steps"}
    assert "kl_beta" not in run.config["given"]


def test_two_runs_are_compared(finished, killed, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    other = Path(shutil.copytree(finished, tmp_path / "other"))
    config = json.loads((other / "config.json").read_text())
    config["settings"]["kl_beta"] = 0.75
    (other / "config.json").write_text(json.dumps(config))
    report.main([str(finished), str(other), str(killed)])
    text = (tmp_path / "comparison.html").read_text()
    table = text[text.index('id="differing"'):].split("</table>")[0]
    assert "<td>kl_beta</td><td>0.01</td><td>0.75</td><td>0.01</td>" in table
    assert table.count("<tr>") == 2, "settings that are the same in all runs are left out"
    compared = text[text.index('id="compared"'):].split("</table>")[0]
    assert "diversity_kept/sizes" in compared and "–" in compared    # the killed run has none
    assert "<figcaption>before" in text or "before</figure>" in text


def compared_run(texts, **summary):
    return RunData("run", Path("run"), {}, {}, [], summary, {"texts": np.array(texts)})


def test_before_training_is_that_of_the_first_run_that_measured_it():
    runs = [compared_run([], before={"reward": 0.1}, after={"reward": 0.2}),
            compared_run([], before={"reward": 0.1, "watched": 0.3}, after={"watched": 0.4})]
    assert all_results(runs) == [("reward", [0.1, 0.2, None]), ("watched", [0.3, None, 0.4])]


def test_a_prompts_pictures_are_found_in_each_runs_own_row():
    runs = compared_run(["a", "b", "c"]), compared_run(["c", "x", "a"])
    assert common_prompts(runs) == [("a", [0, 2]), ("c", [2, 0])]


def test_runs_of_the_same_name_are_told_apart(finished, tmp_path):
    other = Path(shutil.copytree(finished, tmp_path / finished.name))
    runs = [read_run(out)._replace(metrics=[]) for out in (finished, other)]         # no curves
    text = page(*runs).decode()
    assert f"<th>{finished}</th>" in text and f"<th>{other}</th>" in text


def test_a_folder_without_a_run_is_an_error(tmp_path, capsys):
    with pytest.raises(SystemExit) as stop:
        report.main([str(tmp_path / "nowhere")])
    assert stop.value.code == 2 and "nowhere holds no run" in capsys.readouterr().err
    (tmp_path / "config.json").write_text('{"architectures": ["LlamaForCausalLM"]}')
    with pytest.raises(SystemExit) as stop:
        report.main([str(tmp_path)])
    assert stop.value.code == 2 and "holds no run" in capsys.readouterr().err


def test_the_page_of_a_command_takes_no_other_files_place(finished, capsys):
    weights = (finished / "model.pt").read_bytes()
    with pytest.raises(SystemExit) as stop:
        report.main([str(finished), "--out", str(finished / "model.pt")])
    assert stop.value.code == 2 and "name must end with .html" in capsys.readouterr().err
    assert (finished / "model.pt").read_bytes() == weights


# Mathematics, markup, line ends, what terminals obey, half a character, what fonts lack.
TEXTS = ['a menu with "$5" and "$9"', r"$\frac{$ \n ^_{}", "<script>alert(1)</script>",
         "'><img src=x onerror=alert(1)>", "{{ 7 * 7 }} {% if %}", "two\nlines\r\u2028\x85\t",
         "\x1b[31m\x07\x00", "half \udcff", "_hidden", "\u4e2d\u6587 \U0001f600", " ", ""]


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:Glyph", "ignore:constrained_layout")
def test_texts_are_data(finished, tmp_path, capsys):
    """As prompts, names of rewards and of runs, and settings: drawn, neither obeyed nor fatal."""
    out = Path(shutil.copytree(finished, tmp_path / "run"))
    config = json.loads((out / "config.json").read_text())
    config["given"] |= {f"setting {i}": text for i, text in enumerate(TEXTS)}
    config["settings"]["reward"] = config["device"] = "".join(TEXTS)
    (out / "config.json").write_text(json.dumps(config))
    with np.load(out / "report.npz") as file:
        arrays = dict(file)
    for name in ("texts", "mind_texts"):
        count = len(arrays[name])
        arrays[name] = np.array(["".join(TEXTS[i::count]) for i in range(count)])
    parts = {f"reward/{text}": 0.5 for text in TEXTS}
    arrays["names"] = np.array([*parts, *arrays["names"].tolist()])
    for name in ("scores_before", "scores_after"):
        arrays[name] = np.concatenate([arrays[name][:1]] * len(parts) + [arrays[name]])
    gallery.write_arrays(out / "report.npz", arrays)
    log = read_metrics(out)
    steps = [m | parts | {"step": i, f"watch/{''.join(TEXTS)}": 1 - i / 20, "reward": i / 20}
             for i, m in enumerate(log * 3)]
    (out / "metrics.jsonl").write_text("".join(json.dumps(m) + "\n" for m in steps))
    (out / "curves.png").unlink()
    report.main([str(out)])
    report.main(["--doctor", str(out)])
    said = capsys.readouterr().out
    assert "reward hacking" in said and all(c.isprintable() or c == "\n" for c in said)
    for name in PICTURES[1:]:
        Image.open(out / name).load()
    html = (out / "report.html").read_text(encoding="utf-8")
    assert "<script>alert" not in html and "<img src=x" not in html and " 49 " not in html
    runs = [read_run(out)._replace(name=text) for text in TEXTS]
    for _, svg in charts("reward", runs):
        ElementTree.fromstring(svg)


def test_a_name_with_an_underscore_stands_in_the_legend():
    run = run_of([{"step": i, "reward": i} for i in range(3)])
    (_, svg), = charts("reward", [run._replace(name="_mine"), run._replace(name="a & $b$_2")])
    assert b"> _mine<" in svg and b"> a &amp; $b$_2<" in svg


@pytest.mark.parametrize("encoding", ["ascii", "cp1252"])
def test_a_terminal_that_knows_few_characters(encoding, killed, monkeypatch):
    """A question mark in their place."""
    out = killed.rename(killed.with_name("\u4e2d\u6587 \u00e9"))
    content = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(content, encoding=encoding))
    report.main(["--doctor", str(out)])
    sys.stdout.flush()
    assert b"?? " in content.getvalue()


@pytest.mark.slow
def test_a_number_that_is_missing_or_infinite_anywhere(finished, tmp_path):
    """In every metric of a step, in the evaluations, in the scores and in the closer look."""
    strange, out = (None, math.nan, math.inf, -math.inf), tmp_path / "run"
    shutil.copytree(finished, out)
    log = [m | {"step": i} for i, m in enumerate(read_metrics(out) * 4)]
    for i, value in enumerate(strange):
        log[5 * i] = {"step": 5 * i} | {name: value for name in log[0] if name != "step"}
    (out / "metrics.jsonl").write_text("".join(json.dumps(m) + "\n" for m in log))
    summary = json.loads((out / "summary.json").read_text())
    names = ("reward", "diversity_kept", "entropy", "verified")
    summary["after"] |= dict(zip(names, strange))
    summary["before"] |= dict(zip(names, strange[::-1]))
    (out / "summary.json").write_text(json.dumps(summary))
    with np.load(out / "report.npz") as file:
        arrays = dict(file)
    for name in ("scores_before", "scores_after", "mind_kl", "mind_logp"):
        for i, value in enumerate(strange[1:]):
            arrays[name].flat[i::7] = value
    gallery.write_arrays(out / "report.npz", arrays)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        report.main([str(out)])
        report.main(["--doctor", str(out)])
    assert "<tr><td>reward</td><td>-inf</td><td>\u2013</td></tr>" in (
        out / "report.html").read_text(encoding="utf-8")
    for name in PICTURES[1:]:
        Image.open(out / name).load()
    (_, svg), = charts("reward", [read_run(out)])
    assert lines_in(svg, points=20) == 2, "these four steps are left out"


def run_of(metrics, name="one"):
    return RunData(name, None, {}, {}, metrics, {}, {})


def test_curves_show_what_is_there():
    run = run_of([{"step": i, "reward": i / 10, "kl": None, "reward/a": 1.0, "reward/b": 2.0,
                   "ratio_max": 1.0, "watch/x": 0.5 if i % 5 == 0 else None} for i in range(20)])
    patterns = ("reward", "reward/*", "kl", "ratio_max", "watch/*", "lr")
    names = [name for pattern in patterns for name, _ in charts(pattern, [run])]
    assert names == ["reward", "reward/a", "reward/b", "watch/x"]
    (_, svg), = charts("reward", [run])
    assert lines_in(svg) == 2
    (_, svg), = charts("reward", [run, run._replace(name="two")])
    assert lines_in(svg) == 4 and b"> two<" in svg


def test_curves_of_a_step_alone_or_of_no_known_number():
    for metrics in ([{"step": 0, "reward": 0.5}], [{"step": 0, "reward": math.nan}]):
        assert curves(run_of(metrics)).startswith(b"\x89PNG")


def lines_in(svg, points=20):
    """How many curves of so many points the chart has."""
    assert ElementTree.fromstring(svg).tag.endswith("svg")
    paths = re.findall(r' d="([^"]*)"', svg.decode())
    return sum(path.count("L") == points - 1 for path in paths)


def test_a_chart_is_equal_to_the_byte_when_it_is_drawn_again():
    run = run_of([{"step": i, "reward": 0.5} for i in range(3)])         # and a constant one
    assert charts("reward", [run]) == charts("reward", [run])
    (_, svg), = charts("reward", [run_of(run.metrics[:1])])
    assert b"date" not in svg


# --- watching and logging ----------------------------------------------------------------------

def test_a_watched_reward_is_logged_every_fifth_step_and_in_the_evaluations(finished):
    metrics = read_metrics(finished)
    for name in ("watch/brightness", "verified"):
        assert [m["step"] for m in metrics if name in m] == [0, 5]
    summary = json.loads((finished / "summary.json").read_text())
    assert 0 < summary["before"]["watch/brightness"] < 1
    assert summary["seconds"]["progress"] > 0


def test_an_unknown_reward_to_watch_is_refused(tmp_path, capsys):
    with pytest.raises(SystemExit) as stop:
        train_c2i.main(QUICK + ["--watch", "beauty", "--out", str(tmp_path / "run")])
    assert stop.value.code == 2 and "unknown reward 'beauty'" in capsys.readouterr().err


def test_a_flat_reward_is_reported_once_while_the_run_goes_on(tmp_path, capsys, no_pictures):
    prompts = argrpo.Prompts(["a", "b"], torch.arange(2))
    flat = RewardSet({"flat": (lambda images, texts: torch.full((len(texts),), 0.25), 1.0)})
    parts = tiny_model(block_size=4, n_layer=1), Blocks(), prompts, prompts, flat, Watched()
    settings = train_c2i.C2iSettings(out=str(tmp_path / "run"), steps=9, prompts_per_step=2,
                                     group_size=4, eval_images=8, progress_every=0)
    harness.run.run(settings, lambda settings, device: parts)
    said = capsys.readouterr()
    assert said.err.count("nothing is learned") == 1 and "step 5: for 5 steps" in said.err
    assert "doctor: constant reward: every image gets the same reward, 0.25" in said.out


def test_tensorboard_has_the_metrics_and_the_pictures(finished):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    events = EventAccumulator(str(finished))
    events.Reload()
    logged = [event.value for event in events.Scalars("reward")]
    assert logged == pytest.approx([m["reward"] for m in read_metrics(finished)])
    assert [event.step for event in events.Scalars("evaluation/verified")] == [0, 6]
    assert {"progress", "before_after"} <= set(events.Tags()["images"])
    picture = events.Images("before_after")[0]
    assert (picture.width, picture.height) == Image.open(finished / "before_after.png").size


def leveldb_records(content):
    """The records of one of wandb's files: LevelDB's log, in blocks of 32 KiB, after 7 bytes.

    A piece of a record has a checksum (4 bytes), its length (2) and its kind (1): whole, first,
    middle or last."""
    place, record = 7, b""
    while place + 7 <= len(content):
        if 32768 - place % 32768 < 7:                            # too little for a piece
            place += 32768 - place % 32768
            continue
        length, kind = int.from_bytes(content[place + 4:place + 6], "little"), content[place + 6]
        record += content[place + 7:place + 7 + length]
        place += 7 + length
        if kind in (1, 4):                                       # whole, or last
            yield record
            record = b""


@pytest.mark.slow
def test_wandb_offline_has_the_metrics_and_the_pictures(tmp_path, monkeypatch):
    wandb = pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    out = tmp_path / "run"
    train_c2i.main(QUICK + ["--steps", "2", "--out", str(out), "--log", "wandb",
                            "--progress-every", "1"])
    folder, = (out / "wandb").glob("offline-run-*")
    from wandb.proto import wandb_internal_pb2
    kinds, rewards = [], []
    for _ in range(600):                         # wandb's own process may still be writing
        content = next(folder.glob("*.wandb")).read_bytes()
        records = [wandb_internal_pb2.Record.FromString(r) for r in leveldb_records(content)]
        kinds = [record.WhichOneof("record_type") for record in records]
        if "exit" in kinds:
            break
        time.sleep(0.1)
    for record in records:
        for item in record.history.item:
            if (item.key or "/".join(item.nested_key)) == "reward":
                rewards.append(json.loads(item.value_json))
    assert "exit" in kinds, f"wandb's file ends with {kinds[-3:]}"
    assert rewards == pytest.approx([m["reward"] for m in read_metrics(out)])
    pictures = [path.name for path in (folder / "files" / "media" / "images").iterdir()]
    assert any("before_after" in name for name in pictures) and wandb.run is None


@pytest.mark.parametrize("given, message", [
    ("tensorbord", "log must be tensorboard, wandb, or both with a comma, not 'tensorbord'"),
    ("wandb", "--log wandb needs a package: pip install wandb"),
])
def test_a_logger_that_is_not_there_is_reported_at_once(given, message, tmp_path, monkeypatch,
                                                        capsys):
    monkeypatch.setattr(options, "find_spec", lambda name: None)
    with pytest.raises(SystemExit) as stop:
        train_c2i.main(QUICK + ["--log", given, "--out", str(tmp_path / "run")])
    assert stop.value.code == 2 and message in capsys.readouterr().err


# --- the self-test -----------------------------------------------------------------------------

def selftest(tmp_path, capsys, *given):
    """The exit status, and {what: its line}."""
    with pytest.raises(SystemExit) as stop:
        train_c2i.main(QUICK + ["--selftest", "--out", str(tmp_path / "run"), *given])
    lines = capsys.readouterr().out.splitlines()
    assert not list(tmp_path.glob("run*")), "it leaves nothing behind"
    return stop.value.code, {line[5:17].strip(): line for line in lines}


def test_the_selftest_of_a_healthy_choice(tmp_path, capsys):
    status, lines = selftest(tmp_path, capsys)
    assert status == 0 and all(line.startswith("ok") for line in lines.values())
    assert list(lines) == ["sampler", "accumulation", "reward", "step", "signal", "checkpoint"]


def test_the_selftest_writes_a_checkpoint_where_the_runs_will_be_and_reads_it(
        tmp_path, capsys, monkeypatch):
    """That disk may be full, or refuse to be written; and what comes back may be something else,
    as here, where nothing does."""
    places, honest = [], harness.selftest.save_checkpoint

    def note(path, *given):
        places.append(path.parents[1])
        honest(path, *given)
    monkeypatch.setattr(harness.selftest, "save_checkpoint", note)
    monkeypatch.setattr(harness.selftest, "load_checkpoint", lambda *given: None)
    status, lines = selftest(tmp_path, capsys)
    assert places == [tmp_path]
    assert status == 1 and lines["checkpoint"].startswith("BAD")


def test_the_selftest_takes_the_passes_that_training_will_make(tmp_path, capsys, monkeypatch):
    """None has more images, and the layers are computed again where the settings ask for it."""
    honest, passes = argrpo.policy_logp, set()

    def note(model, prompts, index, tokens, config):
        if torch.is_grad_enabled():
            passes.add((len(tokens), type(model.layers[0])))
        return honest(model, prompts, index, tokens, config)

    monkeypatch.setattr(argrpo, "policy_logp", note)
    status, lines = selftest(tmp_path, capsys, "--micro-batch", "3", "--checkpointing")
    assert status == 0 and passes == {(size, CheckpointedBlock) for size in (1, 2, 3)}
    assert "of passes of 3 images" in lines["accumulation"]


def test_the_selftest_finds_another_sampler(tmp_path, capsys, monkeypatch):
    honest = argrpo.generate
    monkeypatch.setattr(argrpo, "generate", lambda *a, temperature, **how: honest(
        *a, temperature=0.7, **how))
    status, lines = selftest(tmp_path, capsys)
    assert status == 1 and lines["sampler"].startswith("BAD")
    assert lines["accumulation"].startswith("ok")


def test_the_selftest_finds_a_layer_that_mixes_images(tmp_path, capsys, monkeypatch):
    """As a batch norm would."""
    honest = argrpo.RMSNorm.forward
    monkeypatch.setattr(argrpo.RMSNorm, "forward",
                        lambda self, x: honest(self, x - x.mean(dim=0, keepdim=True) / 2))
    _, lines = selftest(tmp_path, capsys)
    assert lines["accumulation"].startswith("BAD")


def test_the_selftest_finds_a_reward_without_signal_and_one_that_fails(tmp_path, capsys):
    rewards = tmp_path / "bad.py"
    rewards.write_text("def flat(images, prompts):\n    return 0 * images.mean(dim=(1, 2, 3))\n"
                       "def broken(images, prompts):\n    raise KeyError('colour')\n")
    status, lines = selftest(tmp_path, capsys, "--reward", f"{rewards}:flat")
    assert status == 1 and lines["signal"].startswith("BAD")
    status, lines = selftest(tmp_path, capsys, "--reward", "brightness:1e-7")
    assert status == 1 and "multiply the weight by 1e+0" in lines["reward scale"]
    with pytest.raises(SystemExit) as stop:
        train_c2i.main([*QUICK, "--selftest", "--out", str(tmp_path / "run"), "--reward",
                        f"{rewards}:broken"])
    assert stop.value.code == 1 and "KeyError: 'colour'" in capsys.readouterr().err


def test_settings_of_a_run_name_no_secret_field():
    """What the command line gave is remembered beside the options, and is none."""
    assert "given" not in {field.name for field in dataclasses.fields(RunSettings)}
