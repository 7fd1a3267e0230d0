"""Reward functions: what "better" means.

A reward is any callable

    reward(images, prompts) -> (B,) float tensor, higher is better

with images (B, 3, H, W) float in [0, 1] on the training device and prompts a list of B strings.
GRPO only ever compares images of one prompt with each other, so a reward's zero does not matter,
and its scale matters only beside other rewards.

Yours takes five lines, in any file:

    # my_rewards.py
    def redness(images, prompts):
        red, green, blue = images.mean(dim=(2, 3)).unbind(dim=1)
        return red - (green + blue) / 2

and one option: `--reward my_rewards.py:redness --out runs/red`.  Several rewards are added up with weights:
`--reward "shapes:1,jpeg:0.2,my_rewards.py:redness:0.5"`.  Before a long run, examine it, or score pictures:

    python reward.py --check my_rewards.py:redness
    python reward.py --reward clip,aesthetic --prompt "a photo of an otter" one.png two.png

A reward that needs a model or a device is made by a factory, `(device) -> reward`, which
`@register("name")` puts on the list below.  Models are frozen, shared by the rewards that use them, and
run on whole batches, a few images at a time.  A reward that cannot judge an image (a language model whose
answer makes no sense) says so: it carries `may_miss = True` and gives NaN, and the image is left out.
"""

import argparse
import functools
import importlib.util
import inspect
import io
import json
import math
import re
import sys
import time
from pathlib import Path

import torch
import torch.nn as nn
from PIL import Image
from torchvision.transforms import functional as vision

REGISTRY = {}                                    # name -> factory


def register(name):
    """Decorator of a factory (device) -> reward: makes it known as `name` to `build_rewards`."""
    if not re.fullmatch(r"\w+", name):
        raise ValueError(f"a reward's name is letters, digits and underscores, not {name!r}")

    def decorator(factory):
        if name in REGISTRY and inspect.getsourcefile(REGISTRY[name]) != inspect.getsourcefile(factory):
            raise ValueError(f"there is already a reward named {name!r}, in {inspect.getsourcefile(REGISTRY[name])}")
        REGISTRY[name] = factory
        return factory

    return decorator


# ---------------------------------------------------------------------------------------------
# Rewards that need no model
# ---------------------------------------------------------------------------------------------

@register("shapes")
def shapes(device):
    """The toy's verifier: 1 if the picture shows exactly what the prompt asks for, else 0."""
    from toy import verify
    return verify


def jpeg_kilobytes(images, quality=95):
    """Size of each image as a JPEG file: (B, 3, H, W) in [0, 1] -> (B,), in units of 1000 bytes."""
    sizes = []
    for image in images.float().cpu():
        file = io.BytesIO()
        vision.to_pil_image(image).save(file, format="jpeg", quality=quality)
        sizes.append(len(file.getvalue()))
    return torch.tensor(sizes, dtype=torch.float32, device=images.device) / 1000


@register("jpeg")
def jpeg(device):
    """Compressibility (DDPO, arXiv 2305.13301): minus the kilobytes of the image as a JPEG of quality 95."""
    return lambda images, prompts: -jpeg_kilobytes(images)


@register("jpeg_large")
def jpeg_large(device):
    """Incompressibility (DDPO): plus the kilobytes."""
    return lambda images, prompts: jpeg_kilobytes(images)


@register("brightness")
def brightness(device):
    """Mean over all pixels and channels, in [0, 1]."""
    return lambda images, prompts: images.mean(dim=(1, 2, 3))


@register("contrast")
def contrast(device):
    """Standard deviation of the grey value over the image, in [0, 0.5]."""
    return lambda images, prompts: images.mean(dim=1).flatten(1).std(dim=1)


# ---------------------------------------------------------------------------------------------
# Two towers: rewards from the cosine between an image and a text
# ---------------------------------------------------------------------------------------------

