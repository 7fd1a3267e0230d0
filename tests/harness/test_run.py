"""The wiring around the loop: what harness/run.py and harness/processes.py hand to `argrpo.train`,
and whom they evaluate.

One tiny run is watched from outside; each test looks at one thing of it.
"""

import copy
import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from conftest import (
    Blocks,
    Spy,
    brightness,
    read_metrics,
    same,
    tiny_model,
    trained_weights,
    weights,
)

import argrpo
import harness.run
import toy
from argrpo import Prompts
from diversity import DiversityBonus, Pixels, Rehearsal
from harness import before_after, choices, processes
from harness.before_after import Watched
from reward import RewardSet
from train_c2i import C2iSettings

REWARDS = RewardSet({"mine": (lambda images, texts: brightness(images, texts)[0], 1.0)})


def tiny_settings(folder, **changes):
    return C2iSettings(out=str(folder / "run"), reward="mine", eval_images=8, micro_batch=5,
                       **changes)


def run_stub(monkeypatch, folder, stub):
    """A tiny run without spread and bonus whose loop is the stub."""
    monkeypatch.setattr(argrpo, "train", stub)
    prompts = Prompts(["a", "b"], torch.arange(2))
    parts = tiny_model(block_size=4, n_layer=1), Blocks(), prompts, prompts, REWARDS, Watched()
    harness.run.run(tiny_settings(folder), lambda settings, device: parts)


class WatchedRun:
    """A tiny run with rehearsal and bonus, trained on some prompts and evaluated on others."""

    def __init__(self, folder, patch):
        torch.manual_seed(0)
        self.model, self.events = tiny_model(block_size=4, n_layer=1), []
        self.spreads = []                        # (number of images, spread) of each evaluation
        self.start = copy.deepcopy(self.model)
        self.prompts = Prompts(["train 0", "train 1", "train 2"], torch.arange(3))
        self.eval_prompts = Prompts(["held out 3", "held out 4"], torch.arange(3, 5))
        self.settings = tiny_settings(
            folder, steps=3, prompts_per_step=2, group_size=4, cfg_scale=2.0, temperature=1.3,
            save_every=1, lr=0.05, warmup_steps=1, rehearsal=0.5, rehearsal_groups=2,
            rehearsal_steps=2, rehearsal_lr_factor=4.0, diversity_bonus=0.3, eval_cfg_scales="3")
        self.watch(patch, harness.run, "evaluate_all")
        self.watch(patch, before_after, "evaluate_spread")
        self.watch(patch, argrpo, "train")
        self.watch(patch, harness.run, "mind_arrays")
        patch.setattr(harness.run, "show", lambda *given: None)
        parts = (self.model, Blocks(), self.prompts, self.eval_prompts, REWARDS,
                 Watched(self.measure, self.spread))
        self.summary = harness.run.run(self.settings, lambda settings, device: parts)

    def watch(self, patch, module, name):
        function = getattr(module, name)

        def watched(model, *args, **how):
            self.events.append((name, weights(model), model, args, how))
            return function(model, *args, **how)
        patch.setattr(module, name, watched)

    def measure(self, images, texts):
        return {"measured": images.mean(dim=(1, 2, 3))}

    def spread(self, images, texts):
        spread = images.std().item()
        if len(images) > 8:                      # an evaluation, and not a step's own pictures
            self.spreads.append((len(images), spread))
        return {"distance": spread}

    def called(self, name):
        return [event for event in self.events if event[0] == name]


