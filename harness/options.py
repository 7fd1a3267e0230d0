"""Options of the commands: a dataclass of settings, its checks, and the command line.

A dataclass has one comment a field, which is also the field's help text:

    steps: int = 180     # rollouts      ->      --steps int    rollouts (default: 180)

What is not given on the command line comes from the recipe, the preset and the defaults,
in this order.
"""

import argparse
import dataclasses
import inspect
import json
import math
import os
import re
import shlex
import types
import typing
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import ClassVar

import torch

import argrpo

# What --resume may change: all else is the run's own.
MAY_CHANGE = ("resume", "steps", "save_every", "micro_batch", "checkpointing", "compile", "device",
              "progress_every", "log", "selftest")


# Files and folders, which have a name if they are given.
PLACES = ("out", "resume", "gpt_ckpt", "vq_ckpt", "prompts", "t5", "npz", "reference")


# ---------------------------------------------------------------------------------------------
# Settings of a run
# ---------------------------------------------------------------------------------------------

@dataclass
class RunSettings(argrpo.GRPOConfig):
    """The options of a training script: the loop's, and these.

    A script extends it by its name, its task, "c2i" or "t2i", its presets {preset: {field: value}},
    what recipes change of them, {recipe: {preset: {field: value}}}, and the preset that is the
    default on a GPU, not the toy."""
    script: ClassVar[str]
    task: ClassVar[str]
    presets: ClassVar[dict]
    recipes: ClassVar[dict]
    on_gpu: ClassVar[str]
    rollout_prompts: int | None = 0      # prompts per pass of the sampler, to save memory; 0 is
                                         # all; default for LlamaGen: what fits into the memory
    preset: str = ""                     # models and settings to start from, see the list below
    recipe: str = "paper"                # "paper", "diverse", which keeps a prompt's pictures
                                         # varied, or "quick": the same with fewer pictures
    reward: str = ""                     # what to maximise: "name:weight,..." or
                                         # "my_file.py:function"
    out: str = ""                        # folder of the run; default runs/<script>-<preset>
    resume: str = ""                     # folder of a run to continue
    device: str = ""                     # cpu, cuda, mps, xpu, ..; default: cuda if there, else cpu
    gpt_ckpt: str = ""                   # transformer weights of your own: a file, a folder,
                                         # or a Hugging Face repo or repo:file
    vq_ckpt: str = ""                    # tokenizer weights, likewise
    from_scratch: bool = False           # toy: pretrain the models first, which takes minutes
    checkpointing: bool = False          # save memory: the backward pass computes the layers again
    compile: bool = False                # torch.compile the sampler's decoding step: minutes at
                                         # first, meant for GPUs
    diversity_bonus: float = 0.0         # advantage moved, among a group's right images, to those
                                         # of which the pretrained model draws more (diversity.py)
    bonus_features: str = "pixels"       # what the diversity bonus compares: "pixels", or
                                         # "imagenet", a classifier's features
    rehearsal: float = 0.0               # weight of the likelihood of what the pretrained model
                                         # gets right (diversity.py)
    rehearsal_groups: int = 1            # groups of images that the pretrained model draws for
                                         # that, once for each prompt
    rehearsal_steps: int = 0             # steps of rehearsal alone, before the first rollout
    rehearsal_lr_factor: float = 3.0     # their learning rate at first, as a multiple of lr
    eval_images: int = 540               # images of the evaluation before and after; whole prompts
    eval_cfg_scales: str = ""            # guidance scales, such as 1,7.5, to evaluate at besides
                                         # the rollout's
    save_every: int = 20                 # steps between two checkpoints
    progress_every: int = 10             # steps between two pictures of progress.gif; 0 is none
    watch: str = ""                      # rewards to report but never train on, as in --reward
    log: str = ""                        # where to log besides the run's files: "tensorboard" or
                                         # "wandb", or both with a comma
    selftest: bool = False               # try models and rewards for a minute, and do not train

    LEAST = argrpo.GRPOConfig.LEAST | dict(rehearsal_groups=1, save_every=1, eval_images=4,
                                           composed=1)

    def __post_init__(self):
        self.given = {}                  # what the command line changed: beside the options
        super().__post_init__()          # all numbers, these too, are finite and at least LEAST
        if self.bonus_features not in ("pixels", "imagenet"):
            raise ValueError("bonus_features must be 'pixels' or 'imagenet', "
                             f"not {self.bonus_features!r}")
        if not set(self.log.split(",")) <= {"", "tensorboard", "wandb"}:
            raise ValueError("log must be tensorboard, wandb, or both with a comma, "
                             f"not {self.log!r}")
        self.other_cfg_scales()

    def other_cfg_scales(self):
        """The guidance scales of eval_cfg_scales but the rollout's.

        Raises ValueError for what is no number >= 0."""
        try:
            scales = [float(text) for text in self.eval_cfg_scales.split(",") if text.strip()]
        except ValueError:
            scales = [-1.0]
        if not all(0 <= scale < math.inf for scale in scales):
            raise ValueError("eval_cfg_scales must be numbers of at least 0 such as 1,7.5, "
                             f"not {self.eval_cfg_scales!r}")
        return [scale for scale in scales if scale != self.cfg_scale]


