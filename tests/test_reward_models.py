"""The rewards that need models: their formulas, and their code on small random ones.  Nothing is downloaded."""

import json
import math
import random
import sys
from pathlib import Path
from types import SimpleNamespace

import huggingface_hub
import open_clip
import pytest
import torch
from PIL import Image
from torchvision.transforms.functional import pil_to_tensor, to_pil_image

import reward
import toy
import train_c2i
from argrpo import group_advantages
from captions import COLOURS, coco_objects, requirements
from reward import Ask, GenEval, Tower, binned, build_rewards, edit_distance, parse_score, place_of, random_crops

CPU = torch.device("cpu")
ROOT = Path(__file__).parent.parent


@pytest.fixture(autouse=True)
def fresh_models():
    """No test sees another's towers."""
    yield
    reward.open_clip_tower.cache_clear()
    reward.vision_language_model.cache_clear()
    reward.LOADED.clear()


def tiny_clip(embed_dim=16):
    """The architecture of CLIP, with one narrow layer a tower."""
    return open_clip.model.CLIP(embed_dim, dict(image_size=32, layers=1, width=32, patch_size=8, head_width=16),
                                dict(context_length=77, vocab_size=49408, width=32, heads=2, layers=1))


@pytest.fixture
def random_towers(monkeypatch, tmp_path):
    """Tiny random models in the place of the published ones, from checkpoints in the formats of those; what was built."""
    built = []

    def create_model(name, **options):
        built.append(name)
        return tiny_clip(768 if "L-14" in name else 16)

    monkeypatch.setattr(open_clip, "create_model", create_model)
    monkeypatch.setattr(open_clip, "get_model_preprocess_cfg",
                        lambda model: dict(size=(32, 32), mean=(0.5, 0.5, 0.5), std=(0.3, 0.3, 0.3)))
    for name in ("ViT-B-32-quickgelu", "ViT-L-14-quickgelu", "ViT-H-14"):
        state = tiny_clip(768 if "L-14" in name else 16).state_dict()
        torch.save({"state_dict": state} if name == "ViT-H-14" else state, tmp_path / f"{name}.pt")
        monkeypatch.setitem(reward.WEIGHTS, name, str(tmp_path / f"{name}.pt"))
    torch.save(reward.AestheticHead().state_dict(), tmp_path / "aesthetic.pth")
    monkeypatch.setitem(reward.WEIGHTS, "aesthetic", str(tmp_path / "aesthetic.pth"))
    return built


def counting_tower(micro_batch=32):
    """A Tower of two plain functions, and the list of what they were asked."""
    asked = []

    def encode_image(pixels):
        asked.append(("images", len(pixels)))
        return pixels.mean(dim=(2, 3))                                   # (b, 3)

    def encode_text(texts):
        asked.append(("texts", len(texts)))
        return torch.tensor([[len(text), 1.0, 2.0] for text in texts])
    return Tower(encode_image, encode_text, 8, (0.0, 0.0, 0.0), (1.0, 1.0, 1.0), micro_batch), asked


# --- preprocessing ---------------------------------------------------------------------------

def pictures():
    """Real pictures, of any size and shape."""
    from matplotlib.cbook import get_sample_data
    photo = pil_to_tensor(Image.open(get_sample_data("grace_hopper.jpg", asfileobj=False)))              # (3, 600, 512)
    scene = toy.render([toy.make_scene("two red circles", random.Random(0))])[0]
    return {"photo": photo, "256": photo[:, 50:306, 100:356], "384": photo[:, 100:484, 60:444], "wide": photo[:, 200:300],
            "curves": pil_to_tensor(Image.open(ROOT / "docs" / "toy_curves.png").convert("RGB")),
            "toy": (scene * 255).round().to(torch.uint8)}


def test_preprocessing_is_open_clips_own():
    """On real pictures, and a real ViT-B/32 with random weights: at most 1e-3 in cosine."""
    model = open_clip.create_model("ViT-B-32-quickgelu", load_weights=False).eval()
    how = open_clip.get_model_preprocess_cfg(model)
    transform = open_clip.image_transform(how["size"], is_train=False, mean=how["mean"], std=how["std"])
    text = torch.nn.functional.normalize(torch.randn(4, 512), dim=-1)
    for name, picture in pictures().items():
        expected = transform(to_pil_image(picture))[None]
        ours = reward.preprocess(picture[None] / 255, how["size"][0], how["mean"], how["std"])
        assert ours.shape == expected.shape
        assert (ours - expected).abs().mean() < 0.02, name               # one step of 255 is 0.015 after normalisation
        with torch.no_grad():
            cosines = [model.encode_image(pixels, normalize=True) @ text.T for pixels in (ours, expected)]
        assert (cosines[0] - cosines[1]).abs().max() < 1e-3, name


