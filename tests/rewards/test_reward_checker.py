"""The command `python -m rewards`: scoring pictures, and examining a reward."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from reward import RewardSet
from rewards import checker
from rewards.__main__ import main, read_picture
from rewards.checker import scale

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def pictures():
    return checker.toy_pictures()


@pytest.fixture
def drawn_once(pictures, monkeypatch):
    """Examinations of this file share the toy's pictures, which take a while to draw."""
    images, prompts = pictures
    monkeypatch.setattr(checker, "toy_pictures", lambda: (images.clone(), prompts))


def test_scoring_pictures_from_the_command_line(capsys):
    picture = str(ROOT / "docs" / "toy_curves.png")
    assert main(["--reward", "brightness:2,contrast", "--device", "cpu", picture]) == 0
    line = json.loads(capsys.readouterr().out)
    assert line["image"] == picture
    assert line["reward"] == pytest.approx(2 * line["brightness"] + line["contrast"])


@pytest.mark.parametrize("spec, picture, message", [
    ("beauty", "docs/toy_curves.png", "unknown reward 'beauty'"),
    ("jpeg", "nowhere.png", "nowhere.png"),
])
def test_errors_are_one_line(spec, picture, message, capsys):
    assert main(["--reward", spec, picture]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and message in error and error.count("\n") == 1


def ramp(dtype, white, mode=None):
    """A grey picture 4 pixels high and 6 wide, from black to white."""
    numbers = (np.linspace(0, 1, 24).reshape(4, 6) * white).astype(dtype)
    return Image.fromarray(numbers) if mode is None else Image.fromarray(numbers).convert(mode)


@pytest.mark.parametrize("name, picture", {
    "a.png": ramp(np.uint8, 255), "b.png": ramp(np.uint16, 65535), "c.tiff": ramp(">u2", 65535),
    "d.tiff": ramp(np.uint16, 65535), "e.tiff": ramp(np.int32, 65535),
    "f.tiff": ramp(np.float32, 1), "i.pgm": ramp(np.uint16, 65535),
    "j.tiff": ramp(np.uint8, 255, "CMYK"), "k.gif": ramp(np.uint8, 255, "P"),
}.items())
def test_a_picture_of_any_depth_is_from_black_to_white(name, picture, tmp_path):
    picture.save(tmp_path / name)
    image = read_picture(tmp_path / name)
    assert image.shape == (3, 4, 6) and image.dtype == torch.float32
    assert (image[1] - torch.linspace(0, 1, 24).view(4, 6)).abs().max() < 0.005


@pytest.mark.parametrize("name", ["a.jpg", "a.png", "a.webp", "a.tiff"])
@pytest.mark.parametrize("mode", ["RGB", "L"])
def test_a_turned_picture_is_turned_back(name, mode, tmp_path):
    """Orientation 6: to be turned by a quarter to the right, so that the left side is on top."""
    picture = Image.new(mode, (32, 16), "white")
    picture.paste("black", (0, 0, 16, 16))
    exif = Image.Exif()
    exif[0x0112] = 6
    picture.save(tmp_path / name, exif=exif)
    image = read_picture(tmp_path / name)
    assert image.shape == (3, 32, 16)
    assert image[:, :12].max() < 0.1 and image[:, -12:].min() > 0.9


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P", "L", "RGB"])
def test_what_is_transparent_is_white(mode, tmp_path):
    """Its left half: by alpha, or because a grey, a colour or a place of the palette is."""
    picture, how = Image.new("RGB", (8, 4), "#330000" if mode in ("P", "RGB") else "#333333"), {}
    picture.paste("black", (0, 0, 4, 4))
    if mode.endswith("A"):
        picture.putalpha(Image.new("L", (8, 4), 255))
        picture.paste((0, 0, 0, 0), (0, 0, 4, 4))
        picture = picture.convert(mode)
    else:
        picture = picture.convert(mode)
        how = {"transparency": picture.getpixel((0, 0))}
    picture.save(tmp_path / "a.png", **how)
    image = read_picture(tmp_path / "a.png")
    assert (image[..., :4] == 1).all() and image[..., 4:].max() < 0.21


def test_half_transparent_is_half_white(tmp_path):
    Image.new("RGBA", (2, 2), (0, 0, 0, 51)).save(tmp_path / "a.webp", lossless=True)
    assert read_picture(tmp_path / "a.webp").mean().item() == pytest.approx(0.8, abs=0.005)


def animation(path):
    frames = [Image.new("L", (4, 4), grey) for grey in (0, 128, 255)]
    frames[0].save(path, save_all=True, append_images=frames[1:])


@pytest.mark.parametrize("name, write, message", [
    ("a.gif", animation, "it holds 3 pictures"), ("a.png", animation, "it holds 3 pictures"),
    ("a.webp", animation, "it holds 3 pictures"), ("a.tiff", animation, "it holds 3 pictures"),
    ("b.tiff", ramp(np.float32, 255).save, "its numbers are not all from 0 to 1: save it with 8"),
    ("c.tiff", ramp(np.float32, -1).save, "its numbers are not all from 0 to 1"),
    ("d.tiff", ramp(np.float32, np.nan).save, "its numbers are not all from 0 to 1"),
    ("e.tiff", ramp(np.int32, 2 ** 31 - 1).save, "its numbers are not all from 0 to 65535"),
    ("f.png", lambda path: path.write_text("no picture"), "cannot identify"),
])
def test_what_is_not_one_picture_is_refused_in_a_line(name, write, message, tmp_path, capsys):
    """Before anything is scored."""
    good, bad = str(ROOT / "docs" / "toy_curves.png"), tmp_path / name
    write(bad)
    assert main(["--reward", "jpeg", "--device", "cpu", good, str(bad)]) == 2
    out, error = capsys.readouterr()
    assert not out and error.startswith(f"error: cannot read the picture {bad}: ")
    assert message in error and error.count("\n") == 1


def test_a_cut_picture_is_named(tmp_path, capsys):
    path = tmp_path / "cut.png"
    path.write_bytes((ROOT / "docs" / "toy_curves.png").read_bytes()[:5000])
    assert main(["--reward", "jpeg", "--device", "cpu", str(path)]) == 2
    assert f"cannot read the picture {path}: " in capsys.readouterr().err


@pytest.mark.parametrize("options", [[], ["--reward", "jpeg"],
                                     ["--reward", "jpeg", "--check", "jpeg", "a.png"]])
def test_what_is_to_be_done_must_be_said(options, capsys):
    with pytest.raises(SystemExit):
        main(options)
    assert "give --check SPEC, or --reward SPEC with pictures" in capsys.readouterr().err


BAD_REWARDS = """
import torch
calls = []
def constant(images, prompts):
    return torch.ones(len(prompts))
def relative(images, prompts):
    light = images.mean(dim=(1, 2, 3))
    return light - light.mean()
def moody(images, prompts):
    calls.append(0)
    return images.mean(dim=(1, 2, 3)) + 0.1 * len(calls)
def greedy(images, prompts):
    images.mul_(0.5)
    return images.mean(dim=(1, 2, 3))
def misshapen(images, prompts):
    return images.mean(dim=(2, 3))
def first(images, prompts):
    return torch.arange(len(prompts)).float() + images.mean(dim=(1, 2, 3))
def shy(images, prompts):
    return torch.full((len(prompts),), float("nan"))
shy.may_miss = True
"""


@pytest.mark.parametrize("name, finding", [
    ("constant", "nothing to learn from"),
    ("relative", "depends on the others in the batch"),
    ("moody", "other scores the second time"),
    ("greedy", "changes the images in place"),
    ("misshapen", "must return a tensor of shape"),
    ("first", "its place in the batch"),
    ("shy", "100% of the images got no score, and teach nothing"),
])
def test_check_says_in_plain_words_what_is_wrong(drawn_once, name, finding, tmp_path, capsys):
    file = tmp_path / "mine.py"
    file.write_text(BAD_REWARDS)
    assert main(["--check", f"{file}:{name}", "--device", "cpu"]) != 0
    output = capsys.readouterr()
    assert finding in output.out + output.err


@pytest.mark.parametrize("spec, finding", [
    ("shapes:1e-7", "multiply the weight by 1e+07"),
    ("shapes:1e-5", "multiply the weight by 1e+05"),
    ("shapes:1e30", "have 0% of their size: multiply the weight by 1e-30"),
])
def test_check_names_a_scale_that_training_cannot_use(drawn_once, spec, finding, capsys):
    assert main(["--check", spec, "--device", "cpu"]) == 1
    [bad] = [line for line in capsys.readouterr().out.splitlines() if line.startswith("BAD")]
    assert bad.startswith("BAD  scale") and finding in bad


@pytest.mark.parametrize("spread, good", [
    (1e-4, False), (8e-4, False), (1.2e-3, True), (1.0, True), (1e15, True), (1e25, False),
])
def test_the_scale_that_training_can_use(spread, good):
    """At 1e-4, the std + 1e-4 is twice the std: half of an advantage is left."""
    whole = torch.tensor([0.0, 1.0, 1.0, 2.0]) * 1.5 ** 0.5              # std 1, as of the other
    missing = torch.tensor([0.0, 1.0, 2.0, math.nan])
    for group in (whole, missing):
        [(what, fine, text)] = scale(torch.cat([torch.zeros(4), spread * group]), 4)
        assert (what, fine) == ("scale", good), text
        assert ("multiply the weight" in text) == (not good)
        if spread == 1e-4:
            assert "50% of their size" in text and text.endswith("by 1e+04")


def test_an_infinite_sum_of_rewards_is_too_large():
    [(_, fine, text)] = scale(torch.tensor([0.0, 1.0, math.inf, 2.0]), 4)
    assert not fine and "multiply the weight by 1e-38" in text


def test_without_any_spread_there_is_no_scale():
    assert list(scale(torch.tensor([1.0, 1.0, 2.0, 2.0, math.nan, 3.0]), 2)) == []


def test_an_image_without_a_score_misses_it_each_time(pictures):
    """Which is no reason to call a reward random, or dependent on the batch."""
    def shy(images, prompts):
        scores = images.mean(dim=(1, 2, 3))
        return scores.where(scores > 0.15, torch.nan)
    shy.may_miss = True
    images, prompts = pictures
    assert 0 < shy(images, prompts).isnan().float().mean() < 0.5
    found = {what: good for what, good, _ in checker.findings(
        RewardSet({"shy": (shy, 1.0)}), images, prompts, checker.SAMPLES)}
    assert found["repeatable"] and found["order"] and found["batch"]


@pytest.mark.parametrize("name, finding", [
    ("shapes", "depends on the prompt"),
    ("jpeg", "does not depend on the prompt"),
    ("contrast", "does not depend on the prompt"),
])
def test_check_finds_nothing_wrong_with_a_good_reward(drawn_once, name, finding, capsys):
    assert main(["--check", name, "--device", "cpu"]) == 0
    output = capsys.readouterr().out
    assert "BAD" not in output and f"  {finding}\n" in output
