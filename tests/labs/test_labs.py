"""The labs: each runs as a script, and points where its text says, on a trial of seconds."""

import json
import os
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import argrpo
import toy

ROOT = Path(__file__).parents[2]
STORED = sorted(path.stem for path in (ROOT / "docs" / "labs").glob("*.json"))


def run_lab(name, out, *options):
    command = [sys.executable, str(ROOT / "labs" / f"{name}.py"), "--out", str(out), *options]
    done = subprocess.run(command, capture_output=True, text=True, cwd=out,
                          env=os.environ | {"TQDM_DISABLE": "1"})
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


def trial(name, out):
    """What a lab measures with --quick."""
    run_lab(name, out, "--quick")
    assert (out / f"{name}.png").stat().st_size > 20_000
    assert "--quick: a trial, no conclusions" in (out / f"{name}.md").read_text()
    return json.loads((out / f"{name}.json").read_text())["measured"]


@pytest.mark.slow
def test_guidance_the_official_update_turns_away_as_the_scale_grows(tmp_path):
    measured = trial("lab1_guidance", tmp_path)
    for found in measured["exact"]:
        cosine, bias = found["to the guided gradient"], found["bias"]
        assert cosine[0] == pytest.approx(1) and bias[0] < 1e-6, "without guidance they are equal"
        assert cosine == sorted(cosine, reverse=True) and cosine[-1] < 0.9
        assert bias == sorted(bias) and bias[-1] > 0.5


@pytest.mark.slow
def test_hacking_the_proxy_rises_and_the_truth_falls(tmp_path):
    runs = trial("lab2_hacking", tmp_path)["train_toy"][0]
    assert runs["lax"]["proxy"][-1] > runs["lax"]["proxy"][0] + 0.05
    assert runs["small JPEG"]["truth"][-1] < runs["small JPEG"]["truth"][0] - 0.1
    assert runs["lax, KL 1"]["kl"][-1] < runs["lax"]["kl"][-1], "the penalty brakes"


@pytest.mark.slow
def test_variance_sure_and_hopeless_prompts_need_the_most_pictures(tmp_path):
    for found in trial("lab3_variance", tmp_path)["exact"]:
        for G in ("2", "8", "64"):
            grpo, unscaled, others = ([column[2] for column in found[name][G]]
                                      for name in ("GRPO", "Dr. GRPO", "leave-one-out"))
            assert others == pytest.approx(unscaled), "leave-one-out is Dr. GRPO times a number"
            assert grpo[0] > 5 * grpo[3], "a prompt right once in 50 times needs many pictures"
        assert found["GRPO"]["64"][3][2] < found["GRPO"]["2"][3][2], "larger groups need fewer"
        for scaled, unscaled in zip(found["GRPO"]["2"], found["Dr. GRPO"]["2"]):
            assert scaled[2] == pytest.approx(unscaled[2]), "in pairs the division changes nothing"


@pytest.mark.slow
def test_offpolicy_the_clip_is_inert_in_the_first_epoch_only(tmp_path):
    measured = trial("lab4_offpolicy", tmp_path)
    assert all(value < 1e-4 for value in measured["first_epoch"][0].values())
    runs = measured["train_toy"][0]
    assert max(runs["clip 0.2, 1, 0.0008"]["clip_frac"]) == 0
    assert max(runs["clip 0.2, 2, 0.0008"]["clip_frac"]) > 0
    assert max(runs["no clip, 2, 0.0008"]["clip_frac"]) == 0


@pytest.mark.slow
def test_diversity_rejection_is_the_yardstick(tmp_path):
    found = trial("lab5_diversity", tmp_path)["compare"][0]
    assert abs(found["base"]["KL"]) < 1e-3, "the base has paid nothing"
    assert 0.4 < found["rejection"]["KL"] < 0.9, "log(1/p) of a model that is right half the time"
    assert found["temperature 0.7"]["right"] > found["base"]["right"]


@pytest.mark.slow
def test_search_the_likeliest_of_several_is_more_often_right(tmp_path):
    measured = trial("lab6_search", tmp_path)
    for result in measured["draw_many"][0].values():
        assert result["pass seen"] == sorted(result["pass seen"])
        assert result["best"]["8"][0] > result["best"]["1"][0]
    wrong = measured["where_wrong"][0]
    assert wrong["right"][-1] == 1 and wrong["wrong"][-1] == 0
    assert wrong["wrong"][0] > 0.2, "nothing is decided before the first code"


@pytest.mark.slow
def test_composition_likelihood_and_reward_move_the_gates(tmp_path):
    measured = trial("lab7_composition", tmp_path)
    for way, layers in measured["switched"][0]["gates"].items():
        assert len(layers) == 3 and all(any(gates) for gates in layers), way
    weights = measured["maps_of"][0]["maps"]                         # (words, codes)
    assert max(max(row) for row in weights) > 1.02 * min(min(row) for row in weights)


