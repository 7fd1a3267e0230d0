"""FID and its kin: pictures as the usual evaluators read them, and torch-fidelity's answer.

torch-fidelity's FID takes the features of the original TensorFlow Inception, as ADM's evaluator
does.  Three things differ from that evaluator.  ADM's reference batch holds 10,000 pictures, and
beside them the moments of all of ImageNet: its FID takes the moments, this one the pictures, which
makes it larger.  Precision and recall are those of arXiv 1904.06991 with 3 neighbours in both, but
here on all pictures.  And pictures of 384 pixels become 256 by torch's bicubic filter, antialiased.
So compare numbers of one protocol only.
"""

import numpy as np
import torch
import torch.nn.functional as F


def as_uint8(images, size=None):
    """(B, 3, H, W) in [0, 1] -> (B, h, w, 3) uint8, resized to at most size x size."""
    if size is not None and images.shape[-1] > size:
        images = F.interpolate(images, size=(size, size), mode="bicubic", antialias=True)
    return (images.clamp(0, 1) * 255).round().to(torch.uint8).permute(0, 2, 3, 1).numpy()


class Pictures(torch.utils.data.Dataset):
    """Pictures (n, H, W, 3) uint8, or those of an .npz's `arr_0`, as torch-fidelity wants them."""

    def __init__(self, pictures):
        self.images = pictures if isinstance(pictures, np.ndarray) else np.load(pictures)["arr_0"]

    def __len__(self):
        return len(self.images)

    def __getitem__(self, i):
        return torch.from_numpy(self.images[i]).permute(2, 0, 1)             # (3, H, W) uint8


class ShardedPictures(torch.utils.data.Dataset):
    """The pictures of files of `per_file` pictures each, read when they are asked for, and resized
    to 256 pixels at most, as the usual reference batch is."""

    def __init__(self, files, per_file, count):
        self.files, self.per_file, self.count = files, per_file, count
        self.last = None, None                   # (file's number, its pictures)

    def __len__(self):
        return self.count

    def __getitem__(self, i):
        k, place = divmod(i, self.per_file)
        if self.last[0] != k:
            with np.load(self.files[k]) as file:
                images = torch.from_numpy(file["images"]).permute(0, 3, 1, 2) / 255
            self.last = k, torch.from_numpy(as_uint8(images, 256)).permute(0, 3, 1, 2)
        return self.last[1][place]


def fidelity(pictures, reference, option, **how):
    """torch-fidelity's figures of a Pictures against a Pictures or a folder of real images."""
    try:
        from torch_fidelity import calculate_metrics
    except ImportError:
        raise ImportError(f"{option} needs torch-fidelity: pip install torch-fidelity") from None
    return calculate_metrics(input1=pictures, input2=reference, fid=True, verbose=False,
                             cuda=torch.cuda.is_available(), **how)


def print_fid(npz, reference):
    """FID of the .npz against a folder or an .npz of real images, and its Inception Score."""
    print(fidelity(Pictures(npz), real_pictures(reference), "--fid-reference", isc=True))


def real_pictures(reference):
    """A Pictures of an .npz, or the path of a folder."""
    return Pictures(reference) if str(reference).endswith(".npz") else str(reference)


def fid_of_pictures(pictures, reference):
    """FID, Inception Score, precision and recall of a dataset of pictures, by name."""
    found = fidelity(pictures, real_pictures(reference), "--reference", isc=True, prc=True)
    return {"FID": found["frechet_inception_distance"],
            "Inception Score": found["inception_score_mean"],
            "precision": found["precision"], "recall": found["recall"]}
