"""The reward signature, the registry, weights, and rewards from a user's own file."""

import importlib
import io
import json
import os
import runpy
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from PIL import Image

import reward
import train_c2i
import train_t2i
from reward import MODULES, REGISTRY, RewardSet, build_rewards, items_of, register

CPU = torch.device("cpu")
ROOT = Path(__file__).parents[2]
IMAGES = torch.rand(4, 3, 24, 24)
PROMPTS = ["one red circle"] * 4


# --- rewards of a few lines --------------------------------------------------------------------

@pytest.mark.parametrize("name", ["shapes", "jpeg", "jpeg_large", "brightness", "contrast"])
def test_rewards_without_a_model_score_a_batch(name):
    total, parts = build_rewards(name, CPU)(IMAGES, PROMPTS)
    assert total.shape == (4,) and total.dtype == torch.float32 and list(parts) == [name]
    torch.testing.assert_close(build_rewards(name, CPU)(IMAGES[2:3], PROMPTS[2:3])[0], total[2:3])


def test_jpeg_prefers_the_plain_picture():
    plain, noise = torch.full((1, 3, 24, 24), 0.5), torch.rand(1, 3, 24, 24)
    small, large = build_rewards("jpeg", CPU), build_rewards("jpeg_large", CPU)
    assert small(plain, ["a"])[0] > small(noise, ["a"])[0]
    torch.testing.assert_close(large(noise, ["a"])[0], -small(noise, ["a"])[0])


def test_jpeg_counts_the_bytes_of_torchvisions_picture():
    from torchvision.transforms.functional import to_pil_image
    sizes = []
    for image in IMAGES:
        file = io.BytesIO()
        to_pil_image(image.mul(255).round().byte()).save(file, format="jpeg", quality=95)
        sizes.append(len(file.getvalue()))
    assert (1000 * reward.jpeg_large(IMAGES, [])).round().int().tolist() == sizes


def test_contrast_by_hand():
    half = torch.zeros(1, 3, 2, 2)
    half[..., 0] = 1                             # std of (1, 0, 1, 0), unbiased: 1 / sqrt(3)
    contrast, _ = build_rewards("contrast", CPU)(half, ["a"])
    torch.testing.assert_close(contrast, torch.tensor([3 ** -0.5]))


# --- several rewards, added up -----------------------------------------------------------------

def test_weighted_sum_of_unweighted_parts():
    total, parts = build_rewards("brightness:2, contrast:-0.5", CPU)(IMAGES, PROMPTS)
    torch.testing.assert_close(parts["brightness"], IMAGES.mean(dim=(1, 2, 3)))
    torch.testing.assert_close(total, 2 * parts["brightness"] - 0.5 * parts["contrast"])


def test_a_reward_of_weight_0_is_reported_and_counts_nothing():
    total, parts = build_rewards("brightness:0, contrast", CPU)(IMAGES, PROMPTS)
    assert set(parts) == {"brightness", "contrast"}
    torch.testing.assert_close(total, parts["contrast"])


@pytest.mark.parametrize("scores, message", [
    (torch.zeros(4, 1),
     r"'mine' must return a tensor of shape \(4,\), one score per image, not \(4, 1\)"),
    (torch.zeros(3), r"not \(3,\)"),
    ([0.0] * 4, "not list"),
    (torch.zeros(4).numpy(), "not ndarray"),
    (torch.tensor(0.0), r"not \(\)"),
    (torch.zeros(4, dtype=torch.complex64), "not complex numbers"),
    (torch.full((4,), 1e300, dtype=torch.float64), "gave inf to image 0"),
    (torch.tensor([0.0, 1.0, float("nan"), 0.0]), "gave nan to image 2, prompt 'one red circle'"),
    (torch.tensor([0.0, float("inf"), 0.0, 0.0]), "gave inf to image 1"),
])
def test_scores_that_are_not_one_finite_number_per_image(scores, message):
    with pytest.raises(ValueError, match=message):
        RewardSet({"mine": (lambda images, prompts: scores, 1.0)})(IMAGES, PROMPTS)


