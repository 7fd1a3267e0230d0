"""FID: pictures as the usual evaluators read them, and torch-fidelity's answer."""

import numpy as np
import torch
import torch.nn.functional as F


def as_uint8(images, size=None):
    """(B, 3, H, W) in [0, 1] -> (B, h, w, 3) uint8, resized to at most size x size."""
    if size is not None and images.shape[-1] > size:
        images = F.interpolate(images, size=(size, size), mode="bicubic", antialias=True)
    return (images.clamp(0, 1) * 255).round().to(torch.uint8).permute(0, 2, 3, 1).numpy()


class Pictures(torch.utils.data.Dataset):
    """The pictures of an .npz, as torch-fidelity wants them."""

    def __init__(self, path):
        self.images = np.load(path)["arr_0"]

    def __len__(self):
        return len(self.images)

    def __getitem__(self, i):
        return torch.from_numpy(self.images[i]).permute(2, 0, 1)             # (3, H, W) uint8


def print_fid(npz, reference):
    """FID of the .npz against a folder or an .npz of real images, and its Inception Score."""
    try:
        from torch_fidelity import calculate_metrics
    except ImportError:
        raise ImportError("--fid-reference needs torch-fidelity: "
                          "pip install torch-fidelity") from None
    other = str(reference)
    if other.endswith(".npz"):
        other = Pictures(reference)
    print(calculate_metrics(input1=Pictures(npz), input2=other, fid=True, isc=True,
                            cuda=torch.cuda.is_available()))
