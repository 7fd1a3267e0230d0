"""From names to what they stand for: models, classes, captions, features, what to watch."""

import os
import re
from pathlib import Path

import torch

import argrpo
import pretrained
import reward
import toy
from captions import T5Captions
from diversity import Pixels
from harness.before_after import Watched, spread_index
from harness.processes import rank_and_size, wait_for_all
from toy.pretraining import pretrain_toy


def check_task(preset, task):
    """Raises ValueError unless a preset is for the task, "c2i" or "t2i".  The toy is for both."""
    published = pretrained.MODELS.get(preset)
    if published and published.task != task:
        raise ValueError(f"preset {preset} is for {published.task}: t2i presets draw captions, "
                         "choose them with --prompts FILE; c2i presets draw --classes")


def load_models(preset, task, gpt_ckpt="", vq_ckpt="", folder=toy.FOLDER):
    """The transformer and the tokenizer of a preset for the task "c2i" or "t2i", on the CPU.

    folder is that of the toy's weights."""
    if preset == "toy":
        return toy.load(task, folder, gpt_ckpt, vq_ckpt)
    if preset not in pretrained.MODELS:
        raise ValueError(f"unknown preset {preset!r}: there are toy, "
                         f"{', '.join(pretrained.MODELS)}")
    return pretrained.load(preset, gpt_ckpt, vq_ckpt)


def starting_models(settings):
    """The transformer and the tokenizer that a run starts from, on the CPU.

    With --from-scratch they are in the run's folder, pretrained first if they are not there."""
    folder = toy.FOLDER
    if settings.from_scratch:
        if settings.preset != "toy":
            raise ValueError("--from-scratch is for the toy: "
                             "a published model is not pretrained in minutes")
        folder = Path(settings.out) / "weights"
        if rank_and_size()[0] == 0 and not (folder / f"toy_{settings.task}.pt").exists():
            pretrain_toy(folder, settings.seed)
        wait_for_all()                           # for the first of several processes
    return load_models(settings.preset, settings.task, settings.gpt_ckpt, settings.vq_ckpt, folder)


def checkpoint(spec, seed):
    """What the table calls a checkpoint, what to load, "" for the preset's own, and its seed.

    It is called "base", by a run's folder, or by what is behind the last /: a safe name of a
    folder.  A seed is a number behind the last @ of no existing path.  Raises ValueError for what
    has no name."""
    place, own = spec, re.search("@([0-9]+)$", spec)
    if own and not Path(spec).exists():
        place, seed = spec[:own.start()], int(own[1])
    path = Path(place.split(":")[0])             # repo:file
    if place and Path(place).exists():
        path = Path(os.path.abspath(place))      # of model.pt and .. the folder has a name
    name = path.parent.name if path.name == "model.pt" else path.name.removesuffix(".pt")
    name = re.sub(r"[^\w.@+-]", "-", name).lstrip(".")
    if not name:
        raise ValueError(f"--gpt-ckpt {spec!r} names no checkpoint: give a file, a folder, or a "
                         "Hugging Face repo")
    label = name if place == spec else f"{name}@{seed}"
    return label, "" if place == "base" else place, seed


def caption_encoder(preset, t5, device):
    """What turns captions into Prompts: for the toy its own features, else Flan-T5's.

    Let go of it to unload T5.  Raises FileNotFoundError where it cannot be had."""
    if preset == "toy":
        return lambda texts: argrpo.Prompts(texts, *toy.encode_captions(texts))
    patterns = ["*.safetensors", "*.json", "*.model"]
    folder = pretrained.fetch(t5, "pass a local folder with --t5 PATH", patterns)
    return T5Captions(folder, device)


def choose_watched(settings, texts, device, others=()):
    """What a run reports about pictures of the texts, and, while it trains, of others: see
    `Watched`.

    That is, of the toy, its verifier and its spread, and "watch/<name>" of each reward that the
    setting `watch` names."""
    verify = spread = watched = None
    if settings.preset == "toy":
        verify = toy.verify_all if settings.task == "c2i" else toy.verify_by_kind
        spread = toy.spread
    if settings.watch:
        watched = reward.build_rewards(settings.watch, device)
        watched.check_prompts([*texts, *others])

    def measure(images, rows):
        scores = {} if verify is None else verify(images, rows)
        if watched is not None:
            _, parts = watched(images, rows)
            scores |= {f"watch/{name}": part for name, part in parts.items()}
        return scores
    return Watched(measure, spread, shipped_spread(settings, texts))


def shipped_spread(settings, texts):
    """The spread of the shipped toy's right pictures of the texts, as `toy.shipped_spread`.

    None if the run starts from other weights, or draws with guidance or another temperature."""
    other = settings.gpt_ckpt or settings.vq_ckpt or settings.from_scratch
    if settings.preset != "toy" or other or (settings.cfg_scale, settings.temperature) != (1, 1):
        return None
    index = spread_index(len(texts), settings)
    return toy.shipped_spread(settings.task, [texts[k] for k in index.tolist()])


class Features:
    """Images as a reward's features of them, for a `diversity.DiversityBonus`."""

    def __init__(self, features):
        self.features = features

    def describe(self, images):
        """images (B, 3, H, W) in [0, 1] -> (B, C) float16."""
        return self.features(images).half()

    def levels(self, described):
        return [described.float()]


def build_features(name, device):
    """What the diversity bonus compares: "pixels", or "imagenet", a classifier's features.

    Raises ImportError, naming the packages, if the classifier's are missing."""
    if name == "pixels":
        return Pixels()
    [(classifier, _)] = reward.build_rewards(name, device).rewards.values()
    return Features(classifier.features)


def class_prompts(preset, classes, template="a photo of {}"):
    """The Prompts of classes, as `choose_classes` reads them.  The toy's texts are its names."""
    if preset == "toy":
        names, template = toy.CLASSES, "{}"
    else:
        names = pretrained.imagenet_classes()
    index = choose_classes(classes, names)
    return argrpo.Prompts([template.format(names[k]) for k in index], torch.tensor(index))


def choose_classes(text, names):
    """Class indices from "all", numbers or names, separated by commas: each once.

    Raises ValueError for what is no class."""
    if text == "all":
        return list(range(len(names)))
    # Of two equal names the first counts.
    index = {names[k].lower(): k for k in reversed(range(len(names)))}
    index |= {str(k): k for k in range(len(names))}
    items = [item.strip().lower() for item in text.split(",")]
    unknown = [item for item in items if item not in index]
    if unknown:
        raise ValueError(f"no class is named {unknown[0]!r}: classes have names such as "
                         f"{names[0]!r}, and numbers from 0 to {len(names) - 1}")
    return list(dict.fromkeys(index[item] for item in items))