@pytest.mark.parametrize("scores", [
    torch.tensor([0.0, 1.0, 0.0, 1.0], dtype=torch.float64), torch.tensor([0, 1, 0, 1]),
    torch.tensor([False, True, False, True]), torch.tensor([0.0, 1.0, 0.0, 1.0]).half(),
    torch.tensor([0.0, 1.0, 0.0, 1.0]).requires_grad_(),
], ids=["float64", "int", "bool", "half", "requires_grad"])
def test_any_real_numbers_become_float32(scores):
    total, parts = RewardSet({"mine": (lambda images, prompts: scores, 2.0)})(IMAGES, PROMPTS)
    assert total.tolist() == [0, 2, 0, 2] and parts["mine"].tolist() == [0, 1, 0, 1]
    assert total.dtype == parts["mine"].dtype == torch.float32 and not total.requires_grad


@pytest.mark.parametrize("may_miss", [False, True])
def test_only_a_reward_that_may_miss_may_give_nan(may_miss):
    def shy(images, prompts):
        return torch.tensor([float("nan"), 1.0])

    shy.may_miss = may_miss
    rewards = RewardSet({"shy": (shy, 1.0), "one": (lambda images, prompts: torch.ones(2), 2.0)})
    if may_miss:                                 # a part that is missing makes the total missing
        total, parts = rewards(IMAGES[:2], PROMPTS[:2])
        assert total.isnan().tolist() == [True, False] and total[1] == 3
        assert parts["one"].tolist() == [1.0, 1.0]
    else:
        with pytest.raises(ValueError, match="reward 'shy' gave nan to image 0"):
            rewards(IMAGES[:2], PROMPTS[:2])


# --- prompts that a reward cannot judge, and rewards that fail ----------------------------------

QUOTING = """
def quoting(images, prompts):
    return images.mean(dim=(1, 2, 3))

def check(prompts):
    for prompt in prompts:
        if '"' not in prompt:
            raise ValueError(f"nothing is quoted in {prompt!r}")
quoting.check_prompts = check

def broken(images, prompts):
    return images.mean(dim=(1, 2, 3))

broken.check_prompts = lambda prompts: {}["missing"]

class Moody:
    def __init__(self, device):
        self.device = device

    def __call__(self, images, prompts):
        lengths = [len(prompt) for prompt in prompts]
        return images.new_tensor(lengths).view(2, 3)
"""


@pytest.fixture
def mine(tmp_path):
    (tmp_path / "mine.py").write_text(QUOTING)
    return tmp_path / "mine.py"


def test_prompts_that_a_reward_cannot_judge_are_counted_and_named(mine):
    rewards = build_rewards(f"brightness,{mine}:quoting", CPU)
    rewards.check_prompts(['"one"', '"two"'])
    with pytest.raises(reward.BadReward) as caught:
        rewards.check_prompts(["a", '"one"', "b", "c", "d", "a"])
    assert str(caught.value) == ("reward 'quoting' cannot judge 4 of 5 prompts: 'a', 'b', 'c' and "
                                 "1 more; nothing is quoted in 'a'")


def test_prompts_that_are_only_refused_together_are_all_named():
    def check(prompts):
        if len(prompts) > 1:
            raise ValueError("one prompt at a time")

    picky = SimpleNamespace(check_prompts=check)
    with pytest.raises(reward.BadReward, match="'a', 'b'; one prompt at a time"):
        RewardSet({"picky": (picky, 1.0)}).check_prompts(["a", "b"])


def test_an_error_in_a_check_of_prompts_is_located(mine):
    message = "'broken' cannot judge 2 of 2 .*KeyError: 'missing' .*mine.py, line 14"
    with pytest.raises(reward.BadReward, match=message):
        build_rewards(f"{mine}:broken", CPU).check_prompts(["a", "b"])


