"""What a run keeps of itself, and what it continues from: harness/checkpoints.py.  One idea a test.

test_lost_work.py and test_faults.py have whole runs, kills and damaged files.
"""

import json
import math
import os
import signal

import pytest
import torch
from conftest import Blocks, brightness, read_metrics, tiny_model, trained_weights

import argrpo
import diversity
import harness.run
from argrpo import Prompts
from harness.before_after import Watched
from harness.checkpoints import Record, locked
from harness.logs import in_json
from reward import RewardSet
from train_c2i import C2iSettings


class Run:
    """A model, its optimizer and the Record of their steps, in a folder; resumed if it is asked."""

    def __init__(self, folder, resume=False, remembered=None, **changes):
        torch.manual_seed(0)
        settings = dict(steps=9, save_every=2, out=str(folder), resume=str(folder) * resume)
        self.model = tiny_model(block_size=4, n_layer=1)
        self.optimizer = argrpo.make_optimizer(self.model, argrpo.GRPOConfig(lr=0.1))
        self.record = Record(C2iSettings(**(settings | changes)))
        self.remembered = remembered or {}
        self.record.restore(self.model, self.optimizer, self.remembered)

    def update(self):
        """What a step does to weights and optimizer."""
        tokens = torch.zeros(1, 4, dtype=torch.long)
        argrpo.token_logp(self.model, tokens, torch.tensor([0]))[0].sum().backward()
        self.optimizer.step()
        self.optimizer.zero_grad()

    def step(self, number, reward=0.0):
        self.update()
        self.record.add({"step": number, "reward": reward})


def in_log(folder):
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    return [(line["step"], line["reward"]) for line in map(json.loads, lines)]


def saved_step(folder):
    assert (folder / "last.pt").exists(), "there is no checkpoint: nothing was saved"
    return torch.load(folder / "last.pt", weights_only=True)["step"]


# --- the log and the checkpoint agree ----------------------------------------------------------

def test_a_step_that_was_logged_but_not_saved_leaves_the_log_when_the_run_goes_on(tmp_path):
    """As after a kill: steps 0, 1 and 2 are logged, the checkpoint is of the first two."""
    run = Run(tmp_path)
    for number in range(3):
        run.step(number)
    assert saved_step(tmp_path) == 2, "save_every 2: the third step is in the log alone"
    again = Run(tmp_path, resume=True)
    assert [step for step, _ in in_log(tmp_path)] == [0, 1], (
        "step 2 will run again: its old line must go, or the curves have it twice")
    assert [m["step"] for m in again.record.metrics] == [0, 1], "nor does the page show it"
    again.step(2, reward=1.0)
    assert in_log(tmp_path) == [(0, 0.0), (1, 0.0), (2, 1.0)], "the new line is the one that counts"


def test_a_checkpoint_is_made_every_so_many_steps_and_after_the_last(tmp_path):
    run, saved = Run(tmp_path, steps=5), []
    for number in range(5):
        run.step(number)
        saved.append(run.record.saved)
    assert saved == [None, 2, 2, 4, 5], "save_every 2 of 5 steps: after 2, 4 and the last"
    previous = torch.load(tmp_path / "previous.pt", weights_only=True)
    assert previous["step"] == 4, "previous.pt is the one before the last"


def test_between_the_two_renames_of_a_checkpoint_new_pt_is_the_last(tmp_path):
    run = Run(tmp_path)
    run.step(0), run.step(1)
    os.replace(tmp_path / "last.pt", tmp_path / "new.pt")
    assert Run(tmp_path, resume=True).record.done == 2


def test_the_log_is_never_behind_the_checkpoint(tmp_path, monkeypatch):
    """Where saving fails, as on a full disk, the step stands in the log already."""
    run = Run(tmp_path)
    run.step(0)
    monkeypatch.setattr("harness.checkpoints.save_checkpoint", full_disk)
    with pytest.raises(OSError):
        run.step(1)
    assert [step for step, _ in in_log(tmp_path)] == [0, 1]


