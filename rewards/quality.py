"""Quality of an image as such: the prompt does not matter.

Where this departs from what was published:

1. CLIP-IQA runs on CLIP ViT-B/32, which the reward "clip" has loaded already.  Its paper used
   CLIP's ResNet-50 without positional embedding, for images of any size.  AR-GRPO does not use it:
   it takes MANIQA's place in the mixture "paper_lite", because it needs no further package.
2. MANIQA's random crops are the same windows of every image, every time, so that images are
   compared fairly and a run repeats.  The official code draws new ones for each image.  They have
   225 pixels a side, of which pyiqa takes 224: it would enlarge, and so blur, a window of 224.
3. On a GPU, MANIQA multiplies in TF32, which keeps 10 of float32's 23 bits of mantissa.  By how
   much that changes its scores was not measured.
"""

from contextlib import contextmanager

import numpy as np
import torch
from torch import nn
from torchvision.transforms import functional as vision

from pretrained import load_weights
from reward import register
from rewards.clip import CLIP_B, CLIP_L, open_clip_tower
from rewards.sources import frozen, in_parts, optional, weights_of


@register("clip_iqa")
class ClipIqa:
    """CLIP-IQA (arXiv 2207.12396), quality without a reference.

    Twice the probability that CLIP prefers "Good photo." to "Bad photo." for the image: in [0, 2],
    the range of MANIQA's reward."""
    antonyms = ["Good photo.", "Bad photo."]

    def __init__(self, device):
        self.tower = open_clip_tower(CLIP_B, device)

    def __call__(self, images, prompts):
        texts = self.tower.text_features(self.antonyms)                                  # (2, C)
        cosines = self.tower.image_features(images) @ texts.T                            # (B, 2)
        return 2 * (100 * cosines).softmax(dim=-1)[:, 0]


def aesthetic_head():
    """LAION's aesthetic predictor, version 2, in its "layers": CLIP features (B, 768) -> (B, 1)."""
    return nn.ModuleDict({"layers": nn.Sequential(
        nn.Linear(768, 1024), nn.Dropout(0.2),
        nn.Linear(1024, 128), nn.Dropout(0.2),
        nn.Linear(128, 64), nn.Dropout(0.1),
        nn.Linear(64, 16),
        nn.Linear(16, 1),
    )})


@register("aesthetic")
class Aesthetic:
    """LAION's aesthetic head on CLIP ViT-L/14: about 1 to 10."""

    def __init__(self, device):
        self.tower = open_clip_tower(CLIP_L, device)
        head = load_weights(aesthetic_head(), weights_of("aesthetic"))
        self.head = frozen(head, device)["layers"]

    def __call__(self, images, prompts):
        return self.head(self.tower.image_features(images))[:, 0]


def random_crops(images, crops=20, size=225):
    """The same windows of every image, drawn with a fixed seed.

    (B, 3, H, W) -> (B, crops, 3, size, size); an image smaller than a window is enlarged first."""
    if min(images.shape[2:]) < size:
        bicubic = vision.InterpolationMode.BICUBIC
        images = vision.resize(images, size, bicubic, antialias=True).clamp(0, 1)
    height, width = images.shape[2:]
    rng = torch.Generator().manual_seed(0)
    tops = torch.randint(height - size + 1, (crops,), generator=rng).tolist()
    lefts = torch.randint(width - size + 1, (crops,), generator=rng).tolist()
    windows = [images[:, :, top:top + size, left:left + size] for top, left in zip(tops, lefts)]
    return torch.stack(windows, dim=1)


@contextmanager
def private_settings(device):
    """Allows TF32 on a GPU inside.  Restores that, and numpy's random numbers, afterwards."""
    cuda = torch.device(device).type == "cuda"
    flags = (torch.backends.cuda.matmul, torch.backends.cudnn) if cuda else ()
    before, state = [flag.allow_tf32 for flag in flags], np.random.get_state()
    try:
        for flag in flags:
            flag.allow_tf32 = True
        yield
    finally:
        np.random.set_state(state)
        for flag, allowed in zip(flags, before):
            flag.allow_tf32 = allowed


@register("maniqa")
def maniqa(device):
    """MANIQA (arXiv 2204.08958) trained on KonIQ: twice the mean score of 20 random crops."""
    pyiqa = optional("pyiqa", "maniqa", "pyiqa")
    metric = pyiqa.create_metric("maniqa", device=device, test_sample=1)

    def score(crops):
        np.random.seed(0)                        # which 224 of 225 pixels pyiqa draws with numpy
        return metric(crops).flatten()

    def reward(images, prompts):
        crops = random_crops(images)                                     # (B, 20, 3, 225, 225)
        with private_settings(device):
            scores = in_parts(score, crops.flatten(0, 1), 40)
        return 2 * scores.view(crops.shape[:2]).mean(dim=1)

    return reward