def test_the_toys_verifier_refuses_what_the_toy_has_not():
    verifier = build_rewards("shapes", CPU)
    verifier.check_prompts(["one red circle", "a red circle above a blue square"])
    message = "'shapes' cannot judge 1 of 2 prompts: 'an otter'; the toy cannot draw"
    with pytest.raises(reward.BadReward, match=message):
        verifier.check_prompts(["one red circle", "an otter"])


@pytest.mark.parametrize("script, options", [
    (train_c2i, ["--classes", "3,1"]),
    (train_t2i, ["--prompts", "captions.txt"]),
])
def test_all_prompts_of_a_run_are_checked_before_its_training(script, options, mine, monkeypatch,
                                                              capsys):
    monkeypatch.chdir(mine.parent)
    (mine.parent / "captions.txt").write_text('one "red" circle\none red square\none red circle\n')
    with pytest.raises(SystemExit) as stop:
        script.main(["--preset", "toy", "--reward", f"{mine}:quoting", "--out", "run", *options])
    error = capsys.readouterr().err
    assert stop.value.code == 2 and error.count("\n") == 1 and not Path("run").exists()
    assert "reward 'quoting' cannot judge 2 of " in error and "nothing is quoted in 'one " in error


def test_a_rewards_own_error_names_reward_prompts_file_and_line(mine):
    """The line is the user's, though it is torch that fails."""
    with pytest.raises(reward.BadReward) as caught:
        build_rewards(f"{mine}:Moody", CPU)(IMAGES, ["one", "two", "one", "three"])
    message = str(caught.value)
    assert message.startswith("reward 'Moody' failed for the prompts 'one', 'two', 'three': "
                              "RuntimeError: shape '[2, 3]' is invalid")
    assert message.endswith(f"({mine}, line 22)") and "\n" not in message
    assert isinstance(caught.value.__cause__, RuntimeError)              # with its traceback


def test_of_the_users_own_lines_the_innermost_is_named(tmp_path):
    file = tmp_path / "mine.py"
    file.write_text("def helper(images):\n    return images.no_such_thing\n\n"
                    "def f(images, prompts):\n    return helper(images)\n")
    with pytest.raises(reward.BadReward, match="no_such_thing.* line 2\\)"):
        build_rewards(f"{file}:f", CPU)(IMAGES, PROMPTS)


def test_running_out_of_memory_is_no_bad_reward():
    def hungry(images, prompts):
        raise torch.OutOfMemoryError("no room")

    with pytest.raises(torch.OutOfMemoryError):
        RewardSet({"hungry": (hungry, 1.0)})(IMAGES, PROMPTS)


# --- from a text to a RewardSet ----------------------------------------------------------------

def test_a_reward_from_the_users_own_file(tmp_path):
    file = tmp_path / "mine.py"
    file.write_text("""
def redness(images, prompts):
    red, green, blue = images.mean(dim=(2, 3)).unbind(dim=1)
    return red - (green + blue) / 2

class Words:
    def __init__(self, device):
        self.device = device
    def __call__(self, images, prompts):
        return images.new_tensor([len(prompt.split()) for prompt in prompts])
""")
    total, parts = build_rewards(f"{file}:redness:3,{file}:Words", CPU)(IMAGES, PROMPTS)
    assert list(parts) == ["redness", "Words"]
    torch.testing.assert_close(parts["Words"], torch.full((4,), 3.0))
    torch.testing.assert_close(total, 3 * parts["redness"] + 3)
    with pytest.raises(ValueError, match="no function 'blueness'"):
        build_rewards(f"{file}:blueness", CPU)


