"""What goes wrong in long runs, done on purpose.

Kills, full disks, damaged files, bad numbers, dying processes."""

import math
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from conftest import read_metrics, tiny_model, trained_weights

import argrpo
import toy
import train_c2i
from harness import processes
from harness.checkpoints import load_checkpoint, save_checkpoint
from harness.device import frozen_copy
from harness.logs import write_atomically

ROOT = Path(__file__).parents[2]
QUICK = ["--preset", "toy", "--prompts-per-step", "2", "--group-size", "4", "--eval-images", "8",
         "--save-every", "2"]
ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1", "TQDM_DISABLE": "1"}


def start(*options, program=(sys.executable,), **how):
    command = [*program, str(ROOT / "train_c2i.py"), *map(str, options)]
    return subprocess.Popen(command, env=ENVIRONMENT, stdout=subprocess.PIPE,
                            stderr=subprocess.PIPE, text=True, **how)


def finish(process, timeout=120):
    output, errors = process.communicate(timeout=timeout)
    return process.returncode, output, errors


def assert_same_run(a, b):
    """Metrics and final weights, bit for bit."""
    assert read_metrics(a) == read_metrics(b)
    ours, theirs = trained_weights(a), trained_weights(b)
    assert all(torch.equal(tensor, theirs[name]) for name, tensor in ours.items())


@pytest.fixture(scope="module")
def whole_run(tmp_path_factory):
    """A run of 12 steps that nothing ever happened to, in a process like the other tests'."""
    out = tmp_path_factory.mktemp("whole") / "run"
    assert finish(start(*QUICK, "--steps", 12, "--out", out))[0] == 0
    return out


# --- kills -----------------------------------------------------------------------------------

def start_or_resume(out, steps, options):
    if (out / "config.json").exists():
        return start("--resume", out)
    return start(*QUICK, *options, "--steps", steps, "--out", out)


def soak(out, whole, steps, kills, seed, options=()):
    """Kills a run at random moments, with signals of all kinds, and resumes it: how often it was
    hit.

    The moments are spread over everything that a run does: start, evaluation, steps, checkpoints,
    pictures."""
    signals = [signal.SIGKILL, signal.SIGKILL, signal.SIGTERM, signal.SIGINT]
    rng, hit = random.Random(seed), 0
    for _ in range(kills):
        process = start_or_resume(out, steps, options)
        time.sleep(rng.uniform(2, 6))
        process.send_signal(rng.choice(signals))
        hit += finish(process)[0] != 0
    status, _, errors = finish(start_or_resume(out, steps, options), timeout=600)
    assert status == 0, errors
    assert_same_run(out, whole)
    return hit


@pytest.mark.slow
def test_a_run_killed_at_random_moments_ends_as_if_nothing_had_happened(tmp_path):
    """A soak of a minute, with what rehearsal remembers.

    As long as you like: `PYTHONPATH=.:tests python tests/harness/test_faults.py MINUTES`."""
    diverse = ("--recipe", "diverse", "--rehearsal-groups", 8, "--rehearsal-steps", 3)
    assert finish(start(*QUICK, *diverse, "--steps", 50, "--out", tmp_path / "whole"))[0] == 0
    assert soak(tmp_path / "run", tmp_path / "whole", 50, kills=5, seed=0, options=diverse) > 0


@pytest.mark.slow
def test_a_kill_between_the_two_renames_of_a_checkpoint(tmp_path, whole_run):
    """There is no last.pt then, but new.pt, complete."""
    out = tmp_path / "run"
    process = start(*QUICK, "--steps", 12, "--out", out)
    while not (out / "last.pt").exists():
        assert process.poll() is None
        time.sleep(0.005)
    process.kill()
    finish(process)
    os.replace(out / "last.pt", out / "new.pt")
    assert finish(start("--resume", out))[0] == 0
    assert_same_run(out, whole_run)


@pytest.mark.slow
def test_sigterm_finishes_the_step_and_saves(tmp_path, whole_run):
    out = tmp_path / "run"
    process = start(*QUICK, "--steps", 12, "--save-every", 1000, "--out", out)
    while not (out / "metrics.jsonl").exists() or not read_metrics(out):
        assert process.poll() is None
        time.sleep(0.005)
    process.send_signal(signal.SIGTERM)
    status, _, errors = finish(process)
    assert status == 128 + signal.SIGTERM
    assert f"continue with: python train_c2i.py --resume {out}" in errors
    assert finish(start("--resume", out))[0] == 0
    assert_same_run(out, whole_run)


