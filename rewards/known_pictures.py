"""Pictures of which it is known what they show: for `python -m rewards --check`, and the tests.

A group is (prompt, [(what it shows, image (3, 256, 256) in [0, 1]), ...]), the best picture first.
"""

import importlib.util
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont, ImageOps
from torchvision.transforms import functional as vision

SIDE = 256                                       # pixels

# ImageNet's name of what a photograph shows -> the package that it comes with, and its file there.
PHOTOS = {
    "palace": ("sklearn", "datasets/images/china.jpg"),
    "daisy": ("sklearn", "datasets/images/flower.jpg"),
    "espresso": ("skimage", "data/coffee.png"),
    "missile": ("skimage", "data/rocket.jpg"),
    "tiger cat": ("skimage", "data/chelsea.png"),
}


def whitest(pixels, mode):
    """What is white in a picture of one channel of integers or floats: the depth of PNG's 16 bits,
    or for floats the first of the usual ranges that holds them.  Raises ValueError for others."""
    low, high = pixels.min(), pixels.max()
    for white in (65535,) if mode.startswith("I") else (1, 255, 65535):
        if 0 <= low and high <= white:
            return white
    raise ValueError(f"its numbers, from {low:g} to {high:g}, do not say what is white: save it "
                     "with 8 or 16 bits")


def read_picture(path):
    """A file's picture: (3, H, W) in [0, 1], turned as its EXIF says, on white where transparent.

    Raises ValueError, naming the file, for what is no picture, or several."""
    try:
        # Opened here, for PIL turns no TIFF of 8 bits that it opens by name (13.0).
        with open(path, "rb") as data, Image.open(data) as file:
            if getattr(file, "is_animated", False) and file.format != "MPO":   # a phone's has depth
                raise ValueError(f"it holds {file.n_frames} pictures: save one of them by itself")
            picture = ImageOps.exif_transpose(file)
        if picture.mode[0] in "IF":              # 16 or 32 bits, which PIL would clip
            pixels = np.asarray(picture, dtype=np.float32)
            return torch.from_numpy(pixels / whitest(pixels, picture.mode)).expand(3, -1, -1)
        picture = picture.convert("RGBA")
        ground = Image.new("RGBA", picture.size, "white")
        return vision.to_tensor(Image.alpha_composite(ground, picture).convert("RGB"))
    except FileNotFoundError:
        raise
    except Exception as error:                   # Pillow's have many types, and often no name
        raise ValueError(f"cannot read the picture {path}: {error}") from error


def packaged_file(package, path):
    """The file of an installed package, which is not imported."""
    spec = importlib.util.find_spec(package)
    if spec is None:
        raise ImportError(f"the photographs come with the package {package}: "
                          "pip install -r requirements-rewards.txt")
    return Path(spec.origin).parent / path


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


def photo_groups():
    """Photographs, the same with noise, and one of another class."""
    names, groups = list(PHOTOS), []
    for name, other in zip(names, names[1:] + names[:1]):
        groups.append((f"a photo of {name}", [
            ("the photo", photo(name)),
            ("the photo with noise", noisy(photo(name))),
            (f"a photo of {other}", photo(other)),
        ]))
    return groups


def text_groups():
    """Texts as the prompt quotes them, with a letter wrong, another text, and none."""
    groups = []
    for right, wrong, other in (("Hello World", "Hella World", "Good morning"),
                                ("Open", "Oxen", "Sale"), ("COFFEE 24", "COFFEE 21", "Tea")):
        shown = {f'"{text}"': drawn_text(text) for text in (right, wrong, other)}
        shown["no text"] = torch.ones(3, SIDE, SIDE)
        groups.append((f'a sign that says "{right}"', list(shown.items())))
    return groups