@pytest.mark.parametrize("spec, message", [
    ("", "no reward given: choose with --reward from aesthetic"),
    ("brightness,", "cannot read ''"),
    ("brightness,,jpeg", "cannot read ''"),
    ("brightness : 2", "cannot read 'brightness : 2'"),
    ("brightness:1:2", "cannot read 'brightness:1:2'"),
    ("brightness:", "finite number, not ''"),
    ("mine.py", "cannot read 'mine.py'"),
    ("jpeg:resnet50", "finite number, not 'resnet50'"),
    ("nonsense", "unknown reward 'nonsense': there are aesthetic, brightness"),
    ("brightness:heavy", "weight of reward 'brightness' must be a finite number, not 'heavy'"),
    ("brightness:nan", "finite number, not 'nan'"),
    ("brightness,brightness:2", "named twice"),
    ("missing.py:f", "no such reward file: missing.py"),
])
def test_specs_that_cannot_be_understood(spec, message):
    with pytest.raises(ValueError, match=message):
        build_rewards(spec, CPU)


def test_the_papers_mixtures():
    eight = reward.PAPER.split(",")
    assert eight == ["clip", "clip_bin", "hpsv2", "hpsv2_bin", "maniqa",
                     "qwen_label", "qwen_fake", "qwen_weird"]
    for name in ("paper_c2i", "paper_t2i"):
        assert list(items_of(name)) == [(None, part, 1.0) for part in eight]
    assert set(eight) <= set(MODULES)
    lite = ("clip", "clip_bin", "hpsv2", "hpsv2_bin", "clip_iqa")
    assert list(items_of("paper_lite:0.5,jpeg")) == [
        *((None, part, 0.5) for part in lite), (None, "jpeg", 1.0)]


# --- names -------------------------------------------------------------------------------------

def test_registering_a_reward():
    @register("constant")
    def constant(device):
        return lambda images, prompts: torch.ones(len(prompts), device=device)

    try:
        assert build_rewards("constant:2", CPU)(IMAGES, PROMPTS)[0].tolist() == [2.0] * 4
        assert "constant" in reward.known_rewards()
    finally:
        del REGISTRY["constant"]


@pytest.mark.parametrize("name, file", [("jpeg", "reward.py"), ("ocr", "ocr.py")])
def test_a_name_is_taken_once_even_if_its_file_is_not_imported_yet(name, file, monkeypatch):
    monkeypatch.delitem(REGISTRY, "ocr", raising=False)
    with pytest.raises(ValueError, match=f"already a reward named '{name}', in .*{file}"):
        register(name)(lambda device: None)
    assert name == "jpeg" or name not in REGISTRY


def test_each_module_registers_the_rewards_that_the_table_promises():
    for name, module in MODULES.items():
        assert importlib.import_module(module).__name__ == REGISTRY[name].__module__, name


@pytest.mark.slow
def test_names_are_known_without_any_of_the_large_libraries():
    """Nor do the commands load one when they are imported."""
    code = ("import sys, reward\n"
            "print(reward.known_rewards())\n"
            "def loaded(*names):\n"
            "    return [name for name in names if name in sys.modules]\n"
            "heavy = 'torchvision', 'open_clip', 'transformers', 'timm', 'huggingface_hub'\n"
            "print(loaded(*heavy, 'PIL'))\n"
            "import train_c2i, train_t2i, sample, evaluate\n"
            "print(loaded(*heavy, 'matplotlib'))\n")
    output = subprocess.check_output([sys.executable, "-c", code], cwd=ROOT, text=True)
    names, by_reward, by_commands = output.splitlines()
    assert names.startswith("aesthetic, brightness, clip, ") and "paper_lite" in names
    assert "qwen_weird, shapes, and your own as file.py:function" in names
    assert by_reward == "[]" and by_commands == "[]"


def test_the_command_finds_what_a_file_of_the_users_registers(tmp_path, monkeypatch, capsys):
    """There is one registry, for `reward` is imported and never run."""
    file = tmp_path / "mine.py"
    file.write_text("""
import torch
from reward import register

def one(images, prompts):
    return torch.ones(len(prompts))

@register("two")
def two(device):
    return lambda images, prompts: torch.full((len(prompts),), 2.0)
""")
    picture = str(tmp_path / "grey.png")
    Image.new("RGB", (8, 8), "grey").save(picture)
    monkeypatch.delitem(sys.modules, "rewards.__main__", raising=False)
    monkeypatch.setattr(sys, "argv", ["rewards", "--reward", f"{file}:one,two", "--device", "cpu",
                                      picture])
    try:
        with pytest.raises(SystemExit) as stop:
            runpy.run_module("rewards", run_name="__main__")
    finally:
        REGISTRY.pop("two", None)
    assert stop.value.code == 0
    scores = json.loads(capsys.readouterr().out)
    assert scores == {"image": picture, "reward": 3, "one": 1, "two": 2}