@pytest.fixture(scope="module")
def watched(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        return WatchedRun(tmp_path_factory.mktemp("watched"), patch)


def test_the_order_of_a_run(watched):
    names = [event[0] for event in watched.events]
    both = ["evaluate_all", "evaluate_spread"]
    assert names == [*both, "train", *both, "mind_arrays"], "evaluate, train, and evaluate again"


def test_before_is_the_untrained_model_and_after_the_trained_one(watched):
    for name in ("evaluate_all", "evaluate_spread"):
        (_, before, *_), (_, after, *_) = watched.called(name)
        same(before, weights(watched.start), f"{name}: before training, the pretrained weights")
        same(after, weights(watched.model), f"{name}: after training, the trained weights")
    assert not torch.equal(weights(watched.start), weights(watched.model))
    assert watched.summary["before"]["reward"] != watched.summary["after"]["reward"]


def test_the_closer_look_goes_from_the_pretrained_model_to_the_trained_one(watched):
    (_, before, _, (after, *_), _), = watched.called("mind_arrays")
    same(before, weights(watched.start), "where the policy changed its mind: from this")
    assert after is watched.model, "to this"


def test_d_is_the_spread_after_over_the_spread_before(watched):
    (_, before), (_, after) = watched.spreads
    kept = watched.summary["after"]["diversity_kept/distance"]
    assert before != after and kept == pytest.approx(after / before), "after over before"
    assert "diversity_kept" not in watched.summary["before"]


def test_it_trains_on_its_prompts_and_evaluates_on_the_others(watched):
    (_, _, _, (reference, vq, prompts, *_), _), = watched.called("train")
    assert prompts is watched.prompts, "training uses the training prompts"
    for name in ("evaluate_all", "evaluate_spread"):
        for _, _, _, given, _ in watched.called(name):
            assert given[1] is watched.eval_prompts, f"{name} uses the evaluation's prompts"


def test_the_reference_is_a_frozen_copy_of_the_start(watched):
    (_, _, model, (reference, *_), how), = watched.called("train")
    assert model is watched.model, "the model itself is trained"
    assert reference is not model, "the reference is a copy"
    same(weights(reference), weights(watched.start), "the reference keeps the pretrained weights")
    assert not any(p.requires_grad for p in reference.parameters()), "and is frozen"
    assert all(p.requires_grad for p in model.parameters()), "while the model is not"


def test_the_seams_get_their_settings(watched):
    (_, _, model, (reference, vq, prompts, reward_fn, settings, *_), how), = watched.called("train")
    assert settings is watched.settings and how["shard"] == (0, 1)
    assert how["sync"] is processes.average_gradients
    bonus, rehearsal = how["advantage_fn"], how["extra_loss"]
    assert isinstance(bonus, DiversityBonus) and bonus.rehearsal is rehearsal
    assert bonus.weight == 0.3 and isinstance(rehearsal.features, Pixels)
    assert isinstance(rehearsal, Rehearsal) and rehearsal.config is settings
    assert (rehearsal.weight, rehearsal.groups) == (0.5, 2), "rehearsal, rehearsal_groups"
    assert rehearsal.prompts is watched.prompts, "what is rehearsed are the training prompts"
    same(weights(rehearsal.reference), weights(watched.start), "the pretrained model is rehearsed")
    assert how["sampler"](model) is model, "a small model draws its own rollouts"


def test_rehearsal_alone_comes_before_the_first_rollout(watched):
    """Two steps of it, which no reward, no advantage and no rollout have a part in."""
    (_, at_first, _, (reference, *_, optimizer, _), how), = watched.called("train")
    model, rehearsal = copy.deepcopy(watched.start), how["extra_loss"]
    for _ in rehearsal.alone(model, argrpo.make_optimizer(model, watched.settings), 2, 4.0):
        pass
    assert not torch.equal(at_first, weights(watched.start))
    same(at_first, weights(model), "the policy that draws first has rehearsed")
    assert all(state["step"] == 2 + 3 for state in optimizer.state.values()), "one optimizer"


def test_the_loop_makes_the_optimizer_that_the_settings_describe(watched):
    (_, _, _, (*_, optimizer, first_step), _), = watched.called("train")
    assert first_step == 0 and optimizer.defaults["lr"] == 0.05
    trained = {id(p) for group in optimizer.param_groups for p in group["params"]}
    assert trained == {id(p) for p in watched.model.parameters()}, "of the model, not of a copy"


def test_the_same_is_measured_before_and_after(watched):
    first, second = watched.called("evaluate_all")
    given, later = first[3], second[3]           # vq, prompts, rewards, settings, what is watched
    assert given[1:4] == later[1:4] and first[4] == second[4], "the same settings and rewards"
    assert given[4][:2] == later[4][:2], "the same measures"
    before, after = watched.summary["before"], watched.summary["after"]
    for scores in (before, after):
        assert scores["reward"] == scores["reward/mine"]
        assert scores["measured"] == pytest.approx(scores["reward"], rel=1e-5), "reported"
        assert set(scores["guidance"]) == {"3"}, "and the other guidance scales"
    assert "diversity_kept" not in before, "before training there is nothing to compare with"
    kept = after["diversity_kept/distance"]
    assert after["diversity_kept"] == pytest.approx(kept)


def test_every_step_is_logged_and_the_trained_weights_are_saved(watched):
    out = Path(watched.settings.out)
    lines = read_metrics(out)
    assert [line["step"] for line in lines] == [0, 1, 2]
    assert all(line["kl"] > 0 for line in lines[1:]), "the KL grows from 0"
    assert all(line["rehearsal"] > 0 and line["diversity"] >= 0 for line in lines)
    saved = trained_weights(out)
    for name, tensor in watched.model.state_dict().items():
        assert torch.equal(saved[name], tensor), "model.pt holds the trained weights"


def run_of_a_step(folder, monkeypatch, watched=None, **changes):
    """What a run of one step returns."""
    monkeypatch.setattr(harness.run, "show", lambda *given: None)
    prompts = Prompts(["a", "b"], torch.arange(2))
    parts = (tiny_model(block_size=4, n_layer=1), Blocks(), prompts, prompts, REWARDS,
             watched or Watched())
    settings = C2iSettings(**dict(out=str(folder), reward="mine", eval_images=8, steps=1,
                                  prompts_per_step=2, group_size=4) | changes)
    return harness.run.run(settings, lambda settings, device: parts)


def test_d_is_that_to_the_spread_that_is_known_before_and_after(tmp_path, monkeypatch):
    """The shipped toy's, of many pictures, and not the run's own few before training."""
    watched = Watched(spread=lambda images, texts: {"size": 0.5}, base_spread={"size": 2.0})
    summary = run_of_a_step(tmp_path / "run", monkeypatch, watched)
    assert summary["before"]["diversity_kept"] == 0.5 / 2, "before training"
    assert summary["after"]["diversity_kept"] == 0.5 / 2, "and after, to the same spread"


def test_loggers_get_the_evaluation_before_and_the_one_after(tmp_path, monkeypatch):
    logged = Spy(harness.run.Logs.numbers)
    monkeypatch.setattr(harness.run.Logs, "numbers", lambda *given: logged(*given))
    summary = run_of_a_step(tmp_path / "run", monkeypatch)
    _, *first = logged.calls[0][0]
    _, *last = logged.calls[-1][0]
    assert first == [0, {"evaluation": summary["before"]}]
    assert last == [1, {"evaluation": summary["after"]}]


def test_the_largest_ratio_is_that_of_all_processes(tmp_path, monkeypatch):
    averaged = Spy(processes.average_over_processes)
    monkeypatch.setattr(processes, "average_over_processes", averaged)
    run_of_a_step(tmp_path / "run", monkeypatch)
    (_, maximum, _), _ = averaged.calls[0]
    assert {"ratio_max", "mismatch"} <= set(maximum), "not the mean of each one's largest"


def test_the_sizes_that_were_chosen_are_written_down(tmp_path, monkeypatch):
    """For what is drawn depends on them, and --resume goes by config.json."""
    run_of_a_step(tmp_path / "run", monkeypatch, rollout_prompts=None, micro_batch=None)
    settings = json.loads((tmp_path / "run" / "config.json").read_text())["settings"]
    assert (settings["rollout_prompts"], settings["micro_batch"]) == (2, 256)


def test_the_parts_of_a_step_make_up_its_seconds(watched):
    parts = [f"seconds_{part}" for part in ("rollout", "reward", "reference", "update")]
    for line in (Path(watched.settings.out) / "metrics.jsonl").read_text().splitlines():
        step = json.loads(line)
        assert min(step[part] for part in parts) >= 0, "each step begins with a fresh stopwatch"
        assert step["seconds"] == pytest.approx(sum(step[part] for part in parts))


# --- the plain recipe --------------------------------------------------------------------------

def test_without_recipe_the_plain_method_is_run(tmp_path, monkeypatch):
    """Neither bonus nor rehearsal, unless a setting asks for them."""
    seen = []

    def train(*args, **how):
        seen.append(how)
        raise KeyboardInterrupt
    with pytest.raises(KeyboardInterrupt):
        run_stub(monkeypatch, tmp_path, train)
    assert seen[0]["advantage_fn"] is seen[0]["extra_loss"] is None, "the paper's algorithm"
    assert "loss_fn" not in seen[0]


# --- several processes, played by one ----------------------------------------------------------

@pytest.fixture
def second_of_two(monkeypatch):
    """This process is number 1 of 2.  The other one gives what `other` holds: a function of what
    this one gives."""
    other = {"gradient": lambda x: 3 * x, "object": lambda value: value}

    def all_gather_object(answers, value):
        answers[:] = [other["object"](value), value]
    monkeypatch.setattr(dist, "is_initialized", lambda: True)
    monkeypatch.setattr(dist, "get_rank", lambda: 1)
    monkeypatch.setattr(dist, "get_world_size", lambda: 2)
    monkeypatch.setattr(dist, "all_reduce", lambda x, **how: x.add_(other["gradient"](x)))
    monkeypatch.setattr(dist, "all_gather_object", all_gather_object)
    monkeypatch.setattr(dist, "barrier", lambda: None)
    return other


LEAVES = """
import atexit, weakref
import torch, torch.distributed as dist
atexit.register(lambda: print(dist.is_initialized(), group() is not None))      # the last to run
from harness import processes
processes.pick_device("cpu")
group = weakref.ref(dist.group.WORLD)
torch.optim.AdamW([torch.ones(2, requires_grad=True)])       # imports what could keep the group
print(dist.is_initialized(), group() is not None)
"""


@pytest.mark.slow
def test_a_process_leaves_the_others_before_python_ends():
    """gloo's threads abort a process, now and then, if they outlive the interpreter.  They live as
    long as anybody holds the group."""
    alone = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1",
             "MASTER_PORT": "0"}
    done = subprocess.run([sys.executable, "-c", LEAVES], capture_output=True, text=True,
                          env=os.environ | alone, cwd=Path(__file__).parents[2])
    assert done.returncode == 0, done.stderr
    assert done.stdout.split("\n")[:2] == ["True True", "False False"], "left, and gone"


