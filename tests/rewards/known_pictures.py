"""Pictures of which it is known what they show: (3, 256, 256) in [0, 1]."""

import importlib.util
from pathlib import Path

import torch
from PIL import Image, ImageDraw, ImageFont
from torchvision.transforms import functional as vision

from rewards.__main__ import read_picture

SIDE = 256                                       # pixels

# ImageNet's name of what a photograph shows -> the package that it comes with, and its file there.
PHOTOS = {
    "palace": ("sklearn", "datasets/images/china.jpg"),
    "daisy": ("sklearn", "datasets/images/flower.jpg"),
    "espresso": ("skimage", "data/coffee.png"),
    "missile": ("skimage", "data/rocket.jpg"),
    "tiger cat": ("skimage", "data/chelsea.png"),
}


def packaged_file(package, path):
    """The file of an installed package, which is not imported."""
    return Path(importlib.util.find_spec(package).origin).parent / path


def photo(name):
    """The middle of the photograph of a class: (3, 256, 256)."""
    image = read_picture(packaged_file(*PHOTOS[name]))
    image = vision.resize(image, SIDE, vision.InterpolationMode.BICUBIC, antialias=True)
    return vision.center_crop(image, SIDE).clamp(0, 1)


def noisy(image, amount=0.3):
    """The image with Gaussian noise of this standard deviation, the same every time."""
    noise = torch.randn(image.shape, generator=torch.Generator().manual_seed(0))
    return (image + amount * noise).clamp(0, 1)


def drawn_text(text, height=32, ink=(0, 0, 0), ground=(255, 255, 255), font="DejaVuSans"):
    """The text in the middle of a picture, in letters of a font of `height` pixels."""
    import matplotlib
    picture = Image.new("RGB", (SIDE, SIDE), ground)
    file = Path(matplotlib.get_data_path()) / "fonts" / "ttf" / f"{font}.ttf"
    ImageDraw.Draw(picture).text((SIDE / 2, SIDE / 2), text, fill=ink, anchor="mm",
                                 font=ImageFont.truetype(str(file), height))
    return vision.to_tensor(picture)