# --- disks and files -------------------------------------------------------------------------

def small_files_only():
    """As on a full disk: no file may grow beyond 100 kB."""
    import resource
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)


@pytest.mark.slow
def test_a_full_disk_keeps_the_last_checkpoint(tmp_path, whole_run):
    out = tmp_path / "run"
    process = start(*QUICK, "--steps", 12, "--out", out)
    while not (out / "previous.pt").exists():
        assert process.poll() is None
        time.sleep(0.005)
    process.kill()
    finish(process)
    good = (out / "last.pt").read_bytes()
    status, _, errors = finish(start("--resume", out, preexec_fn=small_files_only))
    assert status == 1 and "Traceback" not in errors
    assert f"cannot write {out}/new.pt" in errors
    assert (out / "last.pt").read_bytes() == good and not list(out.glob("*.tmp"))
    assert finish(start("--resume", out))[0] == 0                        # once there is room again
    assert_same_run(out, whole_run)


@pytest.mark.parametrize("keep", [0, 0.5, 0.999])
def test_a_truncated_checkpoint_is_named_with_the_last_good_one(keep, tmp_path):
    model = tiny_model()
    optimizer = argrpo.make_optimizer(model, argrpo.GRPOConfig())
    for step in (2, 4):
        save_checkpoint(tmp_path / "last.pt", step, model, optimizer)
    last, previous = tmp_path / "last.pt", tmp_path / "previous.pt"
    data = last.read_bytes()
    last.write_bytes(data[:int(keep * len(data))])
    with pytest.raises(OSError, match=f"{last} is damaged.*the one before it is {previous}"):
        load_checkpoint(last, model, optimizer)
    os.replace(previous, last)
    assert load_checkpoint(last, model, optimizer) == 2


@pytest.mark.parametrize("where", ["tok_embeddings.weight", "the optimizer's exp_avg"])
def test_a_checkpoint_with_numbers_that_are_not_finite_is_refused(where, tmp_path):
    model = tiny_model()
    optimizer = argrpo.make_optimizer(model, argrpo.GRPOConfig())
    model(torch.zeros(1, 16, dtype=torch.long), torch.tensor([0])).sum().backward()
    optimizer.step()
    save_checkpoint(tmp_path / "last.pt", 1, model, optimizer)
    assert load_checkpoint(tmp_path / "last.pt", model, optimizer) == 1
    weight = model.tok_embeddings.weight
    spoiled = weight.data if where.startswith("tok") else optimizer.state[weight]["exp_avg"]
    spoiled[3, 0] = math.inf
    save_checkpoint(tmp_path / "last.pt", 2, model, optimizer)
    with pytest.raises(OSError, match=f"NaN or infinite numbers in {where}.*previous.pt: rename"):
        load_checkpoint(tmp_path / "last.pt", model, optimizer)


@pytest.mark.parametrize("error", [OSError, RuntimeError])
def test_a_failing_write_keeps_the_previous_checkpoint(error, tmp_path):
    """torch.save raises a RuntimeError of its own on a full disk."""
    path = tmp_path / "last.pt"
    write_atomically(path, lambda file: file.write(b"good"))

    def fail(file):
        file.write(b"half")
        raise error("no space left on device")

    with pytest.raises(OSError, match="no space left on device"):
        write_atomically(path, fail)
    assert path.exists() and path.read_bytes() == b"good", "it stays until the new one is whole"
    assert not list(tmp_path.glob("*.tmp")), "half a file is left behind, where the disk is full"


@pytest.mark.slow
def test_resuming_from_a_damaged_checkpoint_changes_nothing(tmp_path, capsys, quick):
    out = tmp_path / "run"
    train_c2i.main([*QUICK, "--steps", "4", "--out", str(out)])
    (out / "last.pt").write_bytes(b"not a checkpoint")
    log = (out / "metrics.jsonl").read_bytes()
    with pytest.raises(SystemExit) as stop:
        train_c2i.main(["--resume", str(out)])
    assert stop.value.code == 1 and "last.pt is damaged" in capsys.readouterr().err
    assert (out / "metrics.jsonl").read_bytes() == log