def test_gradients_are_averaged_over_processes(second_of_two):
    """This one has 1, the other 3: the mean is 2, and a parameter without gradient is left out."""
    model = torch.nn.ParameterList([torch.zeros(2), torch.zeros(2)])
    model[0].grad = torch.ones(2)
    processes.average_gradients(model)
    assert model[0].grad.tolist() == [2.0, 2.0], "the mean of all processes, not the sum"
    assert model[1].grad is None


def test_alone_gradients_stay(monkeypatch):
    model = torch.nn.ParameterList([torch.zeros(2)])
    model[0].grad = torch.ones(2)
    processes.average_gradients(model)
    assert model[0].grad.tolist() == [1.0, 1.0]
    assert processes.rank_and_size() == (0, 1)


def test_metrics_are_averaged_and_largest_ones_kept(second_of_two):
    second_of_two["object"] = lambda value: value and {"reward": 0.0, "ratio_max": 5.0, "d": None}
    mine = {"reward": 1.0, "ratio_max": 2.0, "d": 0.5}
    ours = processes.average_over_processes(mine, maximum=("ratio_max",))
    assert ours == {"reward": 0.5, "ratio_max": 5.0, "d": 0.5}, (
        "means, but the largest of the names in maximum; None is left out")
    assert processes.rank_and_size() == (1, 2)


