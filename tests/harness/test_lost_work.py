"""What must not cost a run its work: pictures, loggers, a second run, a power cut."""

import errno
import json
import math
import multiprocessing
import os
import shlex
import signal
import subprocess
import sys
import time
import types
from pathlib import Path

import pytest
import torch
from conftest import Blocks, brightness, read_metrics, tiny_model

import argrpo
import harness.run
import train_c2i
from argrpo import Prompts
from harness import checkpoints, processes
from harness.before_after import Watched, draw_like_rollout, evaluate, evaluate_spread
from reward import RewardSet
from train_c2i import C2iSettings

REWARDS = RewardSet({"mine": (lambda images, texts: brightness(images, texts)[0], 1.0)})
PROMPTS = Prompts(["a", "b"], torch.arange(2))


def tiny(folder, **changes):
    small = dict(reward="mine", eval_images=8, steps=2, prompts_per_step=2, group_size=2,
                 save_every=1, progress_every=0)
    return C2iSettings(out=str(folder), **(small | changes))


def train(settings, reward=REWARDS):
    """A run of a second; its exit status, 0 for one that ends well."""
    torch.manual_seed(0)
    parts = tiny_model(block_size=4, n_layer=1), Blocks(), PROMPTS, PROMPTS, reward, Watched()
    try:
        harness.run.run(settings, lambda settings, device: parts)
    except SystemExit as stop:
        return stop.code
    return 0


def fails(*given, **how):
    raise RuntimeError("cannot draw\n$5")


# --- what draws and reports ----------------------------------------------------------------------

def charts(*given):
    """No charts for the page, for they take seconds."""
    return []


@pytest.mark.parametrize("name", ["sheet_of_pairs", "curves", "page",
                                  "mind_arrays", "write_arrays"])
def test_a_picture_that_fails_loses_nothing(name, tmp_path, monkeypatch, capsys):
    out = tmp_path / "my run"
    monkeypatch.setattr(harness.page, "charts", charts)
    write_arrays = harness.run.write_arrays
    if name == "write_arrays":               # the one at the end
        def fails_at_the_end(path, arrays):
            return fails() if "scores_after" in arrays else write_arrays(path, arrays)
        monkeypatch.setattr(harness.run, name, fails_at_the_end)
    else:
        monkeypatch.setattr(harness.page if hasattr(harness.page, name) else harness.run, name,
                            fails)
    assert train(tiny(out)) == 0, "the run is finished"
    said = capsys.readouterr()
    lines = [line for line in said.err.splitlines() if "cannot draw" in line]
    assert len(lines) == 1 and "RuntimeError: cannot draw $5" in lines[0]
    assert lines[0].endswith(f"python report.py '{out}'") and "Traceback" not in said.err
    names = {path.name for path in out.iterdir()}
    kept = {"model.pt", "summary.json", "report.npz", "before_after.png", "curves.png"}
    lost = {"sheet_of_pairs": "before_after.png", "curves": "curves.png",
            "write_arrays": "before_after.png"}.get(name)    # which is made from them
    assert names >= kept - {lost} and not {".lock", ".holder"} & names
    assert name == "page" or "report.html" in names, "the page needs none of the others"


def test_model_and_summary_are_there_before_anything_is_drawn(tmp_path, monkeypatch):
    seen = []
    for module, name in ((harness.page, "sheet_of_pairs"), (harness.page, "curves"),
                         (harness.run, "mind_arrays")):
        monkeypatch.setattr(module, name, lambda *given: seen.append(
            {path.name for path in tmp_path.glob("run/*")}))
    train(tiny(tmp_path / "run"))
    assert len(seen) == 3 and all({"model.pt", "summary.json"} <= names for names in seen)