WEIGHTS = {                                      # Hugging Face repo:file, or a local path of your own
    "ViT-B-32-quickgelu": "timm/vit_base_patch32_clip_224.openai:open_clip_model.safetensors",
    "ViT-L-14-quickgelu": "timm/vit_large_patch14_clip_224.openai:open_clip_model.safetensors",
    "ViT-H-14": "xswu/HPSv2:HPS_v2.1_compressed.pt",
    "aesthetic": "trl-lib/ddpo-aesthetic-predictor:aesthetic-model.pth",
    "pickscore": "yuvalkirstain/PickScore_v1",
    "qwen": "Qwen/Qwen2.5-VL-3B-Instruct",
}
LOADED = []                                      # models that remember their last batch


def weights_of(name):
    """The local path of a reward model's weights, downloaded if need be.  Errors as in `pretrained.fetch`."""
    from pretrained import fetch
    return fetch(WEIGHTS[name], "download it where there is a network, and set HF_HOME to a copy of that Hugging Face cache")


def preprocess(images, size, mean, std):
    """open_clip's own transform, for a batch on its device: (B, 3, H, W) in [0, 1] -> (B, 3, size, size)."""
    images = vision.resize(images.float(), size, vision.InterpolationMode.BICUBIC, antialias=True)       # the shorter side
    return vision.normalize(vision.center_crop(images, size).clamp(0, 1), mean, std)


class Tower:
    """An image encoder and a text encoder that turn what belongs together into vectors of similar direction.

    Asked again about the very same batch, as by a second reward, it answers without computing."""

    def __init__(self, encode_image, encode_text, size, mean, std, micro_batch=32):
        self.encode_image, self.encode_text = encode_image, encode_text
        self.preprocess = functools.partial(preprocess, size=size, mean=mean, std=std)
        self.micro_batch, self.last = micro_batch, {}
        LOADED.append(self)

    def once(self, batch, compute):
        """compute(), or what it gave when the last batch was this very object."""
        kind = type(batch)
        if kind not in self.last or self.last[kind][0] is not batch:
            self.last[kind] = batch, compute()
        return self.last[kind][1]

    def image_features(self, images):
        """(B, 3, H, W) in [0, 1] -> (B, D), of length one."""
        def compute():
            features = [self.encode_image(self.preprocess(chunk)).float() for chunk in images.split(self.micro_batch)]
            return nn.functional.normalize(torch.cat(features), dim=-1)
        return self.once(images, compute)

    def text_features(self, texts):
        """B texts -> (B, D), of length one; equal texts are encoded once."""
        def compute():
            distinct = list(dict.fromkeys(texts))
            chunks = [distinct[i:i + self.micro_batch] for i in range(0, len(distinct), self.micro_batch)]
            features = nn.functional.normalize(torch.cat([self.encode_text(chunk).float() for chunk in chunks]), dim=-1)
            return features[[distinct.index(text) for text in texts]]
        return self.once(texts, compute)

    def cosine(self, images, prompts):
        """How well each image fits its prompt: (B,) in [-1, 1]."""
        return (self.image_features(images) * self.text_features(prompts)).sum(dim=-1)


def tower_of(model, name, device):
    """The Tower of an open_clip model, in the model's own precision."""
    import open_clip
    model = model.to(device).eval().requires_grad_(False)
    tokenizer, how = open_clip.get_tokenizer(name), open_clip.get_model_preprocess_cfg(model)
    dtype = model.visual.conv1.weight.dtype
    return Tower(lambda pixels: model.encode_image(pixels.to(dtype)),
                 lambda texts: model.encode_text(tokenizer(texts).to(device)), how["size"][0], how["mean"], how["std"])


@functools.cache
def open_clip_tower(name, device):
    """The Tower of an open_clip model with the weights named above; half precision on a GPU, as in the official code."""
    import open_clip

    from argrpo import load_weights
    path = weights_of(name)                      # first: without it, there is no need to build the model
    precision = "fp16" if torch.device(device).type == "cuda" else "fp32"
    model = open_clip.create_model(name, precision=precision, load_weights=False)
    return tower_of(load_weights(model, path), name, device)


def clip_tower(device):
    return open_clip_tower("ViT-B-32-quickgelu", device)             # OpenAI's weights need OpenAI's quick GELU


def hpsv2_tower(device):
    return open_clip_tower("ViT-H-14", device)


