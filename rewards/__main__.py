"""Examines a reward, or scores pictures with it.

    python -m rewards --check my_rewards.py:redness
    python -m rewards --reward clip,aesthetic --prompt "a photo of an otter" one.png two.png
"""

import argparse
import json
import sys

import numpy as np
import torch
from PIL import Image, ImageOps
from torchvision.transforms.functional import to_tensor

from reward import build_rewards
from rewards.checker import examine


def arguments(argv):
    parser = argparse.ArgumentParser(
        prog="python -m rewards",
        description="Scores pictures with a reward, or examines the reward itself.")
    parser.add_argument("images", nargs="*", help="pictures to score")
    parser.add_argument("--reward", metavar="SPEC",
                        help="the reward, as for training: name:weight,... or file.py:function")
    parser.add_argument("--check", metavar="SPEC",
                        help="examine this reward on pictures of the toy")
    parser.add_argument("--prompt", help="the prompt of the pictures")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args(argv)
    if bool(args.check) == bool(args.reward) or (args.reward and not args.images):
        parser.error("give --check SPEC, or --reward SPEC with pictures")
    return args


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
            white = 65535 if picture.mode.startswith("I") else 1
            if not 0 <= pixels.min() <= pixels.max() <= white:       # nor NaN
                raise ValueError(f"its numbers are not all from 0 to {white}: save it with 8 bits")
            return torch.from_numpy(pixels / white).expand(3, -1, -1)
        picture = picture.convert("RGBA")
        ground = Image.new("RGBA", picture.size, "white")
        return to_tensor(Image.alpha_composite(ground, picture).convert("RGB"))
    except FileNotFoundError:
        raise
    except Exception as error:                   # Pillow's have many types, and often no name
        raise ValueError(f"cannot read the picture {path}: {error}") from error


def main(argv=None):
    """Returns the exit status: 0, the number of bad findings, or 2 after an error."""
    args = arguments(argv)
    try:
        for path in args.images:                 # a bad one is found before models are loaded
            read_picture(path)
        rewards = build_rewards(args.check or args.reward, args.device)
        if args.check:
            return examine(rewards, args.prompt, args.device)
        prompts = [args.prompt or ""]
        rewards.check_prompts(prompts)
        for path in args.images:                 # one by one, for they may differ in size
            total, parts = rewards(read_picture(path)[None].to(args.device), prompts)
            parts = {name: part.item() for name, part in parts.items()}
            print(json.dumps({"image": path, "reward": total.item()} | parts))
        return 0
    except (ValueError, OSError, ImportError, RuntimeError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