def test_a_folder_that_cannot_be_written_is_found_out_first(tmp_path, capsys):
    (tmp_path / "file").touch()
    with pytest.raises(SystemExit) as stop:
        train_c2i.main([*QUICK, "--out", str(tmp_path / "file" / "run")])
    assert stop.value.code == 2
    assert f"cannot write into {tmp_path}/file" in capsys.readouterr().err


# --- bad numbers -----------------------------------------------------------------------------

SPOILED = """
import os
calls = 0
def light(images, prompts):
    global calls
    calls += 1
    scores = images.mean(dim=(1, 2, 3))
    if calls == int(os.environ.get("SPOIL_CALL", -1)):
        scores[1] = float(os.environ["SPOIL_WITH"])
    return scores
"""


@pytest.mark.slow
@pytest.mark.parametrize("value", ["nan", "inf"])
def test_a_bad_reward_stops_the_run_after_saving(value, tmp_path, monkeypatch):
    file = tmp_path / "mine.py"
    file.write_text(SPOILED)
    options = [*QUICK, "--steps", 6, "--save-every", 1000, "--reward", f"{file}:light"]
    assert finish(start(*options, "--out", tmp_path / "whole"))[0] == 0
    monkeypatch.setitem(ENVIRONMENT, "SPOIL_CALL", "5")  # one call before training, so step 3
    monkeypatch.setitem(ENVIRONMENT, "SPOIL_WITH", value)
    status, _, errors = finish(start(*options, "--out", tmp_path / "run"))
    assert status == 1 and f"reward 'light' gave {value} to image 1, prompt '" in errors
    assert "stopped in step 3 of 6, saved up to step 3" in errors and "Traceback" not in errors
    monkeypatch.delitem(ENVIRONMENT, "SPOIL_CALL")
    assert finish(start("--resume", tmp_path / "run"))[0] == 0   # the reward is repaired again
    assert_same_run(tmp_path / "run", tmp_path / "whole")


FAILS = """
calls = 0
def fails(images, prompts):
    global calls
    calls += 1
    return images[:, 0, 0, 0] if calls < 4 else images.no_such_thing
"""


def test_an_error_in_the_users_reward_stops_the_run_after_saving(tmp_path, capsys):
    """One line with the reward, its prompts, and where in the user's file it failed."""
    file = tmp_path / "mine.py"
    file.write_text(FAILS)
    with pytest.raises(SystemExit) as stop:
        train_c2i.main([*QUICK, "--steps", "6", "--save-every", "1000",
                        "--reward", f"{file}:fails", "--out", str(tmp_path / "run")])
    errors = capsys.readouterr().err
    assert stop.value.code == 1 and "Traceback" not in errors
    assert "error: reward 'fails' failed for the prompts '" in errors
    assert f"object has no attribute 'no_such_thing' ({file}, line 6)\n" in errors
    assert "stopped in step 2 of 6, saved up to step 2" in errors
    assert torch.load(tmp_path / "run" / "last.pt", weights_only=True)["step"] == 2


@pytest.mark.parametrize("epochs, saved", [(1, 2), (2, 0)])
def test_a_model_that_overflows_stops_before_its_update(epochs, saved, tmp_path, monkeypatch,
                                                        capsys):
    """The log-probs in the last epoch of step 2 are made infinite.  Steps 0 and 1 are saved, unless
    the weights have already made a part of step 2."""
    honest, calls = argrpo.token_logp, []

    def overflowing(*args, **how):
        logp, entropy = honest(*args, **how)
        calls.append(0)                  # a pass of the reference in each step, and one an epoch
        return (logp - math.inf if len(calls) == 3 * (1 + epochs) else logp), entropy
    monkeypatch.setattr(argrpo, "token_logp", overflowing)
    with pytest.raises(SystemExit) as stop:
        train_c2i.main([*QUICK, "--steps", "6", "--save-every", "1000", "--update-epochs",
                        str(epochs), "--out", str(tmp_path / "run")])
    errors = capsys.readouterr().err
    assert stop.value.code == 1 and "error: step 2: the gradient's norm is nan" in errors
    assert f"stopped in step 2 of 6, saved up to step {saved}; continue" in errors
    last = tmp_path / "run" / "last.pt"
    assert last.exists() == (epochs == 1)
    assert epochs == 2 or torch.load(last, weights_only=True)["step"] == 2