def binned(cosine):
    """The official code's bins: below 0 -> -1, [0, 0.3) -> 0.5, [0.3, 0.6) -> 1, from 0.6 -> 1.5."""
    edges = cosine.new_tensor([0.0, 0.3, 0.6])
    return cosine.new_tensor([-1.0, 0.5, 1.0, 1.5])[torch.bucketize(cosine, edges, right=True)]


@register("clip")
def clip(device):
    """CLIP ViT-B/32 (arXiv 2103.00020): 5 times the cosine of image and prompt."""
    tower = clip_tower(device)
    return lambda images, prompts: 5 * tower.cosine(images, prompts)


@register("clip_bin")
def clip_bin(device):
    """The same cosine in the paper's four bins."""
    tower = clip_tower(device)
    return lambda images, prompts: binned(tower.cosine(images, prompts))


@register("hpsv2")
def hpsv2(device):
    """HPSv2.1 (arXiv 2306.09341), a CLIP ViT-H/14 tuned on human preferences: 5 times the cosine of image and prompt."""
    tower = hpsv2_tower(device)
    return lambda images, prompts: 5 * tower.cosine(images, prompts)


@register("hpsv2_bin")
def hpsv2_bin(device):
    """The same cosine in the paper's four bins."""
    tower = hpsv2_tower(device)
    return lambda images, prompts: binned(tower.cosine(images, prompts))


@register("clip_iqa")
def clip_iqa(device):
    """CLIP-IQA (arXiv 2207.12396), quality without a reference: twice the probability, in [0, 2] as MANIQA's
    score, that CLIP prefers "Good photo." to "Bad photo." for the image."""
    tower = clip_tower(device)
    antonyms = ["Good photo.", "Bad photo."]

    def reward(images, prompts):
        logits = 100 * tower.image_features(images) @ tower.text_features(antonyms).T              # (B, 2)
        return 2 * logits.softmax(dim=-1)[:, 0]
    return reward


class AestheticHead(nn.Module):
    """LAION's aesthetic predictor, version 2: CLIP features (B, 768) -> score (B,), about 1 to 10."""

    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(768, 1024), nn.Dropout(0.2), nn.Linear(1024, 128), nn.Dropout(0.2),
                                    nn.Linear(128, 64), nn.Dropout(0.1), nn.Linear(64, 16), nn.Linear(16, 1))

    def forward(self, features):
        return self.layers(features)[:, 0]


@register("aesthetic")
def aesthetic(device):
    """LAION's aesthetic head on CLIP ViT-L/14: about 1 to 10; the prompt does not matter."""
    from argrpo import load_weights
    tower = open_clip_tower("ViT-L-14-quickgelu", device)
    head = load_weights(AestheticHead(), weights_of("aesthetic")).to(device).eval().requires_grad_(False)
    return lambda images, prompts: head(tower.image_features(images))


@register("pickscore")
def pickscore(device):
    """PickScore v1 (arXiv 2305.01569), a CLIP ViT-H/14 tuned on people's choices: its scaled cosine, about 15 to 25."""
    from open_clip import OPENAI_DATASET_MEAN, OPENAI_DATASET_STD
    from transformers import AutoTokenizer, CLIPModel
    folder = weights_of("pickscore")
    model = CLIPModel.from_pretrained(folder).to(device).eval().requires_grad_(False)
    tokenizer = AutoTokenizer.from_pretrained(folder)

    def encode_text(texts):
        tokens = tokenizer(texts, padding=True, truncation=True, max_length=77, return_tensors="pt").to(device)
        return model.text_projection(model.text_model(**tokens).pooler_output)

    tower = Tower(lambda pixels: model.visual_projection(model.vision_model(pixels).pooler_output), encode_text,
                  model.config.vision_config.image_size, OPENAI_DATASET_MEAN, OPENAI_DATASET_STD)
    return lambda images, prompts: model.logit_scale.exp() * tower.cosine(images, prompts)


# ---------------------------------------------------------------------------------------------
# Perceptual quality: MANIQA
# ---------------------------------------------------------------------------------------------

def optional(package, reward):
    """The imported package, or an ImportError that says how to get it."""
    try:
        return importlib.import_module(package)
    except ImportError:
        raise ImportError(f"reward {reward!r} needs {package}: pip install {package}") from None


