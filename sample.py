"""Draws pictures from any checkpoint: published, the toy's, or a run's model.pt.

    python sample.py                                                        # the toy
    python sample.py --gpt-ckpt runs/train_c2i-toy/model.pt --out after.png # the toy after a run
    python sample.py --preset B-256 --classes 207,360 --cfg-scale 2         # LlamaGen, golden retrievers and otters
    python sample.py --caption "a blue triangle above a green square"       # the toy's captions
    python sample.py --preset t2i-XL-256 --prompts captions.txt --cfg-scale 7.5
    python sample.py --preset B-256 --npz samples.npz --images 50000        # for FID, see the README

The grid has a row per class or caption.  The .npz holds `arr_0`, uint8 (images, 256, 256, 3), as the ADM
evaluator reads it: classes in equal numbers, larger images resized to 256 pixels.
"""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torchvision.utils import save_image
from tqdm import tqdm

import argrpo
import captions
import experiment
import pretrained
import toy


@dataclass
class Settings:
    preset: str = "toy"                  # toy, B-256, L-256, B-384, L-384, XL-384, XXL-384, 3B-384, t2i-XL-256 or t2i-XL-512
    gpt_ckpt: str = ""                   # transformer weights of your own: a file, a folder, or a Hugging Face repo or repo:file
    vq_ckpt: str = ""                    # tokenizer weights, likewise
    classes: str = "all"                 # classes to draw: "all", numbers such as 207,360, or names such as otter,pizza
    caption: str = ""                    # draw this caption instead of classes
    prompts: str = ""                    # or the captions of this file: one a line, or .json or .jsonl
    t5: str = "google/flan-t5-xl"        # text encoder of the t2i presets: a local folder, or a Hugging Face repo
    samples: int = 8                     # images per class or caption in the grid
    rows: int = 9                        # rows of the grid at most, evenly chosen
    cfg_scale: float = 1.0               # classifier-free guidance: 1 is none
    temperature: float = 1.0             # below 1: likelier, less varied images
    top_k: int = 0                       # draw from the k likeliest codes only; 0 is all
    top_p: float = 1.0                   # draw from the likeliest codes of this total probability only
    seed: int = 0                        # same seed, same pictures
    device: str = ""                     # "cpu" or "cuda"; default: the GPU if there is one
    out: str = "samples.png"             # the grid
    npz: str = ""                        # write --images pictures into this .npz instead of a grid
    images: int = 50000                  # how many, for --npz
    fid_reference: str = ""              # folder or .npz of real images: prints FID and IS (needs torch-fidelity)


def choose_prompts(settings, task, device):
    """What to draw: the classes or the captions that the settings ask for, as Prompts."""
    if task == "t2i":
        texts = [captions.clean(settings.caption)] if settings.caption else captions.read_captions(settings.prompts)
        return experiment.caption_encoder(settings.preset, settings.t5, device)(texts)
    names = toy.CLASSES if settings.preset == "toy" else pretrained.imagenet_classes()
    classes = experiment.choose_classes(settings.classes, names)
    return argrpo.Prompts([names[k] for k in classes], torch.tensor(classes))


@torch.no_grad()
def draw(model, vq, prompts, index, settings, device, batch=32):
    """A picture of each prompt at index (M,): yields (b, 3, H, W) in [0, 1] on the CPU, the same for the same seed."""
    for i, chunk in enumerate(tqdm(index.split(batch), desc="sampling", unit="batch")):
        _, cond, cond_mask = prompts.pick(chunk, device)
        with argrpo.autocast(device):
            tokens, _ = argrpo.generate(model, cond, cond_mask, cfg_scale=settings.cfg_scale,
                                        temperature=settings.temperature, top_k=settings.top_k, top_p=settings.top_p,
                                        generator=argrpo.rng_for(device, settings.seed, "sample", i))
        yield argrpo.paint(vq, tokens).cpu()


def as_uint8(images, size=None):
    """(b, 3, H, W) in [0, 1] -> (b, h, w, 3) uint8, resized to at most size x size."""
    if size is not None and images.shape[-1] > size:
        images = F.interpolate(images, size=(size, size), mode="bicubic", antialias=True).clamp(0, 1)
    return (images * 255).round().to(torch.uint8).permute(0, 2, 3, 1).numpy()


def print_fid(npz, reference):
    """FID of the .npz against a reference, and its Inception Score."""
    try:
        from torch_fidelity import calculate_metrics
    except ImportError:
        raise ImportError("--fid-reference needs torch-fidelity: pip install torch-fidelity") from None

    class Pictures(torch.utils.data.Dataset):
        def __init__(self, path):
            self.images = np.load(path)["arr_0"]

        def __len__(self):
            return len(self.images)

        def __getitem__(self, i):
            return torch.from_numpy(self.images[i]).permute(2, 0, 1)         # (3, H, W) uint8

    other = Pictures(reference) if str(reference).endswith(".npz") else str(reference)
    print(calculate_metrics(input1=Pictures(npz), input2=other, fid=True, isc=True, cuda=torch.cuda.is_available()))


def main(argv=None):
    with experiment.one_line_errors():
        settings = Settings(**experiment.read_options(Settings, argv, "sample.py", __doc__))
        if settings.fid_reference and not (settings.npz and Path(settings.fid_reference).exists()):
            raise ValueError("--fid-reference needs --npz and an existing folder or .npz, not "
                             f"{settings.npz!r} and {settings.fid_reference!r}")
        published = pretrained.MODELS.get(settings.preset)
        task = published.task if published else "t2i" if settings.caption or settings.prompts else "c2i"
        if (task == "t2i") != bool(settings.caption or settings.prompts):
            raise ValueError(f"preset {settings.preset} draws " + ("captions: give it --caption TEXT or --prompts FILE" if task == "t2i"
                             else "classes: choose them with --classes, or captions with a t2i preset"))
        device = experiment.pick_device(settings.device)
        prompts = choose_prompts(settings, task, device)
        model, vq = experiment.load_models(settings.preset, task, settings.gpt_ckpt, settings.vq_ckpt)
        model, vq = model.to(device), vq.to(device)
        M = len(prompts.texts)

        if settings.npz:
            index = torch.arange(settings.images) % M
            pictures = np.concatenate([as_uint8(images, 256) for images in draw(model, vq, prompts, index, settings, device)])
            np.savez(settings.npz, arr_0=pictures)
            print(f"wrote {len(pictures)} pictures of {M} prompts to {settings.npz}")
            if settings.fid_reference:
                print_fid(settings.npz, settings.fid_reference)
            return
        rows = torch.linspace(0, M - 1, min(settings.rows, M)).long()
        images = torch.cat(list(draw(model, vq, prompts, rows.repeat_interleave(settings.samples), settings, device)))
        images = F.interpolate(images, scale_factor=max(1, 96 // images.shape[-1]))      # the toy's pixels, visibly
        save_image(images, settings.out, nrow=settings.samples)
        print(f"wrote {settings.out}: a row each of {', '.join(prompts.texts[k] for k in rows)}")


if __name__ == "__main__":
    main()
