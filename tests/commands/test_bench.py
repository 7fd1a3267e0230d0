"""The benchmark: its yardsticks draw what `generate` draws, and its figures are there.

No time is asserted."""

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import tiny_model

import argrpo
from benchmarks import bench, gpu
from benchmarks.yardsticks import plain_sampler

ROOT = Path(__file__).parents[2]
QUICK = ["--device", "cpu", "--size", "toy", "--tokens", "16", "--prompts", "2", "--group", "2",
         "--repeats", "2"]


@pytest.mark.parametrize("cfg_scale", [1.0, 2.0])
def test_all_samplers_draw_the_same_greedy_tokens(cfg_scale):
    model, labels = tiny_model(), torch.arange(3)
    expected, _ = argrpo.generate(model, labels, samples_per_prompt=2, cfg_scale=cfg_scale,
                                  greedy=True)
    assert len(expected.unique(dim=0)) == 3 and len(expected.unique()) > 3   # not all the same
    tokens = plain_sampler(model, labels, 2, cfg_scale, greedy=True)
    assert torch.equal(tokens, expected)


def test_yardsticks_follow_the_policy():
    """First codes of 4000 images against the known probabilities: a frequency's standard error is
    at most 0.008, so a false alarm, at five of them, is rarer than one in 100,000."""
    model, label = tiny_model(block_size=1), torch.tensor([2])
    nothing = torch.zeros(1, 1, dtype=torch.long)
    with torch.no_grad():
        cond, null = (model(nothing, c) for c in (label, model.null_cond(label)))
        p = (null + 2.0 * (cond - null)).softmax(-1)[0, 0]
    codes = plain_sampler(model, label, 4000, 2.0)[:, 0]
    torch.testing.assert_close(codes.bincount(minlength=11) / 4000, p, rtol=0, atol=0.04)


def test_the_figures_are_there(tmp_path, capsys):
    out = tmp_path / "new" / "bench.json"
    bench.main(QUICK + ["--cfg-scale", "2", "--out", str(out)])
    result, text = json.loads(out.read_text()), capsys.readouterr().out
    assert set(result) == {"options", "machine", "rollout", "step", "memory"}
    assert {"torch", "device", "threads"} <= set(result["machine"])
    options = result["options"]
    assert options == vars(replace(bench.Options(), **options))              # all of them
    assert options["cfg_scale"] == 2 and options["device"] == "cpu"
    assert list(result["rollout"]) == ["generate", "full_mask"]
    for figures in result["rollout"].values():
        assert set(figures) == {"first", "seconds", "seconds_min", "tokens_per_s", "peak_gb",
                                "ratio"}
        assert figures["tokens_per_s"] == pytest.approx(4 * 16 / figures["seconds"])
        assert figures["seconds_min"] <= figures["seconds"]
    assert result["rollout"]["generate"]["ratio"] == 1
    assert list(result["step"]) == ["rollout", "decode", "reward", "reference", "update", "step"]
    assert set(result["memory"]["toy"]) == {"prompts a pass", "micro-batch", "peak_gb"}
    for title in ("rollout", "step", "memory"):
        for row in result[title].values():
            assert all(number > 0 for number in row.values()), (title, row)
    assert "| full_mask | " in text and "| share |" in text


@pytest.mark.slow
def test_the_parts_of_a_step_add_up():
    step = bench.main(QUICK + ["--parts", "step", "--repeats", "1"])["step"]     # no medians
    seconds = {part: figures["seconds"] for part, figures in step.items()}
    assert seconds.pop("step") == pytest.approx(sum(seconds.values()), rel=1e-6)


@pytest.mark.slow
def test_parts_can_be_left_out():
    result = bench.main(QUICK + ["--repeats", "1", "--parts", "rollout"])
    assert list(result["rollout"]) == ["generate", "full_mask"] and "step" not in result


@pytest.mark.slow
def test_counts_by_hand():
    """A step of 4 images: a prefill and 15 decoding steps, then a pass of the reference and one of
    the policy.  A layer has the same kernels in every size."""
    rows = [bench.main([*QUICK, "--size", size, "--parts", "counts"])["counts"][size]
            for size in ("toy", "GPT-B")]
    assert rows[0]["passes a step"] == 16 + 1 + 1 and rows[0]["graphs"] == 1
    more = rows[1]["kernels a token"] - rows[0]["kernels a token"]
    assert more % (12 - 3) == 0 and 40 < more / (12 - 3) < 50