def test_a_lab_reads_its_options_and_shares_no_state(tmp_path, monkeypatch):
    """In a notebook, whose command line is the kernel's, it takes the defaults."""
    monkeypatch.syspath_prepend(ROOT / "labs")
    import lab
    monkeypatch.setattr(sys, "argv", ["lab", "--quick", "--seeds", "2", "--out", str(tmp_path)])
    one, other = lab.Experiment("one"), lab.Experiment("other")
    assert one.over_seeds(lambda seed: 10 * seed) == [0, 10] and one.quick(1, 2) == 1
    assert len(one.measured) == 1 and not other.measured
    monkeypatch.setattr(lab, "NOTEBOOK", True)
    monkeypatch.setattr(sys, "argv", ["kernel", "-f", "connection.json"])
    notebook = lab.Experiment("notebook")
    assert notebook.over_seeds(lambda seed: seed) == [0] and notebook.quick(1, 2) == 2


def test_pictures_in_a_labs_file_are_rounded(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "labs")
    import lab
    images = torch.rand(4, 3, toy.SIZE, toy.SIZE, generator=argrpo.rng_for("cpu", 0))
    sheet = lab.as_sheet(lab.as_text(images))                        # four in a row, framed
    third = sheet[1:-1, 2 * 26 + 1:3 * 26 - 1].permute(2, 0, 1)
    assert torch.equal(third, (images[2] * 255).round().byte()) and sheet[0].eq(255).all()


def test_a_choice_of_pairs_has_all_four_relations(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "labs")
    import lab
    for step in (5, 13):
        texts = lab.every(step, toy.SEEN_PAIRS)
        asked = [sum(f" {place} " in text for text in texts) for place in toy.scenes.PLACES]
        assert max(asked) - min(asked) <= 1
    with pytest.raises(ValueError, match="every 12th pair misses .* take an odd step"):
        lab.every(12, toy.SEEN_PAIRS)


def test_still_is_a_rotation_by_nothing_at_the_words(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "labs")
    from gates import still
    published = toy.load("t2i")[0]
    T = published.config.cls_token_num
    model = still(argrpo.Transformer(published.config))
    model.load_state_dict(published.state_dict())                    # which leaves the table alone
    assert (model.rope[:T, :, 0] == 1).all() and (model.rope[:T, :, 1] == 0).all()
    assert torch.equal(model.rope[T:], published.rope[T:]), "the picture's positions as they were"
    words = torch.randn(1, 2, T, 2 * model.rope.shape[1])
    assert torch.equal(argrpo.apply_rope(words, model.rope[:T]), words)
    assert not argrpo.apply_rope(words, published.rope[:T]).any(), "as published: zero"


def test_closed_gates_are_the_published_model_and_open_ones_look_at_words(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "labs")
    from gates import SPEED, add_gates, still
    published, gated = toy.load("t2i")[0], add_gates(toy.load("t2i")[0])
    cond, mask = toy.encode_captions(["one red circle", "a red circle above a blue square"])

    def answers(model):
        tokens, logp = argrpo.generate(model, cond, mask, generator=argrpo.rng_for("cpu", 0))
        return tokens, logp, argrpo.token_logp(model, tokens, cond, mask)[0]

    for one, other in zip(answers(published), answers(gated)):
        assert torch.equal(one, other), "closed: bit for bit"
    with torch.no_grad():
        for layer in gated.layers:
            layer.attention.gate.fill_(1 / SPEED)
        tokens, logp, again = answers(gated)
        torch.testing.assert_close(logp, again)
        right = argrpo.token_logp(still(published), tokens, cond, mask)[0]
        torch.testing.assert_close(again, right, msg="all open: cosine 1")


@pytest.mark.slow
@pytest.mark.parametrize("name", STORED)
def test_a_figure_is_drawn_from_the_stored_numbers(name, tmp_path):
    run_lab(name, tmp_path, "--stored")
    assert (tmp_path / f"{name}.md").read_text() == (ROOT / f"docs/labs/{name}.md").read_text()


@pytest.mark.parametrize("options, message", [
    (["--seeds", "3"], "lacks checkpoints of gates_shipped_paper, gates_tuned"),
    (["--stored"], "this lab has not been run for docs/labs yet"),
    (["--seeds", "0"], "--seeds must be at least 1, not 0"),
])
def test_what_is_missing_is_said_before_any_work(options, message, tmp_path, monkeypatch, capsys):
    """Where nothing is prepared and nothing stored."""
    monkeypatch.syspath_prepend(ROOT / "labs")
    import lab
    import prepare
    monkeypatch.setattr(prepare, "FOLDER", tmp_path)
    monkeypatch.setattr(lab, "STORED", tmp_path)
    monkeypatch.setattr(sys, "argv", ["lab7_composition.py", *options])
    with pytest.raises(SystemExit) as stop:
        runpy.run_path(str(ROOT / "labs" / "lab7_composition.py"))
    assert stop.value.code and message in f"{stop.value} {capsys.readouterr().err}"