# ---------------------------------------------------------------------------------------------
# Settings of the commands that draw: sample.py and evaluate.py
# ---------------------------------------------------------------------------------------------

@dataclass
class DrawSettings:
    """What draws, what it draws, and how: a command adds which weights, how many, and where to."""
    preset: str = "toy"                  # toy, B-256, L-256, B-384, L-384, XL-384, XXL-384, 3B-384,
                                         # t2i-XL-256 or t2i-XL-512
    vq_ckpt: str = ""                    # tokenizer weights of your own: a file, a folder, or a
                                         # Hugging Face repo or repo:file
    classes: str = "all"                 # classes to draw: "all", numbers such as 207,360, or names
                                         # such as otter,pizza
    prompts: str = ""                    # captions to draw, of a file: one a line, or .json or
                                         # .jsonl
    t5: str = "google/flan-t5-xl"        # text encoder of the t2i presets: a local folder, or a
                                         # Hugging Face repo
    cfg_scale: float = 1.0               # classifier-free guidance: 1 is none
    temperature: float = 1.0             # below 1: likelier, less varied images
    top_k: int = 0                       # draw from the k likeliest codes only; 0 is all
    top_p: float = 1.0                   # draw from the likeliest codes of this total probability
    seed: int = 0                        # same seed, same pictures
    device: str = ""                     # cpu, cuda, mps, xpu, ..; default: cuda if there, else cpu

    LEAST = dict(samples=1, rows=1, images=1, best_of=1)         # of these, as far as it has them

    def __post_init__(self):
        for name, least in self.LEAST.items():
            if getattr(self, name, least) < least:
                raise ValueError(f"--{name.replace('_', '-')} must be at least {least}, "
                                 f"not {getattr(self, name)}")
        argrpo.check_policy(self.cfg_scale, self.temperature, self.top_k, self.top_p)

    def policy(self):
        """The keywords of `argrpo.generate` that say which policy draws."""
        return dict(cfg_scale=self.cfg_scale, temperature=self.temperature, top_k=self.top_k,
                    top_p=self.top_p)


# ---------------------------------------------------------------------------------------------
# The command line
# ---------------------------------------------------------------------------------------------

def field_comments(cls):
    """{field: the comment behind it}, for a dataclass and those it extends."""
    comments = {}
    for base in reversed(cls.__mro__):
        if dataclasses.is_dataclass(base):
            # The end of the field's line, and lines below it that hold nothing but comment.
            found = re.findall(r"^    (\w+): .*?  # (.*(?:\n {30,}# .*)*)$",
                               inspect.getsource(base), re.MULTILINE)
            comments |= {name: re.sub(r"\n +# ", " ", comment) for name, comment in found}
    return comments


def read_options(cls, argv, prog, description, epilog=""):
    """The options given on the command line, {field: value}, for the fields of the dataclass."""
    parser = argparse.ArgumentParser(
        prog=prog, description=description, epilog=epilog, allow_abbrev=False,
        argument_default=argparse.SUPPRESS, formatter_class=argparse.RawDescriptionHelpFormatter)
    comments = field_comments(cls)
    for field in dataclasses.fields(cls):
        kind = field.type
        if typing.get_origin(kind) is types.UnionType:
            kind = typing.get_args(kind)[0]                          # float | None -> float
        how = dict(type=kind, metavar=kind.__name__)
        if kind is bool:
            how = dict(action=argparse.BooleanOptionalAction)
        if typing.get_origin(kind) is list:      # given once for each of its values
            how = dict(type=str, metavar="str", action="append")
        text = comments[field.name].replace("%", "%%")               # as argparse wants it
        if field.default not in ("", None, dataclasses.MISSING):
            text += f" (default: {field.default})"
        parser.add_argument("--" + field.name.replace("_", "-"), **how, help=text)
    given = vars(parser.parse_args(argv))
    for name in PLACES:
        value = given.get(name)                  # a text, or several
        if value == "" or isinstance(value, list) and "" in value:
            raise ValueError(f"--{name.replace('_', '-')} is empty: a variable that is not set?")
    return given


