"""What rewards with models share: where the models come from, clear errors for those that cannot be
had, and how they are asked about many images."""

import importlib

import torch

from pretrained import fetch

# A Hugging Face repository, a file of one as repo:file, or a local path of your own.
SOURCES = {
    "ViT-B-32-quickgelu": "timm/vit_base_patch32_clip_224.openai:open_clip_model.safetensors",
    "ViT-L-14-quickgelu": "timm/vit_large_patch14_clip_224.openai:open_clip_model.safetensors",
    "ViT-H-14": "xswu/HPSv2:HPS_v2.1_compressed.pt",
    "aesthetic": "trl-lib/ddpo-aesthetic-predictor:aesthetic-model.pth",
    "pickscore": "yuvalkirstain/PickScore_v1",
    "qwen": "Qwen/Qwen2.5-VL-3B-Instruct",
}

# What is wanted of a repository.  Some hold the same weights as pytorch_model*.bin again.
FILES = ["*.safetensors", "*.json", "*.txt", "*.jinja"]


def weights_of(name):
    """The local path of a model's weights, downloaded if need be.  Errors are those of `fetch`."""
    return fetch(SOURCES[name], "download it where there is a network, and set HF_HOME to a copy "
                                "of that Hugging Face cache", FILES)


def in_parts(function, images, size):
    """function(images), `size` images at a time, which bounds its memory."""
    return torch.cat([function(part) for part in images.split(size)])


def frozen(model, device):
    """The model on the device, to be asked and not to be trained."""
    return model.to(device).eval().requires_grad_(False)


def optional(package, reward, install="-r requirements-rewards.txt"):
    """The imported package, or an ImportError that says how to get it."""
    try:
        return importlib.import_module(package)
    except ImportError:
        raise ImportError(f"reward {reward!r} needs the package {package}: "
                          f"pip install {install}") from None


def with_weights(reward, make, weights):
    """make(weights=weights), a model of torchvision, or a FileNotFoundError that says how to get
    its weights."""
    try:
        return make(weights=weights)
    except OSError as error:
        raise FileNotFoundError(f"reward {reward!r} cannot download its model ({error}); get "
                                f"{weights.url} where there is a network, and put it into "
                                f"{torch.hub.get_dir()}/checkpoints") from None