# --- towers ----------------------------------------------------------------------------------

def test_cosine_by_hand():
    tower, _ = counting_tower()
    images = torch.tensor([[1.0, 0.0, 0.0], [0.0, 0.6, 0.8]])[:, :, None, None].expand(2, 3, 8, 8)
    # The texts' vectors are (2, 1, 2) / 3 and (0, 1, 2) / sqrt(5).
    torch.testing.assert_close(tower.cosine(images, ["ab", ""]), torch.tensor([2 / 3, (0.6 + 1.6) / 5 ** 0.5]))


def test_a_batch_goes_through_a_tower_once():
    tower, asked = counting_tower()
    images, prompts = torch.rand(4, 3, 8, 8), ["a", "b", "a", "a"]
    first = tower.cosine(images, prompts)
    assert torch.equal(tower.cosine(images, prompts), first) and asked == [("images", 4), ("texts", 2)]
    tower.cosine(images.clone(), prompts)                                # another batch, though an equal one
    assert asked[2:] == [("images", 4)]


def test_micro_batches_bound_the_memory_and_change_nothing():
    images, prompts = torch.rand(7, 3, 8, 8), [str(i) for i in range(7)]
    (whole, _), (parts, asked) = counting_tower(), counting_tower(micro_batch=3)
    torch.testing.assert_close(parts.cosine(images, prompts), whole.cosine(images, prompts))
    assert [n for kind, n in asked if kind == "images"] == [3, 3, 1]


def test_rewards_of_one_model_share_it_and_forget_the_batch(random_towers):
    rewards = build_rewards("clip,clip_bin,clip_iqa,hpsv2,hpsv2_bin,aesthetic", CPU)
    assert sorted(random_towers) == ["ViT-B-32-quickgelu", "ViT-H-14", "ViT-L-14-quickgelu"]
    total, parts = rewards(torch.rand(3, 3, 40, 40), ["a", "b", "b"])
    torch.testing.assert_close(parts["clip_bin"], binned(parts["clip"] / 5))
    torch.testing.assert_close(parts["hpsv2_bin"], binned(parts["hpsv2"] / 5))
    torch.testing.assert_close(total, sum(parts.values()))
    assert all(not tower.last for tower in reward.LOADED) and len(reward.LOADED) == 3


def test_bins_at_their_edges():
    cosines = torch.tensor([-1.0, -1e-6, 0.0, 0.29, 0.3, 0.59, 0.6, 1.0])
    assert binned(cosines).tolist() == [-1.0, -1.0, 0.5, 0.5, 1.0, 1.0, 1.5, 1.5]


@pytest.mark.parametrize("name, scale", [("clip", 5), ("hpsv2", 5)])
def test_cosine_rewards_have_the_official_scale(name, scale, random_towers):
    images, prompts = torch.rand(3, 3, 40, 40), ["a", "b", "c"]
    scores = build_rewards(name, CPU)(images, prompts)[0]
    tower = (reward.clip_tower if name == "clip" else reward.hpsv2_tower)(CPU)
    torch.testing.assert_close(scores, scale * tower.cosine(images, prompts))


def test_clip_iqa_is_twice_the_probability_of_good(random_towers):
    images = torch.rand(3, 3, 40, 40)
    scores = build_rewards("clip_iqa", CPU)(images, ["x"] * 3)[0]
    tower = reward.clip_tower(CPU)
    good, bad = (tower.cosine(images, [text] * 3) for text in ("Good photo.", "Bad photo."))
    torch.testing.assert_close(scores, 2 / (1 + (100 * (bad - good)).exp()), rtol=1e-3, atol=1e-5)