def test_who_has_the_folder_is_this_process_and_not_one_that_was_killed(tmp_path):
    (tmp_path / ".holder").write_text("process 0, since the beginning of time")
    with locked(tmp_path):
        assert f"process {os.getpid()} " in (tmp_path / ".holder").read_text()


def test_what_json_has_no_number_for_is_null_in_the_log():
    line = in_json({"step": 0, "a": math.inf, "b": -math.inf, "c": math.nan, "d": None, "e": 0.5})
    assert line == '{"step": 0, "a": null, "b": null, "c": null, "d": null, "e": 0.5}\n'


def test_what_is_resumed_are_the_weights_after_the_last_saved_step(tmp_path):
    run = Run(tmp_path)
    run.step(0), run.step(1)
    weights = run.model.output.weight.clone()
    average = run.optimizer.state[run.model.output.weight]["exp_avg"].clone()
    run.step(2)
    again = Run(tmp_path, resume=True)
    assert again.record.done == 2, "the next step is number 2"
    assert torch.equal(again.model.output.weight, weights), "the checkpoint's weights"
    state = again.optimizer.state[again.model.output.weight]
    assert state and state["step"] == 2, "AdamW goes on counting: it does not start anew"
    assert torch.equal(state["exp_avg"], average), "with its averages of the gradient"


def test_a_run_whose_steps_are_all_done_can_go_on(tmp_path, capsys):
    """As after a kill in the evaluation that follows them."""
    run = Run(tmp_path, steps=2)
    run.step(0), run.step(1)
    again = Run(tmp_path, steps=2, resume=True)
    again.record.close()
    assert again.record.done == 2 and capsys.readouterr().err == "", "no step is left to do"


def test_of_a_step_that_stands_twice_in_the_log_the_newer_line_counts(tmp_path):
    run = Run(tmp_path)
    run.step(0), run.step(1)
    with open(tmp_path / "metrics.jsonl", "a") as file:
        file.write('{"step": 1, "reward": 7.0}\n')
    Run(tmp_path, resume=True)
    assert in_log(tmp_path) == [(0, 0.0), (1, 7.0)], "a step that ran again has replaced the first"


# --- what is saved when a run ends early -------------------------------------------------------

def test_an_update_that_broke_off_half_way_is_not_saved(tmp_path, capsys):
    """Its weights are those of no step: resumed, they would be updated a second time."""
    run = Run(tmp_path)
    for number in range(3):
        run.step(number)
    run.update()                                 # step 3, which never gets to `add`
    run.record.close()
    assert saved_step(tmp_path) == 2, (
        "the weights have changed since step 2 was over: the checkpoint before must stay")
    assert "stopped in step 3 of 9, saved up to step 2" in capsys.readouterr().err


def test_steps_before_one_that_failed_without_an_update_are_saved(tmp_path, capsys):
    """As when a reward fails: nothing was changed, and nothing is to be lost."""
    run = Run(tmp_path)
    for number in range(3):
        run.step(number)
    run.record.close()
    assert saved_step(tmp_path) == 3, "three steps are done and their weights are whole"
    assert "stopped in step 3 of 9, saved up to step 3" in capsys.readouterr().err


# --- the diverse recipe's memory ---------------------------------------------------------------

def test_what_the_recipe_remembers_is_in_the_checkpoint(tmp_path):
    kept = {"rehearsal": {"a": torch.tensor([[1, 2, 3, 4]])}, "recent": {"a": [torch.ones(2)]}}
    run = Run(tmp_path, remembered=kept)
    run.step(0), run.step(1)
    empty = {"rehearsal": {}, "recent": {}}
    Run(tmp_path, resume=True, remembered=empty)
    assert list(empty["rehearsal"]) == list(empty["recent"]) == ["a"], (
        "a resumed run starts with what rehearsal and bonus knew")
    assert torch.equal(empty["rehearsal"]["a"], kept["rehearsal"]["a"])
    assert torch.equal(empty["recent"]["a"][0], torch.ones(2))


