"""Is it what was asked for?  GenEval's compositions, and texts that are read off the image."""

import sys
from importlib.util import find_spec
from types import SimpleNamespace

import pytest
import torch
from torchvision.models import detection

import pretrained
import rewards.geneval
import rewards.imagenet
import rewards.ocr
from captions import COLOUR_NAMES, coco_objects, requirements
from reward import build_rewards
from rewards.clip import Tower, preprocess
from rewards.geneval import GenEval, place_of

CPU = torch.device("cpu")


# --- GenEval -----------------------------------------------------------------------------------

def box(x, y, size=10):
    return torch.tensor([x - size / 2, y - size / 2, x + size / 2, y + size / 2])


@pytest.mark.parametrize("x, y, places", [
    (0, 50, {"left of"}),
    (100, 50, {"right of"}),
    (50, 0, {"above"}),
    (50, 100, {"below"}),
    (0, 0, {"left of", "above"}),
    (51, 50, set()),
    (50, 50, set()),
])
def test_places_follow_genevals_rule(x, y, places):
    assert place_of(box(x, y), box(50, 50)) == places


SHADES = {"red": [1.0, 0.0, 0.0], "green": [0.0, 1.0, 0.0], "blue": [0.0, 0.0, 1.0]}


def shade_of(text):
    """The features of a text: the colour that it names, or a dark grey."""
    for word in text.replace("-", " ").split():
        if word in SHADES:
            return SHADES[word]
    return [0.1, 0.1, 0.1]


def found_things(things):
    """What a detector says of things, (name, x, y) or (name, x, y, score)."""
    places = [thing[1:3] for thing in things]
    scores = [thing[3] if len(thing) > 3 else 0.95 for thing in things]
    labels = [coco_objects()[thing[0]] for thing in things]
    boxes = torch.stack([box(*place) for place in places]) if things else torch.zeros(0, 4)
    masks = torch.zeros(len(things), 1, 64, 64)
    for mask, (x1, y1, x2, y2) in zip(masks, boxes.int().tolist()):
        mask[:, y1:y2, x1:x2] = 1
    labels = torch.tensor(labels, dtype=torch.long)
    return {"boxes": boxes, "labels": labels, "scores": torch.tensor(scores), "masks": masks}


@pytest.fixture
def geneval(monkeypatch):
    """GenEval without a detector.  Its CLIP takes the mean of a crop for the crop's colour."""
    def shade_seen(images):
        return preprocess(images, 8, (0.0, 0.0, 0.0), (1.0, 1.0, 1.0)).mean(dim=(2, 3))

    tower = Tower(shade_seen, lambda texts: torch.tensor([shade_of(text) for text in texts]))
    monkeypatch.setattr(detection, "maskrcnn_resnet50_fpn_v2", lambda weights: torch.nn.Module())
    monkeypatch.setattr(rewards.geneval, "open_clip_tower", lambda name, device: tower)
    return GenEval(CPU)


@pytest.fixture
def judge(geneval):
    """judge(prompt, things, image): GenEval's score, if the detector finds these things."""
    found = []
    geneval.detector = lambda images: [found.pop(0) for _ in images]

    def score(prompt, things, image=None):
        found.append(found_things(things))
        if image is None:
            image = torch.zeros(1, 3, 64, 64)
        return geneval(image, [prompt]).item()

    return score


def test_geneval_counts_objects(judge):
    dog = ("dog", 20, 20)
    assert judge("a photo of a dog", [dog]) == 1
    assert judge("a photo of a dog", [("cat", 20, 20)]) == 0
    assert judge("a photo of two dogs", [dog, ("dog", 40, 40)]) == 1
    assert judge("a photo of two dogs", [dog]) == 0
    assert judge("a photo of two dogs", [dog] * 3) == 0                  # exactly two
    assert judge("a photo of two dogs", [dog, ("dog", 40, 40, 0.5)]) == 0      # must be surer
    assert judge("a photo of a dog", [("dog", 20, 20, 0.5)]) == 1
    assert judge("a photo of a dog and a cat", [dog]) == 0.5


def test_geneval_checks_places(judge):
    prompt = "a photo of a dog left of a cat"
    assert judge(prompt, [("dog", 10, 30), ("cat", 50, 30)]) == 1
    assert judge(prompt, [("dog", 50, 30), ("cat", 10, 30)]) == pytest.approx(2 / 3)
    assert judge(prompt, [("dog", 50, 30)]) == pytest.approx(1 / 3)


def test_geneval_names_colours(judge):
    image = torch.zeros(1, 3, 64, 64)
    image[:, 0, 15:25, 15:25] = 1                            # a red square where the object is
    assert judge("a photo of a red dog", [("dog", 20, 20)], image) == 1
    assert judge("a photo of a blue dog", [("dog", 20, 20)], image) == 0.5
    assert judge("a photo of a red dog", [], image) == 0
    assert set(COLOUR_NAMES) >= {"red", "green", "blue"}


