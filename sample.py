"""Draws pictures from any checkpoint: published, the toy's, or a run's model.pt.

    python sample.py                                                 # the toy
    python sample.py --gpt-ckpt runs/train_c2i-toy/model.pt          # the toy after a run
    python sample.py --preset B-256 --classes 207,360 --cfg-scale 2  # golden retrievers, otters
    python sample.py --caption "a blue triangle above a green square" --best-of 4    # the toy's
    python sample.py --preset t2i-XL-256 --prompts captions.txt --cfg-scale 7.5
    python sample.py --preset B-256 --npz samples.npz --images 50000     # for FID, see the docs

The grid has a row per class or caption.  The .npz holds `arr_0`, uint8 (images, 256, 256, 3), as
the ADM evaluator reads it: classes in equal numbers, larger images resized to 256 pixels.
"""

import os
import shutil
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from tqdm import tqdm

import captions
from harness import compare, options
from harness.choices import caption_encoder, check_task, class_prompts, load_models
from harness.device import Sampler
from harness.logs import one_line_errors
from harness.processes import pick_device


@dataclass
class SampleSettings(options.DrawSettings):
    gpt_ckpt: str = ""                   # transformer weights of your own: a file, a folder,
                                         # or a Hugging Face repo or repo:file
    caption: str = ""                    # draw this caption instead of classes
    samples: int = 8                     # images per class or caption in the grid
    rows: int = 9                        # rows of the grid at most, evenly chosen
    best_of: int = 1                     # draw so many for each image, and keep the likeliest
    out: str = "samples.png"             # the grid
    npz: str = ""                        # write --images pictures into this .npz instead of a grid
    images: int = 50000                  # how many, for --npz


def check(settings):
    """The task, "c2i" or "t2i", that the settings ask for.  Raises ValueError if they do not go
    together."""
    s, place = settings, Path(settings.npz or settings.out)
    if s.npz and place.suffix != ".npz":
        raise ValueError(f"--npz {s.npz}: its name must end with .npz")
    if not s.npz and Image.registered_extensions().get(place.suffix.lower()) not in Image.SAVE:
        raise ValueError(f"--out {s.out}: its name must end as a picture's, such as .png")
    if place.is_dir() or (place.exists() and not os.access(place, os.W_OK)):
        raise ValueError(f"cannot write {place}: choose another name")
    options.check_writable(place.parent)
    task = "t2i" if s.caption or s.prompts else "c2i"
    check_task(s.preset, task)
    return task


def choose_prompts(settings, task, device):
    """What to draw: the classes or the captions that the settings ask for, as Prompts."""
    if task == "t2i":
        texts = [captions.clean(settings.caption)]
        if not settings.caption:
            texts = captions.read_captions(settings.prompts)
        if not texts[0]:
            raise ValueError(f"--caption {settings.caption!r} is empty: give it words")
        return caption_encoder(settings.preset, settings.t5, device)(texts)
    return class_prompts(settings.preset, settings.classes, template="{}")


def write_npz(model, vq, prompts, settings):
    """--images pictures, of all prompts in turn, into the .npz.

    Until all are there they lie in a folder beside it, so that the same command goes on after an
    interruption."""
    index = torch.arange(settings.images) % len(prompts.texts)
    folder = Path(settings.npz).with_suffix(".shards")
    compare.draw_shards(model, vq, prompts, index, folder, settings.seed, size=256,
                        best_of=settings.best_of, **settings.policy())
    pictures = compare.read_shards(folder)
    np.savez(settings.npz, arr_0=pictures)
    print(f"wrote {len(pictures)} pictures of {len(prompts.texts)} prompts to {settings.npz}")
    shutil.rmtree(folder)


def write_grid(model, vq, prompts, settings):
    """A row each of some prompts, as one picture."""
    from torchvision.utils import save_image
    count, sampler = len(prompts.texts), Sampler()(model)
    rows = torch.linspace(0, count - 1, min(settings.rows, count)).long()
    index = rows.repeat_interleave(settings.samples)
    batches = tqdm(list(torch.arange(len(index)).split(32)), desc="sampling", unit="batch")
    images = torch.cat([compare.draw(sampler, vq, prompts, index[numbers], numbers.tolist(),
                                     settings.seed, settings.best_of,
                                     **settings.policy())[0].cpu()
                        for numbers in batches])
    images = F.interpolate(images, scale_factor=max(1, 96 // images.shape[-1]))  # visible pixels
    Path(settings.out).parent.mkdir(parents=True, exist_ok=True)
    save_image(images, settings.out, nrow=settings.samples)
    print(f"wrote {settings.out}: a row each of {', '.join(prompts.texts[k] for k in rows)}")


def main(argv=None):
    with one_line_errors():
        given = options.read_options(SampleSettings, argv, "sample.py", __doc__)
        settings = SampleSettings(**given)
        task = check(settings)
        device = pick_device(settings.device)
        prompts = choose_prompts(settings, task, device)
        model, vq = load_models(settings.preset, task, settings.gpt_ckpt, settings.vq_ckpt)
        write = write_npz if settings.npz else write_grid
        write(model.to(device), vq.to(device), prompts, settings)


if __name__ == "__main__":
    main()
