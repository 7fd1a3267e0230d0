"""Two towers: rewards from the cosine between an image and a text.

An image encoder and a text encoder turn an image and its prompt into vectors of the same length,
C numbers each.  They were trained together, so that the vectors of what belongs together have
similar directions.  The cosine of the two is the score.

Where this departs from the official AR-GRPO code:

1. Class names.  The prompt of a class is "a photo of {name}", as there, but the names are
   open_clip's ("goldfish"); the official ones are ImageNet's synonym lists ("goldfish, Carassius
   auratus").  622 of the 1000 differ.
2. Precision.  On a GPU, the weights of open_clip's towers are in float16.  Officially, CLIP is in
   float32, and HPSv2.1 in float32 under float16 autocast.  On a CPU all of it is float32.
3. Batches.  The official code scores one image at a time, from 8-bit pixels, and resizes with
   PIL.  Here a batch is resized on its device; `tests/rewards/test_reward_models.py` bounds
   the difference.
4. A cosine of exactly 1 falls into the highest bin.  Officially it raises an error.
"""

import functools

import torch
from torch import nn
from torchvision.transforms import functional as vision

from pretrained import load_weights
from reward import BATCH_CACHES, register
from rewards.sources import weights_of


def preprocess(images, size, mean, std):
    """open_clip's own transform, for a batch: (B, 3, H, W) in [0, 1] -> (B, 3, size, size)."""
    bicubic = vision.InterpolationMode.BICUBIC
    images = vision.resize(images.float(), size, bicubic, antialias=True)        # the shorter side
    return vision.normalize(vision.center_crop(images, size).clamp(0, 1), mean, std)


class Tower:
    """An image encoder and a text encoder, and how the first wants its images.

    Asked again about the very same batch, as by a second reward, it answers without computing."""

    def __init__(self, encode_image, encode_text, size, mean, std, micro_batch=32):
        self.encode_image, self.encode_text = encode_image, encode_text
        self.size, self.mean, self.std = size, mean, std
        self.micro_batch = micro_batch
        self.last = {}                           # "images" or "texts" -> (batch, its features)
        BATCH_CACHES.append(self.last)

    def once(self, kind, batch, encode):
        """encode(batch), or what it gave when the last batch of this kind was this very object."""
        if kind not in self.last or self.last[kind][0] is not batch:
            self.last[kind] = batch, encode(batch)
        return self.last[kind][1]

    def image_features(self, images):
        """(B, 3, H, W) in [0, 1] -> (B, C), of length one."""
        return self.once("images", images, self.encode_images)

    def text_features(self, texts):
        """B texts -> (B, C), of length one."""
        return self.once("texts", texts, self.encode_texts)

    def encode_images(self, images):
        features = []
        for chunk in images.split(self.micro_batch):
            pixels = preprocess(chunk, self.size, self.mean, self.std)
            features.append(self.encode_image(pixels).float())
        return nn.functional.normalize(torch.cat(features), dim=-1)

    def encode_texts(self, texts):
        distinct = list(dict.fromkeys(texts))    # equal texts are encoded once
        features = []
        for start in range(0, len(distinct), self.micro_batch):
            chunk = distinct[start:start + self.micro_batch]
            features.append(self.encode_text(chunk).float())
        features = nn.functional.normalize(torch.cat(features), dim=-1)
        return features[[distinct.index(text) for text in texts]]

    def cosine(self, images, prompts):
        """How well each image fits its prompt: (B,) in [-1, 1]."""
        return (self.image_features(images) * self.text_features(prompts)).sum(dim=-1)


def tower_of(model, name, device):
    """The Tower of an open_clip model, in the model's own precision."""
    import open_clip
    model = model.to(device).eval().requires_grad_(False)
    tokenizer = open_clip.get_tokenizer(name)
    how = open_clip.get_model_preprocess_cfg(model)
    dtype = model.visual.conv1.weight.dtype

    def encode_image(pixels):
        return model.encode_image(pixels.to(dtype))

    def encode_text(texts):
        return model.encode_text(tokenizer(texts).to(device))

    return Tower(encode_image, encode_text, how["size"][0], how["mean"], how["std"])


@functools.cache
def open_clip_tower(name, device):
    """The Tower of an open_clip model with the weights of SOURCES; in float16 on a GPU.

    There is one of each, shared by all rewards that use it."""
    import open_clip
    path = weights_of(name)                      # first: without it, the model need not be built
    precision = "fp16" if torch.device(device).type == "cuda" else "fp32"
    model = open_clip.create_model(name, precision=precision, load_weights=False)
    return tower_of(load_weights(model, path), name, device)


def clip_tower(device):
    return open_clip_tower("ViT-B-32-quickgelu", device)     # OpenAI's weights need its quick GELU


def hpsv2_tower(device):
    return open_clip_tower("ViT-H-14", device)


def binned(cosine):
    """The official bins: below 0 -> -1, [0, 0.3) -> 0.5, [0.3, 0.6) -> 1, from 0.6 -> 1.5."""
    edges = cosine.new_tensor([0.0, 0.3, 0.6])
    values = cosine.new_tensor([-1.0, 0.5, 1.0, 1.5])
    return values[torch.bucketize(cosine, edges, right=True)]


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
    """HPSv2.1 (arXiv 2306.09341), a CLIP ViT-H/14 tuned on human preferences.

    5 times its cosine of image and prompt."""
    tower = hpsv2_tower(device)
    return lambda images, prompts: 5 * tower.cosine(images, prompts)


@register("hpsv2_bin")
def hpsv2_bin(device):
    """The same cosine in the paper's four bins."""
    tower = hpsv2_tower(device)
    return lambda images, prompts: binned(tower.cosine(images, prompts))


@register("pickscore")
def pickscore(device):
    """PickScore v1 (arXiv 2305.01569), a CLIP ViT-H/14 tuned on people's choices.

    Its scaled cosine, about 15 to 25.  It comes as a model of the library transformers."""
    from open_clip import OPENAI_DATASET_MEAN, OPENAI_DATASET_STD
    from transformers import AutoTokenizer, CLIPModel
    folder = weights_of("pickscore")
    model = CLIPModel.from_pretrained(folder).to(device).eval().requires_grad_(False)
    tokenizer = AutoTokenizer.from_pretrained(folder)

    def encode_image(pixels):
        return model.visual_projection(model.vision_model(pixels).pooler_output)

    def encode_text(texts):
        tokens = tokenizer(texts, padding=True, truncation=True, max_length=77, return_tensors="pt")
        return model.text_projection(model.text_model(**tokens.to(device)).pooler_output)

    tower = Tower(encode_image, encode_text, model.config.vision_config.image_size,
                  OPENAI_DATASET_MEAN, OPENAI_DATASET_STD)
    return lambda images, prompts: model.logit_scale.exp() * tower.cosine(images, prompts)