# --- bad input -------------------------------------------------------------------------------

def test_processes_must_share_the_prompts_equally(monkeypatch, capsys, tmp_path):
    monkeypatch.setenv("WORLD_SIZE", "3")
    with pytest.raises(SystemExit) as stop:
        train_c2i.main([*QUICK, "--out", str(tmp_path / "run")])
    assert stop.value.code == 2
    message = "prompts_per_step 2 cannot be shared equally by 3 processes"
    assert message in capsys.readouterr().err


# --- several processes -----------------------------------------------------------------------

TORCHRUN = (sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2")


@pytest.mark.slow
def test_two_processes_are_one_with_two_micro_batches(tmp_path):
    """Both draw each prompt's group in a pass of its own, so they see the same pictures."""
    options = (*QUICK, "--steps", 4, "--rollout-prompts", 1, "--micro-batch", 4)
    assert finish(start(*options, "--out", tmp_path / "one"))[0] == 0
    status, output, errors = finish(start(*options, "--out", tmp_path / "two", program=TORCHRUN))
    assert status == 0, errors
    assert output.count("before:") == 2 and "on cpu and 1 more" in output    # one process speaks
    one, two = read_metrics(tmp_path / "one"), read_metrics(tmp_path / "two")
    assert len(one) == len(two) == 4
    for a, b in zip(one, two):                           # one process alone also measures D
        assert {name: a[name] for name in b} == pytest.approx(b, rel=1e-3, abs=1e-4)
    ours, theirs = (trained_weights(tmp_path / name) for name in ("one", "two"))
    for name, tensor in ours.items():
        torch.testing.assert_close(tensor, theirs[name], rtol=1e-3, atol=2e-4)
    status, _, errors = finish(start("--resume", tmp_path / "two", "--steps", 6, program=TORCHRUN))
    assert status == 0, errors
    assert len(read_metrics(tmp_path / "two")) == 6


@pytest.mark.slow
def test_two_processes_share_what_the_diverse_recipe_remembers(tmp_path):
    """Stopped and resumed, they end bit for bit as if they had never stopped."""
    options = (*QUICK, "--recipe", "diverse", "--classes", "0,5,13", "--prompts-per-step", 2,
               "--group-size", 8, "--rollout-prompts", 1, "--micro-batch", 8, "--lr-end", 1,
               "--rehearsal-groups", 8, "--rehearsal-steps", 3)
    for name, steps in (("two", 6), ("stopped", 3)):
        status, _, errors = finish(start(*options, "--steps", steps, "--out", tmp_path / name,
                                         program=TORCHRUN))
        assert status == 0, errors
    resumed = start("--resume", tmp_path / "stopped", "--steps", 6, program=TORCHRUN)
    assert finish(resumed)[0] == 0
    assert_same_run(tmp_path / "stopped", tmp_path / "two")
    remembered = torch.load(tmp_path / "two" / "last.pt", weights_only=True)["remembered"]
    assert len(remembered["recent"]) == 3, "the groups of both processes"


DIES = """
import os
calls = 0
def dies(images, prompts):
    global calls
    calls += 1
    if os.environ["RANK"] == "1" and calls == 2:
        os._exit(7)
    return images.mean(dim=(1, 2, 3))
"""


@pytest.mark.slow
def test_a_dying_process_ends_the_run(tmp_path):
    file = tmp_path / "mine.py"
    file.write_text(DIES)
    options = (*QUICK, "--steps", 50, "--reward", f"{file}:dies", "--out", tmp_path / "run")
    status, _, errors = finish(start(*options, program=TORCHRUN), timeout=90)
    assert status != 0 and "exitcode  : 7" in errors


BREAKS = """
import os
calls = 0
def breaks(images, prompts):
    global calls
    calls += 1
    if os.environ["RANK"] == os.environ["BREAKS"] and calls == 3:
        raise KeyError("my own bug")
    return images.mean(dim=(1, 2, 3))
"""


@pytest.mark.slow
@pytest.mark.parametrize("breaks", [0, 1])
def test_an_error_in_one_process_ends_all_at_once(breaks, tmp_path, monkeypatch):
    """And what was trained is saved, whichever process it is.  The third call is in step 1 of the
    first process, which has evaluated before, and in step 2 of the other."""
    file = tmp_path / "mine.py"
    file.write_text(BREAKS)
    monkeypatch.setitem(ENVIRONMENT, "BREAKS", str(breaks))
    options = (*QUICK, "--steps", 500, "--save-every", 1000, "--reward", f"{file}:breaks",
               "--out", tmp_path / "run")
    status, _, errors = finish(start(*options, program=TORCHRUN), timeout=120)
    assert status != 0
    assert errors.count("my own bug") == 2, "the process itself says it, and the other"
    assert f"error: process {breaks} has failed: BadReward: reward 'breaks' failed" in errors
    assert f"step {1 + breaks} of 500, saved up to step {1 + breaks}; continue with" in errors
    saved = torch.load(tmp_path / "run" / "last.pt", weights_only=True)
    assert saved["step"] == 1 + breaks == len(read_metrics(tmp_path / "run"))


@pytest.fixture
def the_first_of_two(monkeypatch):
    """This process, as if it were the first of two: (what it gave to the other, its answers)."""
    given, answers = [], []

    def exchange(into, mine):
        given.append(mine)
        into[:] = [mine, answers.pop(0)]

    monkeypatch.setattr(processes, "rank_and_size", lambda: (0, 2))
    monkeypatch.setattr(processes.dist, "get_world_size", lambda: 2)
    monkeypatch.setattr(processes.dist, "all_gather_object", exchange)
    return given, answers


def test_a_failing_process_tells_the_others(the_first_of_two):
    given, answers = the_first_of_two
    failure = processes.OtherProcessFailed("process 1 has failed: OSError: the disk is full")
    answers += [None, failure, None]
    with pytest.raises(KeyError), processes.failing_together():      # the other waits in `gather`
        raise KeyError("mine")
    assert [str(told) for told in given] == ["process 0 has failed: KeyError: 'mine'"]
    with pytest.raises(processes.OtherProcessFailed) as ended, processes.failing_together():
        processes.wait_for_all()
    assert ended.value is failure and given[1:] == [None], "who has been told tells no more"
    processes.wait_for_all()


def test_averages_over_processes(the_first_of_two):
    the_first_of_two[1].append({"a": 3.0, "b": 5.0, "c": 4.0, "d": None})
    mine = {"a": 1.0, "b": 2.0, "c": None, "d": None}
    average = processes.average_over_processes(mine, maximum=("b",))
    assert average == {"a": 2.0, "b": 5.0, "c": 4.0, "d": None}


@pytest.mark.slow
def test_memory_does_not_grow(tmp_path):
    """Resident set after 500 steps within 5% of what it was after 100."""
    sizes = []

    def resident(images, texts):
        pages = int(Path("/proc/self/statm").read_text().split()[1])
        sizes.append(pages)
        scores = images.mean(dim=(1, 2, 3))
        return scores, {"light": scores}

    model, vq = toy.load("c2i")
    config = argrpo.GRPOConfig(steps=500, prompts_per_step=2, group_size=4)
    prompts = argrpo.Prompts(toy.CLASSES, torch.arange(27))
    for _ in argrpo.train(model, frozen_copy(model), vq, prompts, resident, config,
                          argrpo.make_optimizer(model, config)):
        pass
    assert len(sizes) == 500 and max(sizes[100:]) < 1.05 * sizes[100]


if __name__ == "__main__":
    import tempfile
    minutes = float(sys.argv[1]) if len(sys.argv) > 1 else 10
    with tempfile.TemporaryDirectory() as folder:
        steps, began, hits, rounds = 100, time.time(), 0, 0
        assert finish(start(*QUICK, "--steps", steps, "--out", Path(folder) / "whole"))[0] == 0
        while time.time() - began < 60 * minutes:
            hits += soak(Path(folder) / f"run{rounds}", Path(folder) / "whole", steps, kills=8,
                         seed=rounds)
            rounds += 1
        print(f"{rounds} runs of {steps} steps, hit {hits} times in "
              f"{(time.time() - began) / 60:.1f} minutes: all ended as the one that was left alone")