# --- rewards that do what they should not ------------------------------------------------------

def darken(images, prompts):
    return images.sub_(0.1).mean(dim=(1, 2, 3))


def darken_by_numpy(images, prompts):            # torch does not see this write
    images.numpy()[:] = 0
    return images.mean(dim=(1, 2, 3))


def sort(images, prompts):
    prompts.sort()
    return images.mean(dim=(1, 2, 3))


@pytest.mark.parametrize("culprit", [darken, darken_by_numpy, sort])
def test_a_reward_that_changes_what_it_was_given_is_told_and_changes_nothing(culprit):
    images, prompts = torch.rand(3, 3, 4, 4), ["c", "b", "a"]
    before = images.clone()
    rewards = RewardSet({"good": (reward.brightness, 1.0), "culprit": (culprit, 1.0)})
    with pytest.raises(reward.BadReward, match="'culprit' changes the images in place, or its pro"):
        rewards(images, prompts)
    assert torch.equal(images, before) and prompts == ["c", "b", "a"], "what was given stays"


def test_scores_are_copied():
    """A reward that returns a part of its own buffer must not change scores of an earlier batch."""
    buffer = torch.zeros(4)

    def counts(images, prompts):
        return buffer.add_(1)[:len(prompts)]
    rewards = RewardSet({"counts": (counts, 1.0)})
    total, parts = rewards(torch.rand(2, 3, 4, 4), ["a", "b"])
    rewards(torch.rand(2, 3, 4, 4), ["a", "b"])
    assert total.tolist() == parts["counts"].tolist() == [1, 1]


def test_a_reward_with_trainable_parameters_keeps_no_graph():
    """A reward model that was not frozen: its scores are numbers, not a path for gradients, and it
    runs without remembering its activations."""
    def net(images, prompts):
        scores = scale * images.mean(dim=(1, 2, 3))
        assert not scores.requires_grad, "the reward's own pass keeps its graph"
        return scores

    scale = torch.nn.Parameter(torch.tensor(2.0))
    total, parts = RewardSet({"net": (net, 1.0)})(torch.rand(2, 3, 4, 4), ["a", "b"])
    assert not total.requires_grad and not parts["net"].requires_grad, "the scores keep a graph"


def test_what_is_not_the_rewards_fault_is_not_said_of_it():
    """NaN pictures, other numbers of prompts, weights too large for float32."""
    rewards = RewardSet({"level": (lambda images, prompts: torch.ones(len(prompts)), 1e39)})
    with pytest.raises(reward.BadReward, match="smaller weights"):
        rewards(torch.rand(2, 3, 4, 4), ["a", "b"])
    with pytest.raises(ValueError, match="2 images cannot have 1 prompts"):
        rewards(torch.rand(2, 3, 4, 4), ["a"])
    level = RewardSet({"level": (lambda images, prompts: torch.ones(len(prompts)), 1.0)})
    assert level(torch.full((2, 3, 4, 4), torch.nan), ["a", "b"])[0].tolist() == [1, 1]


def test_a_path_may_have_a_colon():
    """As on Windows."""
    assert list(items_of(r"C:\work\my_rewards.py:redness:0.5, jpeg")) == [
        (r"C:\work\my_rewards.py", "redness", 0.5), (None, "jpeg", 1.0)]


# --- files of the user's -----------------------------------------------------------------------

def written(folder, **files):
    for name, text in files.items():
        (folder / f"{name}.py").write_text(text)