def parse_settings(cls, argv, description):
    """The settings from the command line, over those of recipe and preset, over `cls`'s defaults.

    With --resume the run's own config.json takes the preset's place.  Raises ValueError, naming
    the option and its value, when one is unknown or out of range."""
    given = read_options(cls, argv, f"{cls.script}.py", description,
                         "presets: " + ", ".join(cls.presets))
    settings = resumed(cls, given) if "resume" in given else preset_settings(cls, given)
    size = int(os.environ.get("WORLD_SIZE", 1))
    if settings.prompts_per_step % size:
        raise ValueError(f"prompts_per_step {settings.prompts_per_step} cannot be shared equally "
                         f"by {size} processes: choose a multiple of {size}")
    for name in settings.log.split(","):
        if name and find_spec(name) is None:
            raise ImportError(f"--log {name} needs a package: pip install {name}")
    check_writable(settings.out)
    return settings


def check_new(settings):
    """Raises FileExistsError unless the run's folder is new or empty.

    Hidden files do not count, nor weights that --from-scratch has left."""
    out = Path(settings.out)
    held = sorted(path.name for path in out.glob("[!.]*")
                  if not (settings.from_scratch and path.name == "weights"))
    if "config.json" in held:
        raise FileExistsError(
            f"{out} already holds a run: continue it with --resume {shlex.quote(str(out))}, or "
            "give the new one a folder of its own with --out NAME")
    if held:
        raise FileExistsError(f"{out} holds {held[0]}, but no run: a run takes a new or an empty "
                              "folder, give it one with --out NAME")


def preset_settings(cls, given):
    """What is given, over the recipe, over the preset."""
    default = cls.on_gpu if torch.cuda.is_available() else "toy"
    name, recipe = given.get("preset") or default, given.get("recipe", "paper")
    if name not in cls.presets:
        raise ValueError(f"unknown preset {name!r}: there are {', '.join(cls.presets)}")
    recipes = {"paper": {name: {}}} | cls.recipes
    if recipe not in recipes:
        raise ValueError(f"unknown recipe {recipe!r}: there are {', '.join(recipes)}")
    out = f"runs/{cls.script}-{name}" + ("" if recipe == "paper" else f"-{recipe}")
    values = {"preset": name, "out": out} | cls.presets[name] | recipes[recipe][name]
    usual = cls(**values)
    settings = dataclasses.replace(usual, **given)
    settings.given = {name: value for name, value in given.items() if value != getattr(usual, name)}
    return settings


def resumed(cls, given):
    """The settings of an earlier run, and of what is given that which may change."""
    folder = Path(given["resume"])
    path = folder / "config.json"
    config = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    if "script" not in config:                   # a model of Hugging Face has such a file, too
        raise FileNotFoundError(f"nothing to resume: there is no {path} of a run")
    if config["script"] != cls.script:
        raise ValueError(f"{folder} holds a run of {config['script']}.py: "
                         "resume it with that script")
    unknown = set(config["settings"]) - {field.name for field in dataclasses.fields(cls)}
    if unknown:
        raise ValueError(f"{folder} was made by another version of this repository, "
                         f"with the setting {sorted(unknown)[0]}: resume it with that version")
    values, here, there = config["settings"], Path.cwd(), Path(config.get("folder", Path.cwd()))
    if here != there:
        values, given = seen_from(there, values), seen_from(here, given)
    before = cls(**values)
    for name, value in given.items():
        if value != getattr(before, name) and name not in MAY_CHANGE:
            raise ValueError(f"--resume continues a run as it was configured: {name} was "
                             f"{getattr(before, name)!r} and cannot become {value!r}")
    settings = dataclasses.replace(before, **(given | {"out": str(folder)}))
    settings.given = config.get("given", {}) | given
    return settings


def seen_from(folder, values):
    """The settings' values with their files as a command in that folder finds them: absolute."""
    moved = dict(values)
    for name in {"gpt_ckpt", "vq_ckpt", "prompts", "t5"} & set(values):
        if values[name] and (folder / values[name]).exists():        # else a Hugging Face repo
            moved[name] = str(folder / values[name])
    for name in {"reward", "watch"} & set(values):
        moved[name] = ",".join(
            str(folder / Path(item.strip()).expanduser()) if ".py:" in item else item
            for item in values[name].split(","))
    return moved


def check_writable(folder):
    """Raises PermissionError if files cannot be left in the folder, which may not exist."""
    candidates = [Path(folder), *Path(folder).absolute().parents]
    existing = next(path for path in candidates if path.exists())
    if not existing.is_dir() or not os.access(existing, os.W_OK | os.X_OK):
        raise PermissionError(f"cannot write into {existing}: "
                              "choose another folder with --out NAME")
