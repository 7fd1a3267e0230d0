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
from torch.utils.data import ConcatDataset, Dataset

import toy
from harness.compare import SHARD, as_images, read_shard, read_shards, reduced, shards
from reward import to_uint8

LEAST = 4                    # pictures: each has 3 neighbours
ENDINGS = (".png", ".jpg", ".jpeg")              # of the pictures that torch-fidelity looks for
MODELS = ("inception-v3-compat", "vgg16")        # its names for what FID, and precision, look with


class Shards(Dataset):
    """The first `count` pictures (3, H, W) uint8 of a folder of shards, each file read when it is
    asked for; of 256 pixels at most, as the usual reference batch is."""

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


def check_reference(path, count):
    """Raises ImportError, OSError or ValueError if `count` pictures cannot be compared with those
    of --reference: a folder of pictures of one size, or an .npz with `arr_0` (n, H, W, 3) uint8.

    torch-fidelity's models are downloaded if need be."""
    if find_spec("torch_fidelity") is None:
        raise ImportError("--reference needs torch-fidelity: pip install torch-fidelity")
    try:
        if Path(path).is_dir():
            files = [file for file in Path(path).iterdir() if file.suffix.lower() in ENDINGS]
            known, sizes = len(files), {Image.open(file).size for file in files}
            fine = len(sizes) <= 1
        else:
            real = np.load(path)["arr_0"]
            known, sizes = len(real), {(real.dtype.name, *real.shape[3:])}
            fine = sizes == {("uint8", 3)}
    except Exception as error:                   # a damaged file can fail anywhere
        raise ValueError(f"--reference: cannot read the pictures of {path} "
                         f"({type(error).__name__}: {error})") from error
    if not fine:
        raise ValueError(f"--reference {path} must hold pictures of one size, an .npz as arr_0 "
                         f"(n, H, W, 3) of uint8, not {sorted(sizes)}")
    if min(known, count) < LEAST:
        raise ValueError(f"--reference compares {count} pictures with the {known} of {path}: each "
                         f"must be at least {LEAST}")
    from torch_fidelity.registry import FEATURE_EXTRACTORS_REGISTRY
    for name in MODELS:
        kind = FEATURE_EXTRACTORS_REGISTRY[name]
        try:
            kind(name, kind.get_provided_features_list()[:1])
        except OSError as error:
            raise OSError(f"--reference cannot download the model {name} ({error}): get it where "
                          f"there is a network, into {torch.hub.get_dir()}/checkpoints") from error


def fid_of_real(pictures, reference, device):
    """FID, Inception Score, precision and recall, by name, of a Dataset of pictures against the
    real ones at the path `reference`, computed on the device."""
    import torch_fidelity
    real = str(reference)
    if not Path(real).is_dir():
        real = ConcatDataset([torch.from_numpy(np.load(real)["arr_0"]).movedim(-1, 1)])
    found = torch_fidelity.calculate_metrics(input1=pictures, input2=real, fid=True, isc=True,
                                             prc=True, verbose=False, cuda=device.type == "cuda")
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


@torch.no_grad()
def toy_features(pictures):
    """The tokenizer's features before quantisation: (n, 24, 24, 3) uint8 -> (n, 288)."""
    _, vq = toy.load("c2i")
    batches = torch.from_numpy(pictures).movedim(-1, 1).contiguous().split(64)   # (64, 3, 24, 24)
    return torch.cat([vq.features(batch.float() / 127.5 - 1).flatten(1) for batch in batches])


def fid_of_toy(pictures, texts):
    """FID, precision and recall, by name, of pictures (n, 24, 24, 3) uint8 of the toy with these
    prompts, against rendered scenes."""
    from torch_fidelity.metric_fid import fid_features_to_statistics, fid_statistics_to_metric
    from torch_fidelity.metric_prc import prc_features_to_metric
    drawn, real = toy_features(pictures), toy_features(scenes_of(texts))
    found = prc_features_to_metric(drawn, real, save_cpu_ram=True, verbose=False)
    found |= fid_statistics_to_metric(fid_features_to_statistics(drawn),
                                      fid_features_to_statistics(real), verbose=False)
    return {"FID (toy's features)": found["frechet_inception_distance"],
            "precision (toy's)": found["precision"], "recall (toy's)": found["recall"]}


def figures_of(folder, texts, settings, device):
    """FID and its kin by name, of the pictures in a folder, settings.samples of each text: against
    settings.reference, or, of the toy, rendered scenes.  Else none."""
    drawn = [text for text in texts for _ in range(settings.samples)]
    if settings.reference:
        return fid_of_real(Shards(folder, len(drawn)), settings.reference, device)
    if settings.preset == "toy" and find_spec("torch_fidelity") and len(drawn) >= LEAST:
        return fid_of_toy(read_shards(folder), drawn)
    return {}
