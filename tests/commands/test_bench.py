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
from benchmarks import bench, gpu, measuring, yardsticks
from benchmarks.yardsticks import full_mask_sampler, uncached_sampler

ROOT = Path(__file__).parents[2]
QUICK = ["--device", "cpu", "--size", "toy", "--tokens", "16", "--prompts", "2", "--group", "2",
         "--repeats", "2"]


@pytest.mark.parametrize("cfg_scale", [1.0, 2.0])
def test_all_samplers_draw_the_same_greedy_tokens(cfg_scale):
    model, labels = tiny_model(), torch.arange(3)
    expected, _ = argrpo.generate(model, labels, samples_per_prompt=2, cfg_scale=cfg_scale,
                                  greedy=True)
    assert len(expected.unique(dim=0)) == 3 and len(expected.unique()) > 3   # not all the same
    for sampler in (full_mask_sampler, uncached_sampler):
        assert torch.equal(sampler(model, labels, 2, cfg_scale, greedy=True), expected)


def test_a_yardstick_that_draws_something_else_is_not_timed(monkeypatch):
    def zeros(*args, **how):
        return torch.zeros(6, 36, dtype=torch.long)
    monkeypatch.setattr(yardsticks, "full_mask_sampler", zeros)
    with pytest.raises(RuntimeError, match="greedy tokens differ"):
        bench.main(QUICK)


def test_yardsticks_follow_the_policy():
    """First codes of 4000 images against the known probabilities: a frequency's standard error is
    at most 0.008, so a false alarm, at five of them, is rarer than one in 100,000."""
    model, label = tiny_model(block_size=1), torch.tensor([2])
    nothing = torch.zeros(1, 1, dtype=torch.long)
    with torch.no_grad():
        cond, null = (model(nothing, c) for c in (label, model.null_cond(label)))
        p = (null + 2.0 * (cond - null)).softmax(-1)[0, 0]
    for sampler in (full_mask_sampler, uncached_sampler):
        codes = sampler(model, label, 4000, 2.0)[:, 0]
        torch.testing.assert_close(codes.bincount(minlength=11) / 4000, p, rtol=0, atol=0.04)


def test_bytes_that_a_rollout_reads_by_hand():
    """16 channels, 2 layers of 4 * 16 * 16 + 3 * 16 * 48 weights and 2 norms, an output of 11
    codes, 4 tokens, 3 rows.  The decoding steps see 2, 3 and 4 positions, with a key and a value in
    each layer.  2 bytes each."""
    model = tiny_model(block_size=4).bfloat16()
    assert model.layers[0].feed_forward.w1.out_features == 48
    weights = 2 * (4 * 16 * 16 + 3 * 16 * 48 + 2 * 16) + 16 + 11 * 16
    expected = 2 * (4 * weights + (2 + 3 + 4) * 3 * 2 * 2 * 16)
    assert measuring.rollout_bytes(model, rows=3) == expected
    assert measuring.rollout_bytes(model, rows=3, size=4) == 2 * expected


def leaves(value):
    if not isinstance(value, dict):
        return [value]
    return [leaf for part in value.values() for leaf in leaves(part)]


def test_the_figures_are_there(tmp_path, capsys):
    out = tmp_path / "new" / "bench.json"
    bench.main(QUICK + ["--cfg-scale", "2", "--uncached-positions", "3", "--out", str(out)])
    result, text = json.loads(out.read_text()), capsys.readouterr().out
    assert set(result) == {"options", "machine", "parameters", "rollout", "ratio", "step",
                           "step_peak_gb", "bandwidth"}
    assert {"torch", "device", "threads"} <= set(result["machine"])
    options = result["options"]
    assert options == vars(replace(bench.Options(), **options))              # all of them
    assert options["uncached_positions"] == 3 and options["device"] == "cpu"
    assert list(result["rollout"]) == ["generate", "full_mask", "uncached"]
    for figures in result["rollout"].values():
        assert set(figures) == {"seconds", "seconds_min", "tokens_per_s", "images_per_s", "peak_gb"}
        assert figures["tokens_per_s"] == pytest.approx(16 * figures["images_per_s"])
        assert figures["images_per_s"] == pytest.approx(4 / figures["seconds"])
        assert figures["seconds_min"] <= figures["seconds"]
    assert set(result["ratio"]) == {"full_mask", "uncached"}
    assert set(result["bandwidth"]) == {"rollout_gb", "copy_gb_per_s", "share"}
    assert list(result["step"]) == ["rollout", "decode", "reward", "reference", "update", "step"]
    numbers = leaves({name: part for name, part in result.items()
                      if name not in ("machine", "options")})
    assert len(numbers) == 1 + 3 * 5 + 2 * 2 + 6 * 3 + 1 + 3
    assert all(number > 0 for number in numbers)
    assert "x full_mask" in text and "3 evenly spread positions, times 16" in text


@pytest.mark.slow
def test_the_parts_of_a_step_add_up():
    result = bench.main(QUICK + ["--skip-uncached", "--repeats", "1"])       # one round: no medians
    seconds = {part: figures["seconds"] for part, figures in result["step"].items()}
    assert seconds.pop("step") == pytest.approx(sum(seconds.values()), rel=1e-6)