def random_crops(images, crops=20, size=224):
    """The same windows of every image, drawn with a fixed seed: (B, 3, H, W) -> (B, crops, 3, size, size)."""
    short = min(images.shape[2:])
    if short < size:
        images = vision.resize(images, size, vision.InterpolationMode.BICUBIC, antialias=True).clamp(0, 1)
    rng = torch.Generator().manual_seed(0)
    tops, lefts = (torch.randint(side - size + 1, (crops,), generator=rng).tolist() for side in images.shape[2:])
    return torch.stack([images[:, :, top:top + size, left:left + size] for top, left in zip(tops, lefts)], dim=1)


@register("maniqa")
def maniqa(device):
    """MANIQA (arXiv 2204.08958) trained on KonIQ: twice the mean score of 20 random crops of 224 pixels."""
    metric = optional("pyiqa", "maniqa").create_metric("maniqa", device=device, test_sample=1)

    def reward(images, prompts):
        crops = random_crops(images)                                                               # (B, 20, 3, 224, 224)
        scores = torch.cat([metric(chunk).flatten() for chunk in crops.flatten(0, 1).split(40)])
        return 2 * scores.view(crops.shape[:2]).mean(dim=1)
    return reward


# ---------------------------------------------------------------------------------------------
# Realism: three questions to a vision-language model
# ---------------------------------------------------------------------------------------------

QUESTIONS = {
    "label": ("This picture was generated for the text: \"{prompt}\". Judge it by five criteria, each worth 0 to 1 points: it shows "
              "what the text asks for; its subject is complete; it looks real and plausible; it is sharp and clear; it has no noise "
              "or artifacts. Name the weakest point in a few words, then give the sum, from 0 to 5. ", 5),
    "fake": ("Look closely: was this picture made by an AI? Give 0 points if it was and 1 point if it is a real photograph. ", 1),
    "weird": ("Look closely: is anything about this picture strange? Give 0 points if something is and 1 point if nothing is. ", 1),
}
ANSWER_FORMAT = 'End your answer with one line of JSON: {"score": NUMBER}'


def parse_score(answer, highest):
    """The last "score": NUMBER of an answer, or None where there is none from 0 to `highest`."""
    found = re.findall(r'"?score"?\s*[:=]\s*(-?\d+(?:\.\d+)?)', answer, re.IGNORECASE)
    return float(found[-1]) if found and 0 <= float(found[-1]) <= highest else None