def test_a_reward_file_that_was_edited_is_read_again(tmp_path):
    """As in a notebook, though it has as many letters as before."""
    path = tmp_path / "mine.py"
    for when, value in ((1, 3.0), (2, 4.0)):
        path.write_text(f"def f(images, prompts):\n    return images[:, 0, 0, 0] * 0 + {value}\n")
        os.utime(path, (when, when))
        total, _ = build_rewards(f"{path}:f", CPU)(IMAGES, PROMPTS)
        assert total.tolist() == [value] * 4


def test_a_reward_file_is_a_module_like_any_other(tmp_path):
    """Postponed annotations with a dataclass, an import of a neighbour; and it is loaded once."""
    written(tmp_path, neighbour="LEVEL = 3.0\n", mine="""\
from __future__ import annotations
from dataclasses import dataclass
import neighbour

@dataclass
class Level:
    device: str

    def __call__(self, images, prompts):
        return images.mean(dim=(1, 2, 3)) * 0 + neighbour.LEVEL

COUNT = []

def count(images, prompts):
    COUNT.append(1)
    return images.mean(dim=(1, 2, 3)) * 0 + len(COUNT)

def again(images, prompts):
    return count(images, prompts)
""")
    path = sys.path.copy()
    rewards = build_rewards(",".join(f"{tmp_path}/mine.py:{name}"
                                     for name in ("Level", "count", "again")), CPU)
    assert sys.path == path, "the folder is importable only while the file loads"
    _, parts = rewards(torch.rand(1, 3, 4, 4), ["a"])
    assert {name: part.item() for name, part in parts.items()} == {
        "Level": 3, "count": 1, "again": 2}, "one file, one module"


def test_neighbours_of_one_name_are_not_taken_for_each_other(tmp_path):
    """Python would give the second reward the first one's neighbour, and so wrong numbers."""
    for folder, level in (("a", 1), ("b", 2)):
        (tmp_path / folder).mkdir()
        written(tmp_path / folder, helpers=f"LEVEL = {level}\n", mine=(
            "import helpers\n\ndef score(images, prompts):\n"
            "    return images.mean(dim=(1, 2, 3)) * 0 + helpers.LEVEL\n"))
        written(tmp_path / folder, same=f"import helpers\nscore_{folder} = print\n")
    try:
        for name in ("mine.py:score", "same.py:score_a"):    # files of one folder share it
            build_rewards(f"{tmp_path}/a/{name}", CPU)
        [first] = build_rewards(f"{tmp_path}/a/mine.py:score", CPU)(IMAGES, PROMPTS)[1].values()
        assert first.tolist() == [1] * 4
        message = (rf"mine\.py imports {tmp_path}/b/helpers\.py, but another module of that name "
                   rf"is loaded, {tmp_path}/a/helpers\.py: rename one")
        with pytest.raises(reward.BadReward, match=message) as error:
            build_rewards(f"{tmp_path}/b/mine.py:score", CPU)
        assert "\n" not in str(error.value)
    finally:
        sys.modules.pop("helpers", None)


def test_a_neighbour_named_like_a_module_of_the_house_is_refused(tmp_path):
    """Also where it is imported later, inside a function."""
    written(tmp_path, reward="LEVEL = 1\n", mine=(
        "def score(images, prompts):\n    from reward import LEVEL\n"
        "    return images[:, 0, 0, 0] * LEVEL\n"))
    with pytest.raises(reward.BadReward, match=r"mine\.py imports .*reward\.py, but another"):
        build_rewards(f"{tmp_path}/mine.py:score", CPU)


@pytest.mark.parametrize("text, message", [
    ("def score(images, prompts)\n    return 1", r"SyntaxError: .*bad\.py, line 1"),
    ("x = 1\ny = z\n", r"NameError: name 'z' is not defined .*bad\.py, line 2"),
    ("import no_such_package\n", r"ModuleNotFoundError: .*no_such_package.*bad\.py, line 1"),
    ("\nclass score:\n    def __init__(self):\n        pass\n",
     r"'score' \(line 2\) cannot be made with a device as its only argument: TypeError"),
    ("class score:\n    def __init__(self, device):\n        1 / 0\n",
     r"ZeroDivisionError: division by zero .*bad\.py, line 3")])