def test_a_picture_of_progress_that_fails_is_told_once(no_pictures, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(harness.run.Progress, "draw", fails)
    monkeypatch.setattr(harness.run.Progress, "is_due", lambda self, done: True)
    assert train(tiny(tmp_path / "run", steps=4)) == 0
    assert capsys.readouterr().err.count("cannot draw") == 1
    assert len(read_metrics(tmp_path / "run")) == 4


# --- loggers -------------------------------------------------------------------------------------

class Wandb(types.ModuleType):
    """Stands for the package: notes what it is given, and fails where it is told to."""

    def __init__(self, fail=()):
        super().__init__("wandb")
        self.logged, self.fail, self.opened, self.status = [], fail, 0, None

    def init(self, dir, **how):
        self.opened += 1
        (Path(dir) / "wandb").mkdir()
        if "init" in self.fail:
            raise RuntimeError("no API key\nconfigured")

    def log(self, metrics, step):
        if "log" in self.fail:
            raise ConnectionError("the connection is lost")
        self.logged.append((step, metrics))

    def Image(self, path):
        return path

    def finish(self, exit_code):
        self.status = exit_code
        if "finish" in self.fail:
            raise OSError("no space left on device")


@pytest.fixture
def wandb(monkeypatch):
    def install(*fail):
        monkeypatch.setitem(sys.modules, "wandb", Wandb(fail))
        return sys.modules["wandb"]
    return install


def test_numbers_within_numbers_are_logged_flat(no_pictures, tmp_path, wandb):
    logger = wandb()
    assert train(tiny(tmp_path / "run", log="wandb", eval_cfg_scales="7.5")) == 0
    (first, before), *_ = logger.logged
    assert first == 0 and "evaluation/reward" in before
    assert "evaluation/guidance/7.5/reward" in before and logger.status == 0
    assert not any(isinstance(value, dict) for _, numbers in logger.logged
                   for value in numbers.values())


def test_a_logger_that_does_not_open_leaves_the_folder_free(no_pictures, tmp_path, wandb,
                                                            monkeypatch, capsys):
    """One line and status 2, before any work; the corrected command finds its place."""
    pytest.importorskip("tensorboard")
    wandb("init")
    out, work = tmp_path / "run", harness.run.evaluate_all
    monkeypatch.setattr(harness.run, "evaluate_all", fails)
    assert train(tiny(out, log="tensorboard,wandb")) == 2
    errors = capsys.readouterr().err
    assert "error: --log wandb cannot be opened: RuntimeError: no API key configured" in errors
    assert "Traceback" not in errors and not out.exists()
    monkeypatch.setattr(harness.run, "evaluate_all", work)
    assert train(tiny(out)) == 0


@pytest.mark.parametrize("fail", ["log", "finish"])
def test_a_logger_that_fails_later_is_told_once_and_ends_nothing(no_pictures, fail, tmp_path,
                                                                 wandb, capsys):
    wandb(fail)
    assert train(tiny(tmp_path / "run", steps=3, log="wandb")) == 0
    assert capsys.readouterr().err.count("--log wandb failed") == 1
    assert (tmp_path / "run" / "summary.json").exists()


def test_a_logger_that_fails_silences_no_other(monkeypatch, capsys):
    calls = []

    def kind(name, fails):
        def numbers(self, step, metrics):
            calls.append(name)
            if fails:
                raise RuntimeError("its server is gone")
        return type(name, (), {"__init__": lambda self, *given: None, "numbers": numbers})
    kinds = {"bad": kind("bad", True), "good": kind("good", False)}
    monkeypatch.setattr(harness.run.Logs, "kinds", kinds)
    logs = harness.run.Logs(types.SimpleNamespace(log="bad,good", out="run"), {}, 0)
    for step in range(2):
        logs.numbers(step, {"reward": 1.0})
    assert calls == ["bad", "good", "good"], "the failing one is asked once, the other each time"


def test_a_failing_run_is_no_success_for_wandb(no_pictures, tmp_path, wandb):
    logger, calls = wandb(), []

    def breaks(images, texts):
        calls.append(0)
        return fails() if len(calls) > 4 else brightness(images, texts)[0]
    status = train(tiny(tmp_path / "run", log="wandb"), RewardSet({"breaks": (breaks, 1.0)}))
    assert status == logger.status == 1


@pytest.mark.parametrize("kept", [(), (".hidden",)])
def test_what_fails_before_the_end_of_the_first_step_is_no_run(no_pictures, kept, tmp_path, capsys):
    """And what the folder held before is still there."""
    out, calls = tmp_path / "run", []
    for name in kept:
        out.mkdir()
        (out / name).write_text("mine")

    def breaks(images, texts):
        calls.append(0)                          # two of the evaluation, one of the step
        return fails() if len(calls) == 3 else brightness(images, texts)[0]
    settings = tiny(out, eval_images=8)
    assert train(settings, RewardSet({"breaks": (breaks, 1.0)})) == 1
    errors = capsys.readouterr().err
    assert "before anything was trained: nothing is kept" in errors and "--resume" not in errors
    assert [path.name for path in out.glob("*")] == list(kept) and out.exists() == bool(kept)
    assert train(settings) == 0, "the corrected command"


def test_a_resumed_run_logs_no_step_twice(no_pictures, tmp_path, monkeypatch):
    """As after a kill between two checkpoints: TensorBoard has a step that runs again."""
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    out, save = tmp_path / "run", checkpoints.Record.save
    with monkeypatch.context() as patch:         # steps 2 and 3 are logged but never saved
        patch.setattr(checkpoints.Record, "save",
                      lambda self: save(self) if self.done <= 2 else None)
        assert train(tiny(out, steps=4, log="tensorboard", progress_every=1)) == 0
    assert train(tiny(out, steps=4, log="tensorboard", resume=str(out))) == 0
    events = EventAccumulator(str(out), size_guidance={"images": 0})
    events.Reload()
    assert [event.step for event in events.Scalars("reward")] == [0, 1, 2, 3]
    assert [event.step for event in events.Scalars("evaluation/reward")] == [0, 4]


# --- the lock of a folder ------------------------------------------------------------------------

def hold(folder, said):
    with checkpoints.locked(folder):
        said.send("held")
        time.sleep(600)


@pytest.fixture
def holder():
    """holder(folder): another process, a fork of this one, which holds the folder."""
    if "fork" not in multiprocessing.get_all_start_methods():
        pytest.skip("this system cannot fork")
    fork, started = multiprocessing.get_context("fork"), []

    def begin(folder):
        ours, theirs = fork.Pipe()
        started.append(fork.Process(target=hold, args=(folder, theirs), daemon=True))
        started[-1].start()
        assert ours.poll(60) and ours.recv() == "held"
        return started[-1]
    yield begin
    for process in started:
        process.kill()
        process.join()


@pytest.mark.parametrize("resumed", [False, True])
def test_a_folder_has_one_run_at_a_time(no_pictures, resumed, tmp_path, holder, capsys):
    """The second says who has it, and changes nothing; a killed one needs nobody's help."""
    out, change = tmp_path / "run", {}
    if resumed:
        assert train(tiny(out)) == 0
        change = dict(resume=str(out), steps=3)
    process = holder(out)
    before = {path: path.stat().st_mtime_ns for path in out.rglob("*")}
    capsys.readouterr()
    assert train(tiny(out, **change)) == 2
    said = capsys.readouterr()
    assert f"error: {out} is in use by process {process.pid} on " in said.err
    assert ", since 20" in said.err and not said.out and "Traceback" not in said.err
    assert {path: path.stat().st_mtime_ns for path in out.rglob("*")} == before
    process.kill()
    process.join()
    assert train(tiny(out, **change)) == 0
    assert not list(out.glob(".*"))


def test_the_folder_is_locked_before_anything_is_loaded(no_pictures, tmp_path, capsys):
    """What ends the loading leaves it free, but for weights that were pretrained meanwhile."""
    out = tmp_path / "runs" / "one"

    def load(settings, device):
        assert (out / ".lock").exists()
        if settings.from_scratch:
            (out / "weights").mkdir()
        raise ValueError("no such model")
    for from_scratch, left in ((False, []), (True, [tmp_path / "runs", out, out / "weights"])):
        with pytest.raises(SystemExit) as stop:
            harness.run.run(tiny(out, from_scratch=from_scratch), load)
        assert stop.value.code == 2 and "error: no such model\n" in capsys.readouterr().err
        assert list(tmp_path.rglob("*")) == left
    assert train(tiny(out, from_scratch=True)) == 0, "the corrected command"


@pytest.mark.parametrize("error", [errno.ENOLCK, errno.ENOSYS])
def test_a_file_system_without_locks_is_told(no_pictures, error, tmp_path, monkeypatch, capsys):
    fcntl = pytest.importorskip("fcntl")

    def lockless(file, operation):
        raise OSError(error, "no locks here")
    monkeypatch.setattr(fcntl, "flock", lockless)
    assert train(tiny(tmp_path / "run")) == 0
    assert capsys.readouterr().err.count(f"cannot be locked ([Errno {error}] no locks here)") == 1
    assert not list((tmp_path / "run").glob(".*"))


# --- the log after a power cut -------------------------------------------------------------------

@pytest.mark.parametrize("end", [b"\0" * 512, b'{"step": 2, "rew', b'\n\n', b"\xff\xfe{", b"12\n"])
def test_a_damaged_end_of_the_log_is_dropped(no_pictures, end, tmp_path, capsys):
    out = tmp_path / "run"
    assert train(tiny(out)) == 0
    complete = read_metrics(out)
    with open(out / "metrics.jsonl", "ab") as file:
        file.write(end)
    assert train(tiny(out, resume=str(out), steps=3)) == 0
    assert [m["step"] for m in read_metrics(out)] == [0, 1, 2]
    assert read_metrics(out)[:2] == complete and "missing" not in capsys.readouterr().err


def test_the_log_of_a_step_without_rewards_is_strict_json(no_pictures, tmp_path, wandb):
    """Null in the log; loggers and the page leave it out, and the doctor names it."""
    def misses(images, texts):
        return torch.full((len(texts),), math.nan if len(logger.logged) < 3 else 0.5)
    misses.may_miss, logger, out = True, wandb(), tmp_path / "run"
    assert train(tiny(out, log="wandb", steps=4), RewardSet({"misses": (misses, 1.0)})) == 0

    def refuse(constant):
        raise ValueError(f"{constant} is no JSON")
    steps = [json.loads(line, parse_constant=refuse)
             for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert [m["reward"] for m in steps] == [m["reward/misses"] for m in steps]
    assert [m["reward"] for m in steps] == [None, None, 0.5, 0.5]
    assert [m["missing"] for m in steps] == [1, 1, 0, 0]
    logged = [numbers for _, numbers in logger.logged if "reward_std" in numbers]
    assert [numbers.get("reward") for numbers in logged] == [None, None, 0.5, 0.5]
    html = harness.page.page(harness.page.read_run(out))
    assert b'<section id="curves">' in html


@pytest.mark.parametrize("lost", [1, 2])
def test_steps_that_the_log_has_lost_are_told(no_pictures, lost, tmp_path, capsys):
    out = tmp_path / "run"
    assert train(tiny(out, steps=3)) == 0
    lines = (out / "metrics.jsonl").read_text().splitlines()
    lines[lost] = "\0\0" + lines[lost][:9]
    (out / "metrics.jsonl").write_text("\n".join(lines))
    assert train(tiny(out, resume=str(out), steps=4)) == 0
    errors = capsys.readouterr().err
    assert errors.count("1 of the checkpoint's 3 steps are missing in it") == 1
    assert [m["step"] for m in read_metrics(out)] == [0, 3 - lost, 3]


# --- what is unknown, over processes -------------------------------------------------------------

def test_a_mean_over_processes_leaves_out_what_is_unknown(monkeypatch):
    """By pictures: three known rewards here, one there, and not by processes."""
    mine = {"reward": 1.0, "kl": 0.2, "watched": None, "nobody's": math.nan}
    theirs = {"reward": 5.0, "kl": 0.4, "watched": 3.0, "nobody's": math.nan}
    answers = [[mine, theirs], [{"reward": 3, "watched": 0}, {"reward": 1, "watched": 4}]]
    monkeypatch.setattr(processes, "rank_and_size", lambda: (0, 2))
    monkeypatch.setattr(processes, "gather", lambda value: answers.pop(0))
    means = processes.average_over_processes(mine, (), {"reward": 3, "watched": 0})
    assert means.pop("nobody's") is not None
    assert means == pytest.approx({"reward": 2.0, "kl": 0.3, "watched": 3.0})


def test_one_unknown_mean_does_not_silence_the_other(monkeypatch):
    mine, theirs = {"reward": math.nan, "ratio_max": 1.0}, {"reward": 0.5, "ratio_max": math.nan}
    monkeypatch.setattr(processes, "rank_and_size", lambda: (0, 2))
    monkeypatch.setattr(processes, "gather", lambda value: [mine, theirs])
    means = processes.average_over_processes(mine, ("ratio_max",))
    assert means == {"reward": 0.5, "ratio_max": 1.0}


# --- memory --------------------------------------------------------------------------------------

@pytest.mark.parametrize("what", ["evaluate", "evaluate_spread", "progress"])
def test_no_pass_draws_more_images_than_a_rollouts(what, spy):
    """One prompt of many pictures, and many prompts: both within what was fitted to memory."""
    drawn, model = spy(argrpo, "generate"), tiny_model(block_size=4, n_layer=1)
    for count in (1, 5):
        prompts = Prompts([f"prompt {k}" for k in range(count)], torch.arange(count))
        settings = tiny("unused", eval_images=22 * count, prompts_per_step=4, rollout_prompts=2,
                        group_size=4, micro_batch=5)
        drawn.calls.clear()
        if what == "evaluate":
            _, gallery = evaluate(model, Blocks(), prompts, brightness, settings)
            assert gallery["pictures"].shape[:2] == gallery["tokens"].shape[:2] == (count, 6)
        elif what == "evaluate_spread":
            evaluate_spread(model, Blocks(), prompts, settings, lambda images, texts: {})
        else:
            index = torch.arange(count)
            draw_like_rollout(model, Blocks(), prompts, index, settings, 4, "progress")
        sizes = [len(cond) * how["samples_per_prompt"] for (_, cond, *_), how in drawn.calls]
        assert max(sizes) <= 8 and len({how["generator"].initial_seed() for _, how in
                                        drawn.calls}) == len(sizes), "each has its own numbers"


def test_the_parts_of_a_prompt_are_all_its_pictures():
    settings = tiny("unused", group_size=4, prompts_per_step=2)
    model = tiny_model(block_size=4, n_layer=1)
    texts, tokens, logp, images = draw_like_rollout(model, Blocks(), PROMPTS, torch.arange(2),
                                                    settings, 19, "evaluation", 0)
    assert texts == ["a"] * 19 + ["b"] * 19
    assert len(tokens) == len(logp) == len(images) == 38


# --- what is printed and noted -------------------------------------------------------------------

def test_the_printed_command_can_be_copied(no_pictures, tmp_path, monkeypatch, capsys):
    out = tmp_path / "my run's folder"
    monkeypatch.setattr(processes.StopRequest, "everywhere", lambda self: self.received or bool(
        (out / "last.pt").exists() and setattr(self, "received", 15) is None))
    assert train(tiny(out, steps=5)) == 143
    line, = [x for x in capsys.readouterr().err.splitlines() if "continue with: " in x]
    command = shlex.split(line.split("continue with: ")[1])
    assert command == ["python", "train_c2i.py", "--resume", str(out)]


def test_fewer_steps_than_are_done_are_refused(no_pictures, tmp_path, capsys, monkeypatch):
    out = tmp_path / "run"
    assert train(tiny(out, steps=3)) == 0
    before = {path: path.read_bytes() for path in out.glob("*.*")}
    monkeypatch.setattr(harness.run, "evaluate_all", fails)  # it is told before any work
    capsys.readouterr()
    assert train(tiny(out, resume=str(out), steps=2)) == 2
    said = capsys.readouterr().err
    assert "has done 3 steps already: --steps must be at least 3, not 2" in said
    assert "stopped in" not in said and "continue" not in said
    assert {path: path.read_bytes() for path in out.glob("*.*")} == before


def git(folder, *words):
    identity = ["-c", "user.name=x", "-c", "user.email=x@y", "-c", "safe.directory=*"]
    return subprocess.run(["git", *identity, *words], cwd=folder, check=True, text=True,
                          capture_output=True).stdout.strip()


@pytest.mark.parametrize("what", ["prompts", "transformer", "tokenizer"])
def test_a_run_is_not_resumed_from_other_files(no_pictures, what, tmp_path, capsys):
    """A caption file that was edited, a checkpoint that was replaced: the reference is another."""
    assert train(tiny(tmp_path)) == 0
    torch.manual_seed(1 if what == "transformer" else 0)
    model, prompts = tiny_model(block_size=4, n_layer=1), PROMPTS
    tokenizer = Blocks()
    if what == "prompts":
        prompts = Prompts(["a", "c"], PROMPTS.cond)
    elif what == "tokenizer":
        tokenizer.register_buffer("other", torch.ones(1))
    parts = model, tokenizer, prompts, prompts, REWARDS, Watched()
    with pytest.raises(SystemExit) as stop:
        harness.run.run(tiny(tmp_path, resume=str(tmp_path), steps=3), lambda *given: parts)
    assert stop.value.code == 2
    assert f"began with another {what}: put back" in capsys.readouterr().err
    assert train(tiny(tmp_path, resume=str(tmp_path), steps=3)) == 0, "with the old ones it goes on"


def test_the_second_ctrl_c_ends_the_program_at_once(capsys):
    with processes.StopRequest() as stop:
        signal.raise_signal(signal.SIGINT)
        assert stop.received == signal.SIGINT, "the first lets the step finish"
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
    assert "finishing what is under way, then saving" in capsys.readouterr().err


@pytest.mark.skipif(not hasattr(signal, "SIGHUP"), reason="Windows has no such signal")
def test_a_terminal_that_is_closed_asks_for_the_end_unless_nohup_ignores_that(monkeypatch):
    monkeypatch.setattr(sys, "stderr", open(os.devnull))      # it refuses to be written

    def unheard(number, frame):
        raise AssertionError("a terminal that is closed kills the run, with nothing saved")
    before = signal.signal(signal.SIGHUP, unheard)
    try:
        with processes.StopRequest() as stop:
            os.kill(os.getpid(), signal.SIGHUP)
            assert stop.received == signal.SIGHUP, "the step can finish, and be saved"
        signal.signal(signal.SIGHUP, signal.SIG_IGN)
        with processes.StopRequest() as stop:
            os.kill(os.getpid(), signal.SIGHUP)
            assert stop.received is None, "nohup python train_c2i.py & goes on"
    finally:
        signal.signal(signal.SIGHUP, before)


def test_output_that_nobody_reads_ends_nothing(tmp_path):
    """As in `train_c2i.py | head -1`: of what is printed later nothing can be written."""
    program = ("import sys\nfrom harness.logs import say\nsay('one')\nsys.stdin.read()\n"
               "say('two')\nsay('three')\nprint('done', file=sys.stderr)\n")
    with subprocess.Popen([sys.executable, "-c", program], text=True, stdin=subprocess.PIPE,
                          stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout.readline() == "one\n"
        process.stdout.close()
        process.stdin.close()
        assert process.stderr.read() == "done\n" and process.wait() == 0


def test_the_commit_of_an_outer_repository_is_not_ours(tmp_path, monkeypatch):
    inner = tmp_path / "inner"
    inner.mkdir()
    (inner / "argrpo.py").touch()
    monkeypatch.setattr(argrpo, "__file__", str(inner / "argrpo.py"))
    git(tmp_path, "init")
    git(tmp_path, "commit", "--allow-empty", "-m", "outer")
    assert harness.run.version() == "unknown"
    git(inner, "init")
    git(inner, "commit", "--allow-empty", "-m", "inner")
    commit = git(inner, "describe", "--always")
    monkeypatch.setenv("GIT_DIR", str(tmp_path / ".git"))    # as in a hook of the outer one
    assert harness.run.version() == commit


def test_settings_of_the_run_are_in_its_configuration(no_pictures, tmp_path):
    assert train(tiny(tmp_path / "run")) == 0
    config = json.loads((tmp_path / "run" / "config.json").read_text())
    assert config["script"] == train_c2i.C2iSettings.script and config["argrpo"]