def test_pickscore_is_the_scaled_cosine(monkeypatch, tmp_path):
    import transformers
    tower = dict(hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2)
    model = transformers.CLIPModel(transformers.CLIPConfig(
        text_config=tower | dict(vocab_size=50, bos_token_id=1, eos_token_id=2, pad_token_id=0),
        vision_config=tower | dict(image_size=32, patch_size=8), projection_dim=8))
    model.save_pretrained(tmp_path)

    def tokenizer(texts, **options):
        ids = torch.tensor([[1, 3 + len(text), 2] for text in texts])
        return transformers.BatchEncoding({"input_ids": ids, "attention_mask": torch.ones_like(ids)})

    monkeypatch.setattr(transformers.AutoTokenizer, "from_pretrained", lambda folder: tokenizer)
    monkeypatch.setitem(reward.WEIGHTS, "pickscore", str(tmp_path))
    images = torch.rand(2, 3, 32, 32)
    scores = build_rewards("pickscore", CPU)(images, ["a", "bcd"])[0]
    pixels = reward.preprocess(images, 32, (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711))
    with torch.no_grad():
        answer = model.eval()(pixel_values=pixels, **tokenizer(["a", "bcd"]))
    torch.testing.assert_close(scores, answer.logits_per_image.diagonal())


# --- MANIQA ----------------------------------------------------------------------------------

def test_maniqa_is_twice_the_mean_over_twenty_crops(monkeypatch):
    calls = []

    def metric(crops):
        calls.append(crops.shape)
        return crops.mean(dim=(1, 2, 3))[:, None]

    monkeypatch.setitem(sys.modules, "pyiqa", SimpleNamespace(create_metric=lambda name, device, test_sample: metric))
    images = torch.rand(3, 3, 256, 240)
    scores = build_rewards("maniqa", CPU)(images, ["x"] * 3)[0]
    torch.testing.assert_close(scores, 2 * random_crops(images).mean(dim=(1, 2, 3, 4)))
    assert sum(shape[0] for shape in calls) == 60 and all(shape[1:] == (3, 224, 224) for shape in calls)


def test_crops_are_the_same_windows_of_every_image_every_time():
    image = torch.rand(1, 3, 256, 256)
    a, b = random_crops(image), random_crops(torch.cat([image + 1, image]))
    assert torch.equal(a[0], b[1]) and torch.equal(b[0], a[0] + 1)
    assert len({crop.flatten()[0].item() for crop in a[0]}) > 15         # windows differ
    assert random_crops(torch.rand(2, 3, 24, 24)).shape == (2, 20, 3, 224, 224)


@pytest.mark.parametrize("name, package", [("maniqa", "pyiqa"), ("ocr", "easyocr")])
def test_a_missing_package_is_named_with_its_pip_command(name, package, monkeypatch):
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(ImportError, match=f"reward '{name}' needs {package}: pip install {package}"):
        build_rewards(name, CPU)


# --- the vision-language model ---------------------------------------------------------------

@pytest.mark.parametrize("answer, score", [
    ('The nose is blurred.\n{"score": 3.5}', 3.5), ("Score: 4", 4.0), ('{"score": 1} no, wait: {"score": 2}', 2.0),
    ("I cannot judge this.", None), ('{"score": 7}', None), ('{"score": -1}', None), ("", None),
])
def test_scores_are_read_off_answers(answer, score):
    assert parse_score(answer, 5) == score


@pytest.fixture
def scripted(monkeypatch):
    """A language model that answers from a script, {brightness: answers attempt by attempt}; what it was asked."""
    asked = []

    def use(script):
        def model(images, questions, attempt):
            asked.append((attempt, questions))
            return [script[round(image.mean().item(), 1)][attempt] for image in images]
        monkeypatch.setattr(reward, "vision_language_model", lambda device: model)
        return asked
    return use


def grey(*levels):
    return torch.tensor(levels)[:, None, None, None].expand(-1, 3, 4, 4)


def test_an_answer_without_points_is_retried_then_missing(scripted):
    good, bad = '{"score": 4}', "hm"
    asked = scripted({0.1: [good], 0.2: [bad, good], 0.3: [bad, bad, bad]})
    total, parts = build_rewards("qwen_label", CPU)(grey(0.1, 0.2, 0.3), ["a cat", "a dog", "a cow"])
    assert total[:2].tolist() == [1.0, 1.0] and math.isnan(total[2])
    assert [(attempt, len(questions)) for attempt, questions in asked] == [(0, 3), (1, 2), (2, 1)]
    assert "a cow" in asked[2][1][0]


def test_missing_images_are_left_out_of_their_group(scripted):
    """Rewards (1, 0, missing, 0.5): mean 0.5 and standard deviation 0.5 of the three that are known."""
    scripted({0.1: ['{"score": 4}'], 0.2: ['{"score": 0}'], 0.3: ["hm"] * 3, 0.4: ['{"score": 2}']})
    total, _ = build_rewards("qwen_label", CPU)(grey(0.1, 0.2, 0.3, 0.4), ["x"] * 4)
    torch.testing.assert_close(group_advantages(total, 4, eps=0.0), torch.tensor([1.0, -1.0, 0.0, 0.0]))


