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
from pathlib import Path

import numpy as np
import torch
from PIL import Image

import toy
from harness.compare import SHARD, as_images, read_shard, reduced, shards
from reward import to_uint8

LEAST = 4                    # pictures: each has 3 neighbours
ENDINGS = (".png", ".jpg", ".jpeg")              # of the pictures that torch-fidelity looks for


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


def real_pictures(path):
    """The Pictures of an .npz such as ADM's, or the path of a folder."""
    return Pictures(np.load(path)["arr_0"]) if is_npz(path) else str(path)


def is_npz(path):
    return str(path).lower().endswith(".npz")


def check_reference(path, count, option):
    """Raises ImportError or ValueError if `count` pictures cannot be compared with those at path:
    a folder of pictures of one size, or an .npz with `arr_0` (n, H, W, 3) uint8."""
    library(option)
    if not Path(path).exists():
        raise ValueError(f"{option}: there is no {path}")
    try:
        if is_npz(path):
            real = np.load(path)["arr_0"]
            known, sizes = len(real), {(real.dtype.name, *real.shape[3:])}
            fine = sizes == {("uint8", 3)}
        else:
            files = [file for file in Path(path).iterdir() if file.suffix.lower() in ENDINGS]
            known, sizes = len(files), {Image.open(file).size for file in files}
            fine = len(sizes) <= 1
    except Exception as error:                   # a damaged file can fail anywhere
        raise ValueError(f"{option}: cannot read the pictures of {path} "
                         f"({type(error).__name__}: {error})") from error
    if not fine:
        raise ValueError(f"{option}: {path} must hold pictures of one size, an .npz as arr_0 "
                         f"(n, H, W, 3) of uint8, not {sorted(sizes)}")
    if min(known, count) < LEAST:
        raise ValueError(f"{option} compares {count} pictures with the {known} of {path}: each "
                         f"must be at least {LEAST}")


def library(option):
    """torch-fidelity.  Raises ImportError, naming the option that needs it."""
    try:
        import torch_fidelity
    except ImportError:
        raise ImportError(f"{option} needs torch-fidelity: pip install torch-fidelity") from None
    return torch_fidelity


def figures(pictures, reference, option, **how):
    """torch-fidelity's figures of Pictures against Pictures or a folder of real images."""
    return library(option).calculate_metrics(
        input1=pictures, input2=reference, fid=True, verbose=False,
        cuda=torch.cuda.is_available(), **how)


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
    """FID, precision and recall of Pictures or Shards of the toy with these prompts, by name."""
    register_features()
    found = figures(pictures, Pictures(scenes_of(texts)), "FID", prc=True, feature_extractor="toy",
                    save_cpu_ram=True)
    return {"FID (toy's features)": found["frechet_inception_distance"],
            "precision (toy's)": found["precision"], "recall (toy's)": found["recall"]}


def figures_of(folder, texts, index, settings):
    """FID and its kin by name, of the pictures in a folder, those of texts[index[i]]: against
    settings.reference, or, of the toy, rendered scenes.  Else none."""
    pictures = Shards(folder, len(index))
    if settings.reference:
        found = figures(pictures, real_pictures(settings.reference), "--reference", isc=True,
                        prc=True)
        return {"FID": found["frechet_inception_distance"],
                "Inception Score": found["inception_score_mean"],
                "precision": found["precision"], "recall": found["recall"]}
    if settings.preset == "toy" and find_spec("torch_fidelity") and len(index) >= LEAST:
        return fid_of_toy(pictures, [texts[k] for k in index.tolist()])
    return {}