@pytest.mark.slow
def test_parts_can_be_left_out():
    skip = ["--skip-uncached", "--skip-step"]
    result = bench.main(QUICK + ["--group", "1", "--repeats", "1", *skip])
    assert list(result["rollout"]) == ["generate", "full_mask"] and "step" not in result


# --- the suite for a GPU, rehearsed on the CPU -------------------------------------------------

SUITE = ["--suite", "gpu", "--device", "cpu", "--size", "toy"]


def suite_options(tmp_path, **changes):
    return bench.Options(suite="gpu", device="cpu", size="toy", out=str(tmp_path), **changes)


@pytest.mark.parametrize("name, tables", [
    ("parity", {"rollout against the CPU's": 4}),
    ("step-toy", {"seconds of a step": 1, "memory of a step": 1, "bandwidth of the rollout": 1}),
    ("optimizer", {"a step of the optimizer": 2})])
def test_a_part_of_the_suite(name, tables, tmp_path):
    """The quick ones; the whole suite is a slow test."""
    result = gpu.run_part(suite_options(tmp_path / "new", part=name))
    assert {title: len(rows) for title, rows in result.items()} == tables
    assert json.loads((tmp_path / "new" / f"{name}.json").read_text()) == result
    for rows in result.values():
        assert all(row.get("ok") is not False for row in rows)
        numbers = [value for row in rows for value in row.values() if isinstance(value, float)]
        assert numbers and all(0 <= number < float("inf") for number in numbers)


def test_parity_notices_a_drawer_that_computes_something_else(monkeypatch):
    honest = argrpo.generate

    def warmer(*args, prefix=None, **how):
        return honest(*args, prefix=prefix, temperature=1.0 if prefix is None else 1.1, **how)

    monkeypatch.setattr(argrpo, "generate", warmer)
    (rows,) = gpu.parity("toy", torch.device("cpu")).values()
    assert not any(row["ok"] for row in rows if row["precision"] == "float32")


def test_a_failing_part_is_in_the_table_and_the_others_go_on(tmp_path):
    def run(options, name, limit):
        assert 0 < limit <= 600
        statuses = {"a": "failed with status 1: OutOfMemoryError: too large", "b": "ok"}
        return statuses[name], {"times": [{"size": name, "s": 1.23456, "ok": None}]}

    results = gpu.run_suite(suite_options(tmp_path), names=["a", "b"], run=run)
    assert [r["status"][:6] for r in results.values()] == ["failed", "ok"]
    page = (tmp_path / "gpu.md").read_text()
    assert "| a | failed with status 1: OutOfMemoryError: too large | " in page
    assert "times\n\n| size | s | ok |\n| --- | --- | --- |\n| a | 1.235 |  |\n| b | 1.235" in page
    assert set(json.loads((tmp_path / "gpu.json").read_text())["parts"]) == {"a", "b"}
    late = gpu.run_suite(suite_options(tmp_path, minutes=0.0), names=["a"], run=run)
    assert late["a"]["status"] == "left out: no time left"


@pytest.mark.slow
def test_a_part_is_a_process_that_may_fail_or_take_too_long(tmp_path, monkeypatch):
    options = suite_options(tmp_path)
    status, tables = gpu.process_of_part(options, "no such part", limit=100)
    assert status.startswith("failed with status 2: error: unknown --part 'no such part'")
    assert gpu.process_of_part(options, "parity", limit=0.05) == ("ended after 0 s", {})
    assert not tables


@pytest.mark.slow
def test_the_suite_for_a_gpu_rehearsed(tmp_path):
    """All but `compile`, which takes a compiler minutes on a CPU."""
    names = ["parity", "mismatch", "kernels", "step-toy", "optimizer"]
    assert list(gpu.parts_of("toy")) == [*names, "compile"]
    results = gpu.run_suite(suite_options(tmp_path / "new"), names)
    assert {r["status"] for r in results.values()} == {"ok"}, results
    page = (tmp_path / "new" / "gpu.md").read_text()
    for title in ("sampler against learner", "attention kernels of decoding"):
        assert f"\n{title}\n" in page


@pytest.mark.parametrize("given, message", [
    (["--suite", "gpu"], "--suite gpu needs --out DIR"),
    (["--suite", "tpu", "--out", "x"], "unknown --suite 'tpu': there is gpu"),
    (["--suite", "gpu", "--device", "cpu", "--out", "x"], "torch sees no GPU here"),
    ([*SUITE, "--out", "x", "--part", "B"], "unknown --part 'B': there are parity, mismatch, ")])
def test_the_suite_explains_bad_options(given, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as stop:
        bench.main(given)
    assert stop.value.code == 2 and message in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_a_bad_option_is_one_line():
    """As a user starts it: from the repository's root, as a file."""
    command = [sys.executable, "benchmarks/bench.py", "--tokens", "10"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2 and not done.stdout
    assert done.stderr == "error: --tokens must be a square number such as 256 or 576, not 10\n"