def test_geneval_keeps_the_aspect_of_what_it_names_the_colour_of(judge, geneval):
    """Like the original, which scales the shorter side and crops the centre.

    The object is wide: blue in its middle, and twice as much red at its ends, which the crop leaves
    out.  Squeezed into a square it would count as red."""
    image = torch.zeros(1, 3, 64, 64)
    image[:, 0, 20:30] = 1
    image[:, :, 20:30, 22:40] = torch.tensor([0.0, 0.0, 1.0]).view(3, 1, 1)
    wide = found_things([("dog", 31, 25)])
    wide["boxes"] = torch.tensor([[0.0, 20.0, 62.0, 30.0]])
    wide["masks"] = torch.ones(1, 1, 64, 64)
    geneval.detector = lambda images: [wide]
    assert geneval(image, ["a photo of a blue dog"]).item() == 1
    assert geneval(image, ["a photo of a red dog"]).item() == 0.5


def test_geneval_refuses_a_prompt_that_it_cannot_read(judge, geneval):
    with pytest.raises(ValueError, match="cannot read 'a nice day' as a composition"):
        judge("a nice day", [])
    geneval.check_prompts(["a photo of a dog", "a photo of two toothbrushs"])
    with pytest.raises(ValueError, match="cannot read 'a nice day' as a composition"):
        geneval.check_prompts(["a photo of a dog", "a nice day"])
    assert requirements("a photo of a dog left of a cat") == [
        {"class": "cat", "count": 1},
        {"class": "dog", "count": 1, "position": ["left of", 0]},
    ]


def test_geneval_says_where_to_get_its_detector(monkeypatch):
    def offline(weights):
        raise OSError("no network")

    monkeypatch.setattr(detection, "maskrcnn_resnet50_fpn_v2", offline)
    with pytest.raises(FileNotFoundError, match="cannot download its model .no network.; get "):
        build_rewards("geneval", CPU)


# --- ImageNet's classes ------------------------------------------------------------------------

def test_of_two_classes_with_one_name_the_likelier_counts(monkeypatch):
    """"missile" names two."""
    two = [k for k, name in enumerate(pretrained.imagenet_classes()) if name == "missile"]
    logits = torch.zeros(1, 1000)
    logits[0, two[1]] = 5.0
    monkeypatch.setattr(rewards.imagenet, "efficientnet_lite", lambda device: lambda x: logits)
    score = build_rewards("imagenet", CPU)(torch.rand(1, 3, 8, 8), ["a photo of missile"])[0]
    assert len(two) == 2 and score.item() == pytest.approx(logits.log_softmax(1).max().item())


# --- OCR ---------------------------------------------------------------------------------------

def edit_distance(a, b):
    """What rapidfuzz computes, where it is not there: the fewest letters to insert, leave out or
    exchange."""
    row = list(range(len(b) + 1))
    for i, letter in enumerate(a, 1):
        last, row[0] = row[0], i
        for j, other in enumerate(b, 1):
            last, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, last + (letter != other))
    return row[-1]


@pytest.fixture
def ocr(monkeypatch):
    """ocr(prompt, lines): the reward, if these lines are read off the picture."""
    if find_spec("rapidfuzz") is None:
        for module in ("rapidfuzz", "rapidfuzz.distance"):
            monkeypatch.setitem(sys.modules, module, SimpleNamespace(
                Levenshtein=SimpleNamespace(distance=edit_distance)))

    def score(prompt, lines):
        found = SimpleNamespace(txts=lines)
        rapidocr = SimpleNamespace(RapidOCR=lambda params: lambda picture: found)
        monkeypatch.setattr(rewards.ocr, "optional", lambda package, reward: rapidocr)
        return build_rewards("ocr", CPU)(torch.rand(1, 3, 8, 8), [prompt])[0].item()
    return score


def test_ocr_reads_all_lines_together(ocr):
    assert ocr('a sign that says "Hello World"', ["Hello", "World"]) == 1
    assert ocr('a sign that says "Hello"', ["Say Hello now"]) == 1
    assert ocr('a sign that says \u201cHello\u201d', ["HELP"]) == pytest.approx(0.6)
    assert ocr('a sign that says "Hello"', ["xHexllox"]) == pytest.approx(1 - 3 / 5), (
        "the letters that are wrong count by the length of the text that is wanted")


def test_of_several_quoted_texts_each_counts_in_any_place(ocr):
    prompt = 'a door that says "open" beside one that says "exit"'
    assert ocr(prompt, ["exit", "open"]) == 1
    assert ocr(prompt, ["open"]) == pytest.approx((1 + 0) / 2)


def test_ocr_needs_a_quoted_text(monkeypatch):
    rapidocr = SimpleNamespace(RapidOCR=lambda params: None)
    monkeypatch.setattr(rewards.ocr, "optional", lambda package, reward: rapidocr)
    ocr = build_rewards("ocr", CPU)
    ocr.check_prompts(['a sign that says "Hello"', "one that says \u201cHi\u201d"])
    message = "'ocr' cannot judge 2 of 3 prompts: 'a sign', 'a \" \"'; .* text in double quotes"
    with pytest.raises(ValueError, match=message):
        ocr.check_prompts(["a sign", 'a "b"', 'a " "', "a sign"])
    with pytest.raises(ValueError, match="text in double quotes, but the prompt is 'a sign'"):
        ocr(torch.rand(1, 3, 8, 8), ["a sign"])
