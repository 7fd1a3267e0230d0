"""FID in the toy's world: its own pictures against rendered scenes, by its tokenizer's features.

The same library and the same formula as for real pictures.  Only Inception is exchanged: it knows
nothing of 24 pixels, and would have to be downloaded.
"""

import random

import torch

from toy.models import load
from toy.scenes import make_scene, render


def scenes_of(texts, seed=0):
    """A rendered scene for each of the texts: (n, 24, 24, 3) uint8."""
    rng = random.Random(seed)
    images = render([make_scene(text, rng) for text in texts])
    return images.mul(255).round().byte().permute(0, 2, 3, 1).numpy()


def register_features():
    """Registers the extractor "toy" with torch-fidelity, once: the tokenizer's features before
    quantisation, 288 numbers a picture."""
    from torch_fidelity import FeatureExtractorBase, registry

    class ToyFeatures(FeatureExtractorBase):
        def __init__(self, name, features_list, **how):
            super().__init__(name, features_list)
            _, self.vq = load("c2i")

        @staticmethod
        def get_provided_features_list():
            return ("tokens",)

        @staticmethod
        def get_default_feature_layer_for_metric(metric):
            return "tokens"

        @torch.no_grad()
        def forward(self, pictures):             # (B, 3, 24, 24) uint8
            return (self.vq.features(pictures.float() / 127.5 - 1).flatten(1),)

    if "toy" not in registry.FEATURE_EXTRACTORS_REGISTRY:
        registry.register_feature_extractor("toy", ToyFeatures)


def fid_of_toy(pictures, texts):
    """FID, precision and recall of pictures (n, 24, 24, 3) uint8 with these prompts, by name."""
    from harness.fid import Pictures, fidelity
    register_features()
    found = fidelity(Pictures(pictures), Pictures(scenes_of(texts)), "FID", prc=True,
                     feature_extractor="toy", save_cpu_ram=True)
    return {"FID (toy's features)": found["frechet_inception_distance"],
            "precision (toy's)": found["precision"], "recall (toy's)": found["recall"]}
