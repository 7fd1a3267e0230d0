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
import weakref

import torch
from torch import nn
from torchvision.transforms import functional as vision

from pretrained import load_weights
from reward import register
from rewards.sources import frozen, weights_of

# Names of open_clip.  OpenAI's weights, the first two, need its quick GELU.
CLIP_B, CLIP_L, HPSV2 = "ViT-B-32-quickgelu", "ViT-L-14-quickgelu", "ViT-H-14"


def preprocess(images, size, mean, std):
    """open_clip's own transform, for a batch: (B, 3, H, W) in [0, 1] -> (B, 3, size, size)."""
    bicubic = vision.InterpolationMode.BICUBIC
    images = vision.resize(images.float(), size, bicubic, antialias=True)        # the shorter side
    return vision.normalize(vision.center_crop(images, size).clamp(0, 1), mean, std)


class Tower:
    """An image encoder and a text encoder, functions from a batch to vectors of any length.

    Asked again about the very same images or about equal texts, as by a second reward, it answers
    without computing.  It keeps the last features, but not the images."""

    def __init__(self, encode_image, encode_text, micro_batch=32):
        self.encode_image, self.encode_text = encode_image, encode_text
        self.micro_batch = micro_batch
        self.seen = self.read = None, None       # the last images (a weak reference), their
                                                 # features; the last texts, theirs

    def unit_vectors(self, encode, batch):
        """encode(batch), a micro-batch at a time, as vectors of length one: (B, C)."""
        starts = range(0, len(batch), self.micro_batch)
        vectors = [encode(batch[start:start + self.micro_batch]).float() for start in starts]
        return nn.functional.normalize(torch.cat(vectors), dim=-1)

    def image_features(self, images):
        """(B, 3, H, W) in [0, 1] -> (B, C), of length one."""
        last, features = self.seen
        if last is None or last() is not images:
            features = self.unit_vectors(self.encode_image, images)
            self.seen = weakref.ref(images), features
        return features

    def text_features(self, texts):
        """B texts -> (B, C), of length one."""
        distinct = list(dict.fromkeys(texts))    # equal texts are encoded once
        if self.read[0] != distinct:
            self.read = distinct, self.unit_vectors(self.encode_text, distinct)
        return self.read[1][[distinct.index(text) for text in texts]]

    def cosine(self, images, prompts):
        """How well each image fits its prompt: (B,) in [-1, 1]."""
        return (self.image_features(images) * self.text_features(prompts)).sum(dim=-1)


def tower_of(model, name, device):
    """The Tower of an open_clip model, in the model's own precision."""
    import open_clip
    model = frozen(model, device)
    tokenizer = open_clip.get_tokenizer(name)
    how = open_clip.get_model_preprocess_cfg(model)
    dtype = model.visual.conv1.weight.dtype

    def encode_image(images):
        pixels = preprocess(images, how["size"][0], how["mean"], how["std"])
        return model.encode_image(pixels.to(dtype))

    return Tower(encode_image, lambda texts: model.encode_text(tokenizer(texts).to(device)))


@functools.cache
def open_clip_tower(name, device):
    """The Tower of an open_clip model with the weights of SOURCES; in float16 on a GPU.

    There is one of each, shared by all rewards that use it."""
    import open_clip
    path = weights_of(name)                      # first: without it, the model need not be built
    precision = "fp16" if torch.device(device).type == "cuda" else "fp32"
    model = open_clip.create_model(name, precision=precision, load_weights=False)
    return tower_of(load_weights(model, path), name, device)


# ---------------------------------------------------------------------------------------------
# The rewards
# ---------------------------------------------------------------------------------------------

def times_five(cosine):
    return 5 * cosine


def binned(cosine):
    """The official bins: below 0 -> -1, [0, 0.3) -> 0.5, [0.3, 0.6) -> 1, from 0.6 -> 1.5."""
    edges = cosine.new_tensor([0.0, 0.3, 0.6])
    values = cosine.new_tensor([-1.0, 0.5, 1.0, 1.5])
    return values[torch.bucketize(cosine, edges, right=True)]


class Cosine:
    """A reward (B,) that is a function of the cosine (B,) of image and prompt."""

    def __init__(self, tower, score):
        self.tower, self.score = tower, score

    def __call__(self, images, prompts):
        return self.score(self.tower.cosine(images, prompts))


@register("clip")
class Clip(Cosine):
    """CLIP ViT-B/32 (arXiv 2103.00020): 5 times the cosine of image and prompt."""

    def __init__(self, device):
        super().__init__(open_clip_tower(CLIP_B, device), times_five)
        self.device = device

    def features(self, images):
        """images (B, 3, H, W) in [0, 1] -> (B, 768), of length one: those of the larger ViT-L/14,
        so that a policy which learned to please the ViT-B/32 is compared by other eyes."""
        return open_clip_tower(CLIP_L, self.device).image_features(images)


@register("clip_bin")
def clip_bin(device):
    """The same cosine in the paper's four bins."""
    return Cosine(open_clip_tower(CLIP_B, device), binned)


@register("hpsv2")
def hpsv2(device):
    """HPSv2.1 (arXiv 2306.09341), a CLIP ViT-H/14 tuned on human preferences.

    5 times its cosine of image and prompt."""
    return Cosine(open_clip_tower(HPSV2, device), times_five)


@register("hpsv2_bin")
def hpsv2_bin(device):
    """The same cosine in the paper's four bins."""
    return Cosine(open_clip_tower(HPSV2, device), binned)


@register("pickscore")
def pickscore(device):
    """PickScore v1 (arXiv 2305.01569), a CLIP ViT-H/14 tuned on people's choices.

    Its scaled cosine, about 15 to 25.  It comes as a model of the library transformers."""
    from open_clip import OPENAI_DATASET_MEAN, OPENAI_DATASET_STD
    from transformers import AutoTokenizer, CLIPModel
    folder = weights_of("pickscore")
    model = frozen(CLIPModel.from_pretrained(folder), device)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    size = model.config.vision_config.image_size

    def encode_image(images):
        pixels = preprocess(images, size, OPENAI_DATASET_MEAN, OPENAI_DATASET_STD)
        return model.visual_projection(model.vision_model(pixels).pooler_output)

    def encode_text(texts):
        tokens = tokenizer(texts, padding=True, truncation=True, max_length=77, return_tensors="pt")
        return model.text_projection(model.text_model(**tokens.to(device)).pooler_output)

    return Cosine(Tower(encode_image, encode_text), lambda cosine: model.logit_scale.exp() * cosine)