def test_a_mean_counts_as_many_pictures_as_it_is_over(second_of_two):
    """The other process could judge one picture, this one three."""
    answers = [{"reward": 0.0}, {"reward": 1}]
    second_of_two["object"] = lambda value: answers.pop(0)
    ours = processes.average_over_processes({"reward": 1.0}, known={"reward": 3})
    assert ours == {"reward": (1 * 0.0 + 3 * 1.0) / 4}, "not the mean of the two means"


@pytest.mark.parametrize("changes", [
    {"temperature": 0.9}, {"cfg_scale": 2.0}, {"gpt_ckpt": "mine.pt"}, {"vq_ckpt": "mine.pt"},
    {"from_scratch": True}, {"preset": "B-256"}])
def test_the_shipped_spread_is_that_of_the_shipped_models_policy(changes):
    """Another model, temperature or guidance has another."""
    settings = C2iSettings(preset="toy")
    assert choices.shipped_spread(settings, toy.CLASSES) is not None
    settings = dataclasses.replace(settings, **changes)
    assert choices.shipped_spread(settings, toy.CLASSES) is None


@pytest.mark.parametrize("rank", [0, 1])
def test_one_of_several_processes_pretrains(rank, tmp_path, monkeypatch):
    """The others wait, and read what it has written."""
    events = []
    monkeypatch.setattr(choices, "rank_and_size", lambda: (rank, 2))
    monkeypatch.setattr(choices, "pretrain_toy", lambda folder, seed: events.append(seed))
    monkeypatch.setattr(choices, "wait_for_all", lambda: events.append("waited"))
    monkeypatch.setattr(choices, "load_models", lambda *given: events.append("loaded"))
    choices.starting_models(C2iSettings(preset="toy", from_scratch=True, out=str(tmp_path), seed=7))
    assert events == [*[7][rank:], "waited", "loaded"], "with the run's seed"


def test_each_process_is_told_its_share(second_of_two, monkeypatch, tmp_path):
    """(rank, size) goes to the loop, and only the first process evaluates and writes."""
    evaluate, seen = Spy(harness.run.evaluate_all), []
    monkeypatch.setattr(harness.run, "evaluate_all", evaluate)

    def train(*args, **how):
        seen.append(how)
        raise KeyboardInterrupt
    with pytest.raises(KeyboardInterrupt):
        run_stub(monkeypatch, tmp_path, train)
    assert seen[0]["shard"] == (1, 2), "process 1 of 2 takes the second share of each step"
    assert not evaluate.calls, "the second process does not evaluate"
    assert not (tmp_path / "run").exists(), "and writes nothing"