class VisionLanguageModel:
    """Qwen2.5-VL: images and one question each -> answers as texts, a batch in one call."""

    def __init__(self, device):
        from transformers import AutoModelForImageTextToText, AutoProcessor
        folder = weights_of("qwen")
        self.processor = AutoProcessor.from_pretrained(folder)
        dtype = torch.bfloat16 if torch.device(device).type == "cuda" else torch.float32
        model = AutoModelForImageTextToText.from_pretrained(folder, dtype=dtype)
        self.model = model.to(device).eval().requires_grad_(False)

    def __call__(self, images, questions, attempt):
        chats = [[{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": question}]}]
                 for question in questions]
        texts = [self.processor.apply_chat_template(chat, add_generation_prompt=True, tokenize=False) for chat in chats]
        pictures = list((images * 255).round().to(torch.uint8))
        inputs = self.processor(text=texts, images=pictures, padding=True, padding_side="left", return_tensors="pt")
        how = dict(do_sample=attempt > 0) | (dict(temperature=0.6) if attempt else {})   # asked again, it may say something else
        with torch.random.fork_rng(devices=[images.device] if images.is_cuda else []):
            torch.manual_seed(attempt)
            answers = self.model.generate(**inputs.to(self.model.device), max_new_tokens=128, **how)
        return self.processor.batch_decode(answers[:, inputs["input_ids"].shape[1]:], skip_special_tokens=True)


@functools.cache
def vision_language_model(device):
    return VisionLanguageModel(device)


class Ask:
    """The reward from one question: a quarter of the points in the answer, as in the official code.

    An image whose answer has no points is asked about again, twice at most, and is then missing: NaN."""
    may_miss = True

    def __init__(self, question, device, micro_batch=16):
        (self.question, self.highest), self.micro_batch = QUESTIONS[question], micro_batch
        self.model = vision_language_model(device)

    def __call__(self, images, prompts):
        scores = torch.full((len(prompts),), math.nan)
        for rows in torch.arange(len(prompts)).split(self.micro_batch):
            for attempt in range(3):
                rows = rows[scores[rows].isnan()]
                if len(rows):
                    questions = [self.question.format(prompt=prompts[i]) + ANSWER_FORMAT for i in rows.tolist()]
                    for i, answer in zip(rows.tolist(), self.model(images[rows], questions, attempt), strict=True):
                        points = parse_score(answer, self.highest)
                        scores[i] = math.nan if points is None else points / 4
        return scores


for question in QUESTIONS:
    register(f"qwen_{question}")(functools.partial(Ask, question))


# ---------------------------------------------------------------------------------------------
# Tasks: is it what was asked for?
# ---------------------------------------------------------------------------------------------

def place_of(box, other, slack=0.1):
    """Where a box (x1, y1, x2, y2) is, seen from the other one: a set of "left of", "above", ... (GenEval's rule)."""
    (x, y), (other_x, other_y) = ((box[0::2].mean(), box[1::2].mean()) for box in (box, other))
    offset = torch.stack([x - other_x, y - other_y])
    sizes = (box[2:] - box[:2]) + (other[2:] - other[:2])
    clear = (offset.abs() - slack * sizes).clamp(min=0) * offset.sign() / offset.norm().clamp(min=1e-6)
    return {name for name, value in zip(("left of", "right of", "above", "below"),
                                        (-clear[0], clear[0], -clear[1], clear[1])) if value > 0.5}


class GenEval:
    """GenEval (arXiv 2310.11513) as a reward: the share of a composition's demands that are met, 1 if all are.

    A COCO detector finds the objects, and CLIP ViT-L/14 names the colour of each one, cut out on grey.
    A demand is an object in its number (exactly, where it is counted), its colour, or its place."""

    def __init__(self, device, micro_batch=8):
        from torchvision.models import detection
        try:
            self.detector = detection.maskrcnn_resnet50_fpn_v2(weights="DEFAULT").to(device).eval().requires_grad_(False)
        except OSError as error:
            url = detection.MaskRCNN_ResNet50_FPN_V2_Weights.DEFAULT.url
            raise FileNotFoundError(f"reward 'geneval' cannot download its detector ({error}); get {url} where there is a "
                                    f"network, and put it into {torch.hub.get_dir()}/checkpoints") from None
        self.tower = open_clip_tower("ViT-L-14-quickgelu", device)
        self.micro_batch = micro_batch

    def colours(self, image, found, name):
        """The colour of each found object, by name."""
        from captions import COLOURS
        grey = torch.full_like(image, 0.6)
        crops = []
        for box, mask in zip(found["boxes"], found["masks"]):
            x1, y1, x2, y2 = box.round().int().tolist()
            alone = torch.where(mask > 0.5, image, grey)[:, y1:max(y2, y1 + 1), x1:max(x2, x1 + 1)]
            crops.append(vision.resize(alone, [224, 224], antialias=True).clamp(0, 1))
        texts = [text.format(colour, name) for colour in COLOURS for text in
                 ("a photo of a {} {}", "a photo of a {}-colored {}", "a photo of a {} object")]
        classes = self.tower.text_features(texts).view(len(COLOURS), 3, -1).mean(dim=1)
        best = (self.tower.image_features(torch.stack(crops)) @ nn.functional.normalize(classes, dim=-1).T).argmax(dim=-1)
        return [COLOURS[k] for k in best.tolist()]

    def judge(self, image, detections, wanted):
        """The share of demands that one image meets."""
        from captions import coco_objects
        met, groups = [], []
        for demand in wanted:
            counted = demand["count"] > 1
            sure = detections["scores"] > (0.9 if counted else 0.3)
            sure &= detections["labels"] == coco_objects()[demand["class"]]
            found = {key: value[sure] for key, value in detections.items()}                        # the surest come first
            n = int(sure.sum())
            met.append(n == demand["count"] if counted else n > 0)
            found = {key: value[:demand["count"]] for key, value in found.items()}
            if "color" in demand:
                colours = self.colours(image, found, demand["class"]) if met[-1] else []
                met.append(colours.count(demand["color"]) == demand["count"])
            if "position" in demand:
                relation, target = demand["position"]
                pairs = [(box, other) for box in found["boxes"] for other in groups[target]["boxes"]]
                met.append(bool(pairs) and all(relation in place_of(*pair) for pair in pairs))
            groups.append(found)
        return sum(met) / len(met)

    def __call__(self, images, prompts):
        from captions import requirements
        wanted = [requirements(prompt) for prompt in prompts]
        detections = [one for chunk in images.float().split(self.micro_batch) for one in self.detector(list(chunk))]
        return torch.tensor([self.judge(*case) for case in zip(images, detections, wanted)])


register("geneval")(GenEval)


def edit_distance(a, b):
    """The fewest insertions, deletions and replacements of single letters that turn a into b (Levenshtein 1966)."""
    row = list(range(len(b) + 1))                # distances of the empty text to every beginning of b
    for i, letter in enumerate(a, start=1):
        diagonal, row[0] = row[0], i
        for j, other in enumerate(b, start=1):
            diagonal, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, diagonal + (letter != other))
    return row[-1]


@register("ocr")
def ocr(device):
    """How well the image spells the text that its prompt puts in double quotes: 1 minus the edit distance over the
    text's length, at least 0; case and spaces do not count."""
    reader = optional("easyocr", "ocr").Reader(["en"], gpu=torch.device(device).type == "cuda", verbose=False)

    def letters(text):
        return re.sub(r"\s+", "", text).lower()

    def reward(images, prompts):
        scores = []
        for image, prompt in zip(images, prompts):
            quoted = re.findall(r'["\u201c]([^"\u201c\u201d]*\S[^"\u201c\u201d]*)["\u201d]', prompt)
            if not quoted:
                raise ValueError(f"reward 'ocr' needs a text in double quotes, but the prompt is {prompt!r}")
            target = letters("".join(quoted))
            pixels = (image * 255).round().byte().permute(1, 2, 0).cpu().numpy()                   # (H, W, 3)
            read = letters("".join(reader.readtext(pixels, detail=0)))
            scores.append(max(0.0, 1 - edit_distance(read, target) / len(target)))
        return torch.tensor(scores)
    return reward


# ---------------------------------------------------------------------------------------------
# Several rewards, added up
# ---------------------------------------------------------------------------------------------

# The paper's eight rewards, each with weight 1, and the part of them that open_clip alone can run, with CLIP-IQA
# in the place of MANIQA.
PAPER = "clip,clip_bin,hpsv2,hpsv2_bin,maniqa,qwen_label,qwen_fake,qwen_weird"
MIXTURES = {"paper_c2i": PAPER, "paper_t2i": PAPER, "paper_lite": "clip,clip_bin,hpsv2,hpsv2_bin,clip_iqa"}


class BadReward(ValueError):
    """A reward gave something that is not one finite number per image."""


class RewardSet:
    """A weighted sum of rewards: {name: (reward, weight)}."""

    def __init__(self, rewards):
        self.rewards = rewards

    @torch.no_grad()
    def __call__(self, images, prompts):
        """images (B, 3, H, W) in [0, 1], prompts B strings -> (total (B,), {name: (B,)}), the parts unweighted.

        NaN means missing, and makes the total missing.  Raises BadReward, with the reward's name and the
        prompt, for a score that is not one finite number per image, unless the reward may miss."""
        parts = {name: checked(name, reward, reward(images, prompts), images, prompts)
                 for name, (reward, _) in self.rewards.items()}
        for tower in LOADED:
            tower.last.clear()                   # the batch is done: its memory is free again
        total = sum(weight * parts[name] for name, (_, weight) in self.rewards.items())
        return total, parts


def checked(name, reward, scores, images, prompts):
    """The scores as float32 on the images' device, if they are (B,) finite numbers (or missing, where that may be)."""
    if not isinstance(scores, torch.Tensor) or scores.shape != (len(prompts),):
        got = tuple(scores.shape) if isinstance(scores, torch.Tensor) else type(scores).__name__
        raise BadReward(f"reward {name!r} must return a tensor of shape ({len(prompts)},), one score per image, "
                         f"not {got}")
    scores = scores.to(images.device, torch.float32)
    fine = torch.isfinite(scores) | (scores.isnan() & getattr(reward, "may_miss", False))
    bad = (~fine).nonzero()[:, 0].tolist()
    if bad:
        raise BadReward(f"reward {name!r} gave {scores[bad[0]].item()} to image {bad[0]}, prompt {prompts[bad[0]]!r}"
                         f" ({len(bad)} of {len(scores)} scores are not finite)")
    return scores


def load_function(path, name):
    """The function or class `name` of the Python file at `path`."""
    if not Path(path).is_file():
        raise ValueError(f"no such reward file: {path} (looked in {Path.cwd()})")
    spec = importlib.util.spec_from_file_location(Path(path).stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    if not callable(getattr(module, name, None)):
        mine = [n for n, value in vars(module).items() if getattr(value, "__module__", "") == spec.name]
        raise ValueError(f"{path} has no function {name!r}; it has {', '.join(mine) or 'none'}")
    return getattr(module, name)


def items_of(spec):
    """The rewards that a text asks for: yields (file or None, name, weight), mixtures spelled out."""
    for item in spec.split(","):
        match = re.fullmatch(r"\s*(?:(?P<file>[^:]+\.py):)?(?P<name>\w+)(?::(?P<weight>[^:]+))?\s*", item)
        if match is None:
            raise ValueError(f"cannot read {item!r} in the reward {spec!r}: write name[:weight] or "
                             "file.py:function[:weight]")
        try:
            weight = float(match["weight"] or 1)
        except ValueError:
            weight = math.nan
        if not math.isfinite(weight):
            raise ValueError(f"the weight of reward {match['name']!r} must be a finite number, not {match['weight']!r}")
        if match["file"] is None and match["name"] in MIXTURES:
            yield from ((file, name, weight * part) for file, name, part in items_of(MIXTURES[match["name"]]))
        else:
            yield match["file"], match["name"], weight


def build_rewards(spec, device):
    """Builds a RewardSet from a text such as "shapes:1,jpeg:0.5", "jpeg", "my_rewards.py:redness:2" or "paper_lite".

    Comma-separated items `name[:weight]` or `file.py:function[:weight]`, weight 1 unless given.  A
    class instead of a function is called with the device, once, and its instance with the images.
    Raises ValueError for anything that cannot be understood or found, before it loads any model."""
    if not spec.strip():
        raise ValueError(f"no reward given: choose with --reward from {known_rewards()}")
    made = {}                                    # name -> how to make the reward, its weight
    for file, name, weight in items_of(spec):
        if name in made:
            raise ValueError(f"reward {name!r} is named twice in {spec!r}: give it once, with the sum of the weights")
        if file:
            reward = load_function(file, name)
            made[name] = (lambda device, it=reward: it(device) if inspect.isclass(it) else it), weight
        elif name in REGISTRY:
            made[name] = REGISTRY[name], weight
        else:
            raise ValueError(f"unknown reward {name!r}: there are {known_rewards()}")
    return RewardSet({name: (make(device), weight) for name, (make, weight) in made.items()})


def known_rewards():
    return f"{', '.join(sorted([*REGISTRY, *MIXTURES]))}, and your own as file.py:function"


# ---------------------------------------------------------------------------------------------
# The command line: score pictures, examine a reward
# ---------------------------------------------------------------------------------------------

def toy_batch(device, prompts=4, samples=8):
    """Pictures that the toy draws before training, (prompts * samples, 3, 24, 24), and their prompts, in groups."""
    import argrpo
    import toy
    model, vq = toy.load("c2i")
    classes = torch.linspace(0, len(toy.CLASSES) - 1, prompts).long()
    tokens, _ = argrpo.generate(model, classes, samples_per_prompt=samples, generator=argrpo.rng_for("cpu", "check"))
    return argrpo.paint(vq, tokens).to(device), [toy.CLASSES[k] for k in classes for _ in range(samples)]


def check(rewards, images, prompts, group_size):
    """Examines a RewardSet on groups of images: yields (what, whether it is all right, the finding in plain words)."""
    original = images.clone()
    start = time.perf_counter()
    total, parts = rewards(images, prompts)
    milliseconds = 1000 * (time.perf_counter() - start) / len(prompts)
    yield "shape", True, f"one number per image, {tuple(total.shape)} for {len(prompts)} images"
    yield "input", torch.equal(images, original), ("leaves the images as they are" if torch.equal(images, original) else
                                                   "changes the images in place: work on a copy")
    missing = total.isnan().float().mean().item()
    yield "missing", missing < 0.5, f"{missing:.0%} of the images got no score" + (
        "; images without a score teach nothing" if missing else "")
    known = total[~total.isnan()]
    if not len(known):
        return
    yield "range", True, f"from {known.min():.4g} to {known.max():.4g}, mean {known.mean():.4g}"

    def same(scores):
        return torch.allclose(scores, total, rtol=1e-3, atol=1e-4 * max(1.0, known.abs().max().item()), equal_nan=True)

    again = same(rewards(images, prompts)[0])
    yield "repeatable", again, "the same images get the same scores again" if again else (
        "the same images get other scores the second time: seed what is random in it")
    order = torch.arange(len(prompts) - 1, -1, -1)
    turned = same(rewards(images[order.to(images.device)], [prompts[i] for i in order])[0][order.to(total.device)])
    alone = same(torch.cat([rewards(images[i:i + 1], prompts[i:i + 1])[0] for i in range(len(prompts))]))
    yield "order", turned, "the order of the batch does not matter" if turned else "an image's score depends on its place in the batch"
    yield "batch", alone, "an image scores alone as it does in the batch" if alone else (
        "an image's score depends on the others in the batch, or on the batch's size")
    groups = total.view(-1, group_size)
    spread, flat = groups.std(dim=1).nanmean().item(), (groups.amax(1) == groups.amin(1)).float().mean().item()
    yield "spread", flat < 1, f"standard deviation {spread:.4g} within the groups, {flat:.0%} of them without any" + (
        ": images of one prompt all score the same, so there is nothing to learn from" if flat == 1 else "")
    other = rewards(images, prompts[group_size:] + prompts[:group_size])[0] if len(set(prompts)) > 1 else total
    yield "prompt", True, "does not depend on the prompt" if same(other) else "depends on the prompt"
    yield "speed", True, f"{milliseconds:.2f} ms per image, the first time, on {images.device}"


def main(argv=None):
    parser = argparse.ArgumentParser(description="Scores pictures with a reward, or examines the reward itself.")
    parser.add_argument("images", nargs="*", help="pictures to score")
    parser.add_argument("--reward", metavar="SPEC", help="the reward, as for training: name:weight,... or file.py:function")
    parser.add_argument("--check", metavar="SPEC", help="examine this reward on pictures of the toy")
    parser.add_argument("--prompt", help="the prompt of the pictures")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args(argv)
    if bool(args.check) == bool(args.reward) or (args.reward and not args.images):
        parser.error("give --check SPEC, or --reward SPEC with pictures")
    try:
        rewards = build_rewards(args.check or args.reward, args.device)
        if args.check:
            images, prompts = toy_batch(args.device)
            findings = list(check(rewards, images, [args.prompt] * len(prompts) if args.prompt else prompts, 8))
            for what, good, finding in findings:
                print(f"{'ok ' if good else 'BAD'}  {what:<10}  {finding}")
            return sum(not good for _, good, _ in findings)
        for path in args.images:                 # one by one, for they may differ in size
            image = vision.pil_to_tensor(Image.open(path).convert("RGB")).to(args.device)[None] / 255
            total, parts = rewards(image, [args.prompt or ""])
            print(json.dumps({"image": path, "reward": total.item()} | {name: part.item() for name, part in parts.items()}))
        return 0
    except (ValueError, OSError, ImportError, RuntimeError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