def test_a_broken_reward_file_is_one_line_with_its_place(text, message, tmp_path):
    written(tmp_path, bad=text)
    with pytest.raises(ValueError, match=message) as error:
        build_rewards(f"{tmp_path}/bad.py:score", CPU)
    assert "\n" not in str(error.value)


def test_functions_of_one_name_in_two_files_are_two_rewards(tmp_path):
    for name, level in (("a", 1), ("b", 2)):
        written(tmp_path, **{name: "import torch\n\ndef jpeg(images, prompts):\n"
                                   f"    return torch.full((len(prompts),), {level}.0)\n"})
    a, b = tmp_path / "a.py", tmp_path / "b.py"
    total, parts = build_rewards(f"{a}:jpeg,{b}:jpeg:10,jpeg:0", CPU)(torch.rand(1, 3, 4, 4), ["x"])
    assert total.item() == 21 and list(parts) == [f"{a}:jpeg", f"{b}:jpeg", "jpeg"]
    with pytest.raises(ValueError, match="named twice"):
        build_rewards(f"{a}:jpeg,{a}:jpeg", CPU)


@pytest.mark.parametrize("text, message", [
    ("import sys\nsys.exit()\n", r"cannot be loaded: SystemExit: no message .*bad\.py, line 2"),
    ("class score:\n    def __init__(self, device):\n        exit(0)\n",
     r"'score' .*SystemExit: 0 .*bad\.py, line 3"),
    ("class score:\n    def __init__(self, device):\n        pass\n",
     r"'score' is no reward, called with \(images, prompts\): .*not a callable"),
    ("def score(images):\n    return images\n", "no reward.*: too many positional arguments"),
    ("def score(images, prompts, seed):\n    return images\n", "no reward.*argument: 'seed'"),
    ("score = 3\n", "has no function 'score'"),
    ("import torch\ntorch.set_grad_enabled(False)\n", "changes .* gradient mode for all"),
    ("import torch\ntorch.set_default_dtype(torch.float64)\n", "changes .* default dtype"),
    ("import os\nos.chdir('/')\n", "changes the working directory"),
])
def test_what_is_no_reward_is_refused_when_it_is_built(text, message, tmp_path):
    """Before models are loaded and pictures drawn; and no exit() ends a run as if all was well."""
    written(tmp_path, bad=text)
    shared = Path.cwd(), torch.get_default_dtype(), torch.is_grad_enabled()
    with pytest.raises(ValueError, match=message) as error:
        build_rewards(f"{tmp_path}/bad.py:score", CPU)
    assert "\n" not in str(error.value)
    assert shared == (Path.cwd(), torch.get_default_dtype(), torch.is_grad_enabled())


@pytest.mark.parametrize("name", ["reward", "entropy", "verified", "D"])
def test_a_reward_that_is_called_as_a_row_of_a_table_has_a_row_of_its_own(name, tmp_path):
    written(tmp_path, mine=f"def {name}(images, prompts):\n    return images.mean((1, 2, 3))\n")
    assert list(build_rewards(f"{tmp_path}/mine.py:{name}", CPU).rewards) == [
        f"{tmp_path}/mine.py:{name}"]


def test_a_reward_that_exits_is_a_bad_reward(tmp_path):
    written(tmp_path, bad="def score(images, prompts):\n    exit(0)\n"
                          "score.check_prompts = lambda prompts: exit(0)\n")
    rewards = build_rewards(f"{tmp_path}/bad.py:score", CPU)
    with pytest.raises(reward.BadReward, match=r"SystemExit: 0 .*bad\.py, line 2"):
        rewards(IMAGES, PROMPTS)
    with pytest.raises(reward.BadReward, match=r"SystemExit: 0 .*bad\.py, line 3"):
        rewards.check_prompts(PROMPTS)