def diverse_run(folder, **changes):
    """A run of a second with rehearsal and bonus."""
    torch.manual_seed(0)
    settings = dict(reward="mine", eval_images=8, prompts_per_step=2, group_size=4, save_every=1,
                    progress_every=0, lr=0.05, lr_end=1.0, warmup_steps=1, rehearsal=0.5,
                    diversity_bonus=2.0)
    prompts = Prompts(["a", "b"], torch.arange(2))
    rewards = RewardSet({"mine": (lambda images, texts: brightness(images, texts)[0], 1.0)})
    parts = tiny_model(block_size=4, n_layer=1), Blocks(), prompts, prompts, rewards, Watched()
    harness.run.run(C2iSettings(out=str(folder), **(settings | changes)),
                    lambda settings, device: parts)


def assert_equal_runs(resumed, whole):
    assert read_metrics(resumed) == read_metrics(whole), (
        "the bonus compares with the prompt's groups from before the stop")
    ours = trained_weights(resumed)
    for name, tensor in trained_weights(whole).items():
        assert torch.equal(ours[name], tensor), f"{name}: a resumed run ends as one that never did"


def full_disk(*given):
    raise OSError("the disk is full")


def test_what_rehearsal_alone_has_trained_is_saved(tmp_path, no_pictures, monkeypatch, capsys):
    """It is half an hour of a long run.  What breaks off in its first step goes on behind it."""
    how = dict(steps=2, rehearsal_steps=3)
    diverse_run(tmp_path / "whole", **how)
    with monkeypatch.context() as patch:
        patch.setattr(diversity.DiversityBonus, "__call__", full_disk)
        with pytest.raises(SystemExit):
            diverse_run(tmp_path / "two", **how)
    assert saved_step(tmp_path / "two") == 0
    assert "stopped in step 0 of 2, saved up to step 0; continue with" in capsys.readouterr().err

    def again(*given):
        raise AssertionError("what rehearsal alone has trained is in the checkpoint")
    monkeypatch.setattr(diversity.Rehearsal, "alone", again)
    diverse_run(tmp_path / "two", resume=str(tmp_path / "two"), **how)
    assert_equal_runs(tmp_path / "two", tmp_path / "whole")


def test_rehearsal_alone_that_is_interrupted_is_not_taken_for_done(tmp_path, no_pictures,
                                                                   monkeypatch):
    def alone(*given):
        for _ in range(3):
            signal.raise_signal(signal.SIGINT)
            yield
    monkeypatch.setattr(diversity.Rehearsal, "alone", alone)
    with pytest.raises(SystemExit) as stop:
        diverse_run(tmp_path / "run", steps=2, rehearsal_steps=3)
    assert stop.value.code == 130 and not (tmp_path / "run").exists(), "nothing is kept"


def test_a_resumed_run_remembers_what_rehearsal_and_bonus_have_seen(tmp_path, no_pictures,
                                                                    monkeypatch):
    """Two steps and two more are four in one go, and the reference draws nothing again."""
    diverse_run(tmp_path / "whole", steps=4)
    diverse_run(tmp_path / "two", steps=2)
    drawn, honest = set(), diversity.Rehearsal.remember

    def remember(self, index):
        before = set(self.remembered)
        honest(self, index)
        drawn.update(set(self.remembered) - before)
    monkeypatch.setattr(diversity.Rehearsal, "remember", remember)
    diverse_run(tmp_path / "two", steps=4, resume=str(tmp_path / "two"))
    assert not drawn, f"the reference draws {drawn} anew: rehearsal has forgotten its pictures"
    assert_equal_runs(tmp_path / "two", tmp_path / "whole")
