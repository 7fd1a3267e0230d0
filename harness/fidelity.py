"""FID and its kin: pictures as torch-fidelity wants them, and its answer.

torch-fidelity's FID takes the features of the original TensorFlow Inception, as ADM's evaluator
does.  Three things differ from that evaluator.  ADM's reference batch holds 10,000 pictures, and
beside them the moments of all of ImageNet: its FID takes the moments, this one the pictures, which
makes it larger.  Precision and recall are those of arXiv 1904.06991 with 3 neighbours in both, but
here on all pictures.  And pictures of 384 pixels become 256 by torch's bicubic filter, antialiased.
So compare numbers of one protocol only.

For the toy the library and the formula are the same; only Inception is exchanged for the toy's
tokenizer.  Inception knows nothing of 24 pixels, and would have to be downloaded.
"""

import random
from importlib.util import find_spec

import numpy as np
import torch

import toy
from harness.compare import SHARD, as_images, read_shard, read_shards, reduced, shards
from reward import to_uint8


class Pictures(torch.utils.data.Dataset):
    """Pictures (n, H, W, 3) uint8 for torch-fidelity."""

    def __init__(self, pictures):
        self.pictures = pictures

    def __len__(self):
        return len(self.pictures)

    def __getitem__(self, i):
        return torch.from_numpy(self.pictures[i]).permute(2, 0, 1)           # (3, H, W)


class Shards(torch.utils.data.Dataset):
    """The first `count` pictures of a folder of shards, each file read when it is asked for; of 256
    pixels at most, as the usual reference batch is."""

    def __init__(self, folder, count):
        self.files, self.count = shards(folder), count
        self.last = None, None                   # (file's number, its pictures (n, 3, H, W))

    def __len__(self):
        return self.count

    def __getitem__(self, i):
        k, place = divmod(i, SHARD)
        if self.last[0] != k:
            images = reduced(as_images(read_shard(self.files[k])), 256)
            self.last = k, to_uint8(images).permute(0, 3, 1, 2)
        return self.last[1][place]


def figures(pictures, reference, option, **how):
    """torch-fidelity's figures of Pictures against Pictures or a folder of real images."""
    try:
        from torch_fidelity import calculate_metrics
    except ImportError:
        raise ImportError(f"{option} needs torch-fidelity: pip install torch-fidelity") from None
    return calculate_metrics(input1=pictures, input2=reference, fid=True, verbose=False,
                             cuda=torch.cuda.is_available(), **how)


def real_pictures(path):
    """The Pictures of an .npz such as ADM's, or the path of a folder."""
    return Pictures(np.load(path)["arr_0"]) if str(path).endswith(".npz") else str(path)


def print_fid(npz, reference):
    """FID of the .npz against a folder or an .npz of real images, and its Inception Score."""
    print(figures(real_pictures(npz), real_pictures(reference), "--fid-reference", isc=True))


def fid_of_pictures(folder, count, reference):
    """FID, Inception Score, precision and recall of a folder of shards, by name."""
    found = figures(Shards(folder, count), real_pictures(reference), "--reference", isc=True,
                    prc=True)
    return {"FID": found["frechet_inception_distance"],
            "Inception Score": found["inception_score_mean"],
            "precision": found["precision"], "recall": found["recall"]}


# ---------------------------------------------------------------------------------------------
# The toy's
# ---------------------------------------------------------------------------------------------

def scenes_of(texts, seed=0):
    """A rendered scene for each of the texts: (n, 24, 24, 3) uint8."""
    rng = random.Random(seed)
    return to_uint8(toy.render([toy.make_scene(text, rng) for text in texts])).numpy()


def register_features():
    """Registers the extractor "toy" with torch-fidelity, once: the tokenizer's features before
    quantisation, 288 numbers a picture."""
    from torch_fidelity import FeatureExtractorBase, registry

    class ToyFeatures(FeatureExtractorBase):
        def __init__(self, name, features_list, **how):
            super().__init__(name, features_list)
            _, self.vq = toy.load("c2i")

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
    register_features()
    found = figures(Pictures(pictures), Pictures(scenes_of(texts)), "FID", prc=True,
                    feature_extractor="toy", save_cpu_ram=True)
    return {"FID (toy's features)": found["frechet_inception_distance"],
            "precision (toy's)": found["precision"], "recall (toy's)": found["recall"]}


def figures_of(folder, texts, index, settings):
    """FID and its kin by name, of the pictures in a folder, those of texts[index[i]]: against
    settings.reference, or, of the toy, rendered scenes.  Else none."""
    if settings.reference:
        return fid_of_pictures(folder, len(index), settings.reference)
    if settings.preset == "toy" and find_spec("torch_fidelity"):
        return fid_of_toy(read_shards(folder), [texts[k] for k in index.tolist()])
    return {}