def test_only_a_reward_that_may_miss_may_give_nan():
    def broken(images, prompts):
        return torch.tensor([math.nan, 1.0])
    with pytest.raises(ValueError, match="reward 'broken' gave nan to image 0"):
        reward.RewardSet({"broken": (broken, 1.0)})(torch.rand(2, 3, 4, 4), ["a", "b"])


@pytest.mark.parametrize("question, answer, score", [("label", '{"score": 5}', 1.25), ("fake", '{"score": 1}', 0.25),
                                                     ("weird", '{"score": 0}', 0.0)])
def test_the_official_scales(question, answer, score, scripted):
    scripted({0.1: [answer]})
    assert Ask(question, CPU)(grey(0.1), ["x"]).item() == score


def test_a_small_qwen_answers_a_batch(monkeypatch, tmp_path):
    """The real classes with random weights and eleven words: left padding, images as tensors, answers without the question."""
    import transformers as t
    from tokenizers import Tokenizer, models, pre_tokenizers
    marks = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>"]
    words = Tokenizer(models.WordLevel({word: i for i, word in enumerate([*marks, "<unk>", "score", "user", "assistant"])}, "<unk>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = t.PreTrainedTokenizerFast(tokenizer_object=words, unk_token="<unk>", pad_token=marks[0], eos_token=marks[2],
                                          additional_special_tokens=marks)
    template = ("{% for m in messages %}<|im_start|>{{ m.role }} {% for c in m.content %}{% if c.type == 'image' %}<|vision_start|>"
                "<|image_pad|><|vision_end|>{% else %}{{ c.text }}{% endif %}{% endfor %}<|im_end|>{% endfor %}<|im_start|>assistant ")
    t.Qwen2_5_VLProcessor(t.Qwen2VLImageProcessor(), tokenizer, t.Qwen2VLVideoProcessor(), chat_template=template).save_pretrained(tmp_path)
    text = dict(vocab_size=16, hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=2,
                rope_scaling=dict(type="mrope", mrope_section=[2, 3, 3]), bos_token_id=0, eos_token_id=2, pad_token_id=0)
    vision = dict(depth=1, hidden_size=32, intermediate_size=32, num_heads=2, out_hidden_size=32, fullatt_block_indexes=[0])
    t.Qwen2_5_VLForConditionalGeneration(t.Qwen2_5_VLConfig(
        text_config=text, vision_config=vision, image_token_id=5, video_token_id=6, vision_start_token_id=3,
        vision_end_token_id=4)).save_pretrained(tmp_path)
    monkeypatch.setitem(reward.WEIGHTS, "qwen", str(tmp_path))
    model, images = reward.VisionLanguageModel("cpu"), torch.rand(3, 3, 64, 64)
    state = torch.get_rng_state()
    for attempt in (0, 1):
        questions = ["score", "score user score user", "score score"]
        answers = model(images, questions, attempt)
        assert len(answers) == 3 and answers == model(images, questions, attempt)          # repeatable
    assert torch.equal(torch.get_rng_state(), state)                                       # leaves other randomness alone
    assert torch.isnan(Ask("fake", CPU)(images, ["x"] * 3)).all()                          # it never writes "score: 1"


# --- GenEval ---------------------------------------------------------------------------------

def box(x, y, size=10):
    return torch.tensor([x - size / 2, y - size / 2, x + size / 2, y + size / 2])


@pytest.mark.parametrize("x, y, places", [(0, 50, {"left of"}), (100, 50, {"right of"}), (50, 0, {"above"}), (50, 100, {"below"}),
                                          (0, 0, {"left of", "above"}), (51, 50, set()), (50, 50, set())])
def test_places_follow_genevals_rule(x, y, places):
    assert place_of(box(x, y), box(50, 50)) == places


@pytest.fixture
def detector(random_towers, monkeypatch):
    """GenEval with a detector that finds what it is told, and a CLIP that takes the mean of a crop for its colour."""
    from torchvision.models import detection
    found = []
    monkeypatch.setattr(detection, "maskrcnn_resnet50_fpn_v2",
                        lambda weights: torch.nn.Module())
    geneval = GenEval(CPU)
    geneval.detector = lambda images: [found.pop(0) for _ in images]
    shades = {"red": [1.0, 0.0, 0.0], "green": [0.0, 1.0, 0.0], "blue": [0.0, 0.0, 1.0]}
    geneval.tower = Tower(lambda pixels: pixels.mean(dim=(2, 3)),
                          lambda texts: torch.tensor([next((shades[word] for word in text.replace("-", " ").split() if word in shades),
                                                           [0.1, 0.1, 0.1]) for text in texts]), 8, (0.0,) * 3, (1.0,) * 3)

    def judge(prompt, things, image=None):
        """things: (name, x, y) or (name, x, y, score)."""
        names, places, scores = [t[0] for t in things], [t[1:3] for t in things], [t[3] if len(t) > 3 else 0.95 for t in things]
        boxes = torch.stack([box(*place) for place in places]) if things else torch.zeros(0, 4)
        masks = torch.zeros(len(things), 1, 64, 64)
        for mask, (x1, y1, x2, y2) in zip(masks, boxes.int().tolist()):
            mask[:, y1:y2, x1:x2] = 1
        found.append(dict(boxes=boxes, labels=torch.tensor([coco_objects()[name] for name in names], dtype=torch.long),
                          scores=torch.tensor(scores), masks=masks))
        return geneval(torch.zeros(1, 3, 64, 64) if image is None else image, [prompt]).item()
    return judge


def test_geneval_counts_objects(detector):
    dog = ("dog", 20, 20)
    assert detector("a photo of a dog", [dog]) == 1 and detector("a photo of a dog", [("cat", 20, 20)]) == 0
    assert detector("a photo of two dogs", [dog, ("dog", 40, 40)]) == 1
    assert detector("a photo of two dogs", [dog]) == 0 and detector("a photo of two dogs", [dog] * 3) == 0       # exactly two
    assert detector("a photo of two dogs", [dog, ("dog", 40, 40, 0.5)]) == 0       # counting needs to be surer
    assert detector("a photo of a dog", [("dog", 20, 20, 0.5)]) == 1
    assert detector("a photo of a dog and a cat", [dog]) == 0.5


def test_geneval_checks_places(detector):
    prompt = "a photo of a dog left of a cat"
    assert detector(prompt, [("dog", 10, 30), ("cat", 50, 30)]) == 1
    assert detector(prompt, [("dog", 50, 30), ("cat", 10, 30)]) == pytest.approx(2 / 3)
    assert detector(prompt, [("dog", 50, 30)]) == pytest.approx(1 / 3)


def test_geneval_names_colours(detector):
    image = torch.zeros(1, 3, 64, 64)
    image[:, 0, 15:25, 15:25] = 1                                        # a red square where the object is
    assert detector("a photo of a red dog", [("dog", 20, 20)], image) == 1
    assert detector("a photo of a blue dog", [("dog", 20, 20)], image) == 0.5
    assert detector("a photo of a red dog", [], image) == 0
    assert set(COLOURS) >= {"red", "green", "blue"}


def test_geneval_refuses_a_prompt_that_it_cannot_read(detector):
    with pytest.raises(ValueError, match="cannot read 'a nice day' as a composition"):
        detector("a nice day", [])
    assert requirements("a photo of a dog left of a cat") == [
        {"class": "cat", "count": 1}, {"class": "dog", "count": 1, "position": ["left of", 0]}]


# --- OCR -------------------------------------------------------------------------------------

@pytest.mark.parametrize("a, b, distance", [("", "", 0), ("abc", "abc", 0), ("kitten", "sitting", 3), ("", "abc", 3), ("flaw", "lawn", 2)])
def test_edit_distance(a, b, distance):
    assert edit_distance(a, b) == edit_distance(b, a) == distance


def test_ocr_compares_letters(monkeypatch):
    said = iter([["Hel lo"], ["HELP"], [], ["hello, hello, hello"]])
    reader = SimpleNamespace(readtext=lambda pixels, detail: next(said))
    monkeypatch.setitem(sys.modules, "easyocr", SimpleNamespace(Reader=lambda languages, gpu, verbose: reader))
    scores = build_rewards("ocr", CPU)(torch.rand(4, 3, 8, 8), ['a sign that says "Hello"'] * 4)[0]
    torch.testing.assert_close(scores, torch.tensor([1.0, 1 - 2 / 5, 0.0, 0.0]))
    with pytest.raises(ValueError, match="needs a text in double quotes, but the prompt is 'a sign'"):
        build_rewards("ocr", CPU)(torch.rand(1, 3, 8, 8), ["a sign"])


# --- mixtures --------------------------------------------------------------------------------

def test_the_papers_mixtures():
    eight = ["clip", "clip_bin", "hpsv2", "hpsv2_bin", "maniqa", "qwen_label", "qwen_fake", "qwen_weird"]
    for name in ("paper_c2i", "paper_t2i"):
        assert list(reward.items_of(name)) == [(None, part, 1.0) for part in eight]
    assert set(eight) <= set(reward.REGISTRY)
    assert list(reward.items_of("paper_lite:0.5,jpeg")) == [
        (None, part, 0.5) for part in ("clip", "clip_bin", "hpsv2", "hpsv2_bin", "clip_iqa")] + [(None, "jpeg", 1.0)]


def test_the_whole_paper_mixture_scores_a_batch(random_towers, scripted, monkeypatch):
    monkeypatch.setitem(sys.modules, "pyiqa", SimpleNamespace(
        create_metric=lambda name, device, test_sample: lambda crops: crops.mean(dim=(1, 2, 3))))
    scripted({0.5: ['{"score": 1}']})
    total, parts = build_rewards("paper_c2i", CPU)(grey(0.5, 0.5).repeat(1, 1, 10, 10), ["a photo of an otter"] * 2)
    assert len(parts) == 8 and parts["maniqa"].tolist() == pytest.approx([1.0, 1.0])
    torch.testing.assert_close(total, sum(parts.values()))


def test_training_on_paper_lite(random_towers, tmp_path):
    """From the toy's pictures through every tower to an update."""
    train_c2i.main(["--preset", "toy", "--steps", "2", "--prompts-per-step", "2", "--group-size", "4", "--eval-images", "8",
                    "--reward", "paper_lite", "--out", str(tmp_path / "run")])
    metrics = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert len(metrics) == 2 and {"reward/clip", "reward/hpsv2_bin", "reward/clip_iqa"} <= set(metrics[0])
    assert metrics[0]["grad_norm"] > 0 and metrics[0]["missing"] == 0


def test_missing_weights_are_a_clear_error(monkeypatch):
    def offline(*args, **kwargs):
        raise ConnectionError("no network")
    monkeypatch.setattr(huggingface_hub, "snapshot_download", offline)
    for name in ("clip", "hpsv2", "pickscore", "qwen_fake"):
        with pytest.raises(FileNotFoundError, match="cannot get .* from https://huggingface.co/.*HF_HOME"):
            build_rewards(name, CPU)


def test_an_unknown_reward_is_found_before_a_model_is_loaded(random_towers):
    with pytest.raises(ValueError, match="unknown reward 'clop'"):
        build_rewards("clip,clop", CPU)
    assert not random_towers


# --- the command line ------------------------------------------------------------------------

def test_scoring_pictures_from_the_command_line(capsys):
    picture = str(ROOT / "docs" / "toy_curves.png")
    assert reward.main(["--reward", "brightness:2,contrast", "--device", "cpu", picture]) == 0
    line = json.loads(capsys.readouterr().out)
    assert line["image"] == picture and line["reward"] == pytest.approx(2 * line["brightness"] + line["contrast"])
    assert reward.main(["--reward", "beauty", picture]) == 2 and "unknown reward 'beauty'" in capsys.readouterr().err
    assert reward.main(["--reward", "jpeg", "nowhere.png"]) == 2 and "nowhere.png" in capsys.readouterr().err


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
"""


@pytest.mark.parametrize("name, finding", [
    ("constant", "nothing to learn from"), ("relative", "depends on the others in the batch"), ("moody", "other scores the second time"),
    ("greedy", "changes the images in place"), ("misshapen", "must return a tensor of shape"), ("first", "its place in the batch"),
])
def test_check_says_in_plain_words_what_is_wrong(name, finding, tmp_path, capsys):
    file = tmp_path / "mine.py"
    file.write_text(BAD_REWARDS)
    assert reward.main(["--check", f"{file}:{name}", "--device", "cpu"]) != 0
    output = capsys.readouterr()
    assert finding in output.out + output.err


@pytest.mark.parametrize("name", ["shapes", "jpeg", "contrast"])
def test_check_finds_nothing_wrong_with_a_good_reward(name, capsys):
    assert reward.main(["--check", name, "--device", "cpu"]) == 0
    output = capsys.readouterr().out
    assert "BAD" not in output and f"{'depends on' if name == 'shapes' else 'does not depend on'} the prompt" in output