@pytest.mark.parametrize("signature", ["images, prompts", "images, prompts, scale=1", "*arguments"])
def test_a_reward_may_take_more_than_images_and_prompts(signature, tmp_path):
    written(tmp_path, mine=f"import torch\ndef score({signature}):\n    return torch.ones(4)\n")
    assert build_rewards(f"{tmp_path}/mine.py:score", CPU)(IMAGES, PROMPTS)[0].tolist() == [1] * 4


def test_compiled_code_that_does_not_say_what_it_takes_is_a_reward(monkeypatch):
    monkeypatch.setitem(REGISTRY, "compiled", lambda device: min)       # has no signature
    assert list(build_rewards("compiled", CPU).rewards) == ["compiled"]


@pytest.mark.parametrize("name", ["random", "reward", "torch", "toy"])
def test_a_reward_file_may_be_named_like_another_module(name, tmp_path):
    import random
    written(tmp_path, **{name: "import random\nimport torch\nimport reward\n"
                               "def score(images, prompts):\n"
                               "    assert random.random() < 1 and reward.build_rewards\n"
                               "    return torch.ones(len(prompts))\n"})
    assert build_rewards(f"{tmp_path}/{name}.py:score", CPU)(IMAGES, PROMPTS)[0].sum() == 4
    assert sys.modules["reward"] is reward and sys.modules["random"] is random
    assert sys.modules["torch"] is torch


BRIGHT = "NAME = 'caf\u00e9'\ndef score(images, prompts):\n    return images.mean(dim=(1, 2, 3))\n"


@pytest.mark.parametrize("first, encoding", [
    ("", "utf-8"), ("", "utf-8-sig"), ("# coding: latin-1\n", "latin-1")])
def test_encodings_of_a_reward_file(first, encoding, tmp_path):
    """A byte-order mark does no harm, and a file may say what it is."""
    (tmp_path / "mine.py").write_bytes((first + BRIGHT).encode(encoding))
    total, _ = build_rewards(f"{tmp_path}/mine.py:score", CPU)(IMAGES, PROMPTS)
    torch.testing.assert_close(total, IMAGES.mean(dim=(1, 2, 3)))


@pytest.mark.parametrize("encoding", ["latin-1", "utf-16"])
def test_a_reward_file_in_another_encoding_is_refused_in_one_line(encoding, tmp_path):
    (tmp_path / "mine.py").write_bytes(BRIGHT.encode(encoding))
    with pytest.raises(ValueError, match=r"mine\.py cannot be loaded: \w+: ") as error:
        build_rewards(f"{tmp_path}/mine.py:score", CPU)
    assert "\n" not in str(error.value) and "reward.py" not in str(error.value)


def test_a_path_may_begin_with_the_home_folder(tmp_path, monkeypatch):
    """A shell writes it out only at the beginning of a word."""
    monkeypatch.setenv("HOME", str(tmp_path))
    written(tmp_path, mine=BRIGHT)
    assert list(build_rewards("jpeg,~/mine.py:score", CPU).rewards) == ["jpeg", "score"]


def test_a_reward_file_of_windows_in_a_folder_with_spaces_behind_a_link(tmp_path):
    folder = tmp_path / "my own rewards"
    folder.mkdir()
    (folder / "mine.py").write_bytes(b"\xef\xbb\xbf" + BRIGHT.replace("\n", "\r\n").encode())
    (tmp_path / "link.py").symlink_to(folder / "mine.py")
    for path in (folder / "mine.py", tmp_path / "link.py"):
        total, _ = build_rewards(f" {path}:score:2 , jpeg:0", CPU)(IMAGES, PROMPTS)
        torch.testing.assert_close(total, 2 * IMAGES.mean(dim=(1, 2, 3)))


def test_a_folder_is_no_reward_file(tmp_path):
    (tmp_path / "mine.py").mkdir()
    with pytest.raises(ValueError, match="no such reward file"):
        build_rewards(f"{tmp_path}/mine.py:score", CPU)