def test_no_token_of_a_rollout_waits_for_a_number():
    with bench.Waits() as waits:
        argrpo.generate(tiny_model(), torch.arange(3), samples_per_prompt=2, cfg_scale=2.0)
    assert waits.count == 0


def test_a_wait_and_a_kernel_are_counted():
    x = torch.ones(3)
    with bench.Waits() as waits, bench.Kernels() as kernels:
        y = (x.view(3, 1) * 2)[1:]
        assert y.sum().item() == 4 and x.tolist() == [1, 1, 1] and torch.arange(2).tolist()
    assert waits.count == 2 and kernels.count == 4       # the product, the sum, the number, arange


# --- for a GPU, rehearsed on the CPU -----------------------------------------------------------

@pytest.mark.parametrize("part, title, rows", [
    ("parity", "rollout against the CPU's", 4), ("mismatch", "sampler against learner", 4)])
def test_log_probabilities_agree(part, title, rows):
    table = bench.main([*QUICK, "--parts", part])[title]
    assert len(table) == rows and all(row["ok"] for row in table.values())
    assert all(0 <= row["mean, nats"] <= row["largest"] < 1 for row in table.values())


def test_parity_notices_a_drawer_that_computes_something_else(monkeypatch):
    honest = argrpo.generate

    def warmer(*args, prefix=None, **how):
        return honest(*args, prefix=prefix, temperature=1.0 if prefix is None else 1.1, **how)

    monkeypatch.setattr(argrpo, "generate", warmer)
    (rows,) = bench.parity(bench.Options(size="toy", tokens=36), torch.device("cpu")).values()
    assert not any(row["ok"] for name, row in rows.items() if "float32" in name)


def test_a_failing_part_is_in_the_table_and_the_others_go_on(tmp_path, capsys):
    def run(options, out, name, limit):
        assert 0 < limit <= 600 and out == tmp_path / "new" and options.endswith(gpu.REHEARSAL)
        statuses = {"a": "failed with status 1: OutOfMemoryError: too large", "b": "ok"}
        return statuses[name], f"what {name} has printed"

    parts, given = {"a": "--parts a", "b": "--parts b"}, ["--out", str(tmp_path / "new")]
    gpu.main([*given, "--rehearsal"], parts, run)
    page = (tmp_path / "new" / "gpu.md").read_text()
    assert "| a | failed with status 1: OutOfMemoryError: too large | 0 s |\n| b | ok | " in page
    assert "## b\n\nwhat b has printed" in page
    gpu.main([*given, "--rehearsal", "--minutes", "0"], parts, run)
    assert "| a | left out: no time left |" in capsys.readouterr().out


@pytest.mark.slow
def test_a_part_is_a_process_that_may_fail_or_take_too_long(tmp_path):
    status, _ = gpu.run_part("--parts none", tmp_path, "none", limit=100)
    assert status.startswith("failed with status 2: error: unknown part 'none': there are rollout")
    assert gpu.run_part("--parts parity", tmp_path, "parity", 0.05) == ("ended after 0 s", "")


@pytest.mark.slow
def test_the_suite_for_a_gpu_rehearsed(tmp_path, capsys):
    """Its parts for all sizes are one at toy size."""
    parts = {name: gpu.PARTS[name] for name in ("parity", "mismatch", "rollout", "step-GPT-XXL")}
    gpu.main(["--out", str(tmp_path), "--rehearsal"], parts)
    assert capsys.readouterr().out.count(" | ok | ") == 4, (tmp_path / "gpu.md").read_text()
    page = (tmp_path / "gpu.md").read_text()
    for title in ("sampler against learner", "rollout", "step", "memory"):
        assert f"\n| {title} | " in page
    assert json.loads((tmp_path / "step-GPT-XXL.json").read_text())["options"]["size"] == "toy"


@pytest.mark.parametrize("given, message", [
    (["--tokens", "10"], "--tokens must be a square number such as 256 or 576, not 10"),
    (["--size", "GPT-S"], "unknown --size 'GPT-S': there are GPT-B, "),
    (["--parts", "step,B"], "unknown part 'B': there are rollout, step, parity, mismatch"),
    (["--group", "1"], "--group must be at least 2, not 1")])
def test_a_bad_option_is_explained(given, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as stop:
        bench.main([*given, "--out", "new/x.json"])
    assert stop.value.code == 2 and f"error: {message}" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_a_bad_option_is_one_line():
    """As a user starts it: from the repository's root, as a file."""
    command = [sys.executable, "benchmarks/bench.py", "--tokens", "10"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2 and not done.stdout
    assert done.stderr == "error: --tokens must be a square number such as 256 or 576, not 10\n"
