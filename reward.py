"""Reward functions: what "better" means.

A reward is any callable

    reward(images, prompts) -> (B,) float tensor, higher is better

with images (B, 3, height, width) float in [0, 1] on the training device, and prompts the B texts
that they were drawn for.  Several rewards, weighted and added up, are a `RewardSet`, which returns
(total (B,), {name: (B,)}): that is what `argrpo.train` takes as its reward_fn.

GRPO only compares images of one prompt with each other, and divides by their standard deviation
plus 1e-4.  So a reward's zero does not matter.  Its scale does not matter either while that
deviation is far above 1e-4 and below 1e18.  With less, less is learned, or nothing.  With more, its
square overflows.  Beside other rewards, or with scale_advantages off, the scale is a weight.

Yours takes a few lines, in any file:

    # my_rewards.py
    def redness(images, prompts):
        red, green, blue = images.mean(dim=(2, 3)).unbind(dim=1)
        return red - (green + blue) / 2

and is trained on with `--reward my_rewards.py:redness --out runs/red`.  With others, weighted:
`--reward "shapes:1,jpeg:0.2,my_rewards.py:redness:0.5"`.  Before a long run, examine it, or score
pictures:

    python -m rewards --check my_rewards.py:redness
    python -m rewards --reward clip,aesthetic --prompt "a photo of an otter" one.png two.png

A reward may have, as methods or, if it is a function, as attributes:

    may_miss = True            it gives NaN to an image that it cannot judge (a language model whose
                               answer makes no sense); the image is left out of its group
    check_prompts(prompts)     raises ValueError for prompts that it cannot judge, such as those
                               without a text in quotes; the commands ask it before a run
    features(images)           (B, C), of length one: what pictures may be compared by

A reward that needs a model or a device is made by a factory, `(device) -> reward`, which
`@register("name")` makes known by its name.  The rewards with models are in the folder rewards/,
one file a family.  Such a file is imported when one of its rewards is asked for, and not before.
"""

import importlib
import importlib.util
import inspect
import io
import math
import os
import re
import sys
import sysconfig
import traceback
from contextlib import contextmanager
from functools import lru_cache, partial
from modulefinder import ModuleFinder
from pathlib import Path

import torch

# ---------------------------------------------------------------------------------------------
# Rewards of a few lines
# ---------------------------------------------------------------------------------------------

def brightness(images, prompts):
    """Mean over all pixels and channels, in [0, 1]."""
    return images.mean(dim=(1, 2, 3))


def contrast(images, prompts):
    """Standard deviation of the grey value over the image, from 0 to about 0.5."""
    return images.mean(dim=1).flatten(1).std(dim=1)


def jpeg(images, prompts):
    """Compressibility (DDPO, arXiv 2305.13301): minus the kilobytes as a JPEG of quality 95."""
    return -jpeg_large(images, prompts)


def jpeg_large(images, prompts):
    """Incompressibility (DDPO): plus the kilobytes, of 1000 bytes."""
    from PIL import Image
    sizes = []
    for picture in to_uint8(images).numpy():
        file = io.BytesIO()
        Image.fromarray(picture).save(file, format="jpeg", quality=95)
        sizes.append(len(file.getvalue()))
    return torch.tensor(sizes, dtype=torch.float32, device=images.device) / 1000


def to_uint8(images):
    """(..., 3, height, width) in [0, 1] -> (..., height, width, 3) uint8 on the CPU, rounded: how
    pictures are stored."""
    return images.detach().float().mul(255).round().byte().movedim(-3, -1).cpu()


# ---------------------------------------------------------------------------------------------
# Several rewards, added up
# ---------------------------------------------------------------------------------------------

class BadReward(ValueError):
    """A reward failed, cannot judge its prompts, or gave no finite number per image."""


class RewardSet:
    """A weighted sum of rewards: {name: (reward, weight)}."""

    def __init__(self, rewards):
        self.rewards = rewards

    @torch.no_grad()
    def __call__(self, images, prompts):
        """images (B, 3, height, width) in [0, 1], prompts B texts -> (total (B,), {name: (B,)}).

        The parts are unweighted.  NaN means missing, and makes the total missing.  Raises BadReward
        if a reward raises an error, but torch.OutOfMemoryError, changes the images or prompts, or
        does not give one finite number, or NaN if it may miss, to each image, and if the total is
        infinite."""
        if len(images) != len(prompts):
            raise ValueError(f"{len(images)} images cannot have {len(prompts)} prompts")
        given, total, parts = (images.clone(), list(prompts)), 0, {}
        for name, (reward, weight) in self.rewards.items():
            with blamed(f"reward {name!r} failed for the prompts {some_of(prompts)}"):
                scores = reward(*given)
            parts[name] = checked(name, reward, scores, images, prompts)
            untouched = torch.allclose(given[0], images, rtol=0, atol=0, equal_nan=True)
            if not untouched or given[1] != list(prompts):
                raise BadReward(f"reward {name!r} changes the images in place, or its prompts, "
                                "which other rewards read, too: let it work on a copy")
            total = total + weight * parts[name]
        if torch.isinf(total).any():
            raise BadReward("the weighted sum of the rewards is infinite: choose smaller weights")
        return total, parts

    def check_prompts(self, prompts):
        """Raises BadReward, in one line, if a reward cannot judge some of the prompts.

        Called with all prompts of a run before its training."""
        distinct = list(dict.fromkeys(prompts))
        for name, (reward, _) in self.rewards.items():
            reason = refusal(reward, distinct)
            if reason:
                # Those that are refused by themselves, or all, if it is only together.
                refused = [p for p in distinct if refusal(reward, [p])] or distinct
                raise BadReward(f"reward {name!r} cannot judge {len(refused)} of {len(distinct)} "
                                f"prompts: {some_of(refused)}; {reason}")


# A student of the method can stop reading here: what follows are error messages and names.

ERRORS = (Exception, SystemExit)                 # of anybody's code, which may call exit()


@contextmanager
def blamed(what):
    """An error of anybody's code inside becomes a BadReward of one line: what failed, and why."""
    try:
        yield
    except (BadReward, torch.OutOfMemoryError):  # for memory, `harness` has advice
        raise
    except ERRORS as error:
        raise BadReward(f"{what}: {described(error)}") from error


def checked(name, reward, scores, images, prompts):
    """A copy of the scores as float32 on the images' device, if they are (B,) finite numbers.

    A reward that may miss may give NaN as well."""
    got = type(scores).__name__
    if isinstance(scores, torch.Tensor):
        got = "complex numbers" if scores.is_complex() else tuple(scores.shape)
    if got != (len(prompts),):
        raise BadReward(f"reward {name!r} must return a tensor of shape ({len(prompts)},), "
                        f"one score per image, not {got}")
    scores = scores.to(images.device, torch.float32, copy=True)
    fine = torch.isfinite(scores)
    if getattr(reward, "may_miss", False):
        fine = fine | scores.isnan()
    bad = (~fine).nonzero()[:, 0].tolist()
    if bad:
        first = bad[0]
        raise BadReward(f"reward {name!r} gave {scores[first].item()} to image {first}, "
                        f"prompt {prompts[first]!r} "
                        f"({len(bad)} of {len(scores)} scores are not finite)")
    return scores


def refusal(reward, prompts):
    """What the reward's `check_prompts` has against the prompts, or None."""
    try:
        if hasattr(reward, "check_prompts"):
            reward.check_prompts(prompts)
    except ValueError as error:
        return first_line(error)
    except ERRORS as error:                      # a bug in the user's check
        return described(error)


def first_line(error):
    return (str(error).strip() or "no message").splitlines()[0]


def described(error):
    """An error in one line: its type, the first line of its text, and where it was raised.

    Of the calls that led there, that is the innermost one outside of installed packages and of this
    file, such as the line of the user's file that called torch."""
    others = (sysconfig.get_path("stdlib"), sysconfig.get_path("purelib"), "<frozen", __file__)
    calls = [(call.filename, call.lineno) for call in traceback.extract_tb(error.__traceback__)
             if not call.filename.startswith(others)]
    if isinstance(error, SyntaxError) and error.filename:
        calls.append((error.filename, error.lineno))
    place = " ({}, line {})".format(*calls[-1]) if calls else ""
    return f"{type(error).__name__}: {first_line(error)}{place}"


def some_of(prompts):
    """The first three different prompts, as a text for messages."""
    distinct = list(dict.fromkeys(prompts))
    more = f" and {len(distinct) - 3} more" if len(distinct) > 3 else ""
    return ", ".join(map(repr, distinct[:3])) + more


# ---------------------------------------------------------------------------------------------
# Names: where the reward of a name comes from
# ---------------------------------------------------------------------------------------------

# The rewards that are known so far: name -> factory, (device) -> reward, or (device, model).
REGISTRY = {}

# The files of rewards/, each imported when one of its rewards is asked for: module -> their names.
FAMILIES = {
    "rewards.shapes": ("shapes",),
    "rewards.clip": ("clip", "clip_bin", "hpsv2", "hpsv2_bin", "pickscore"),
    "rewards.quality": ("clip_iqa", "aesthetic", "maniqa"),
    "rewards.vlm": ("qwen_label", "qwen_fake", "qwen_weird"),
    "rewards.geneval": ("geneval",),
    "rewards.imagenet": ("imagenet",),
    "rewards.ocr": ("ocr",),
}
MODULES = {name: module for module, names in FAMILIES.items() for name in names}

# Names for several rewards: the paper's eight, each with weight 1, and those of them that
# open_clip alone can run, with CLIP-IQA in the place of MANIQA.
PAPER = "clip,clip_bin,hpsv2,hpsv2_bin,maniqa,qwen_label,qwen_fake,qwen_weird"
MIXTURES = {
    "paper_c2i": PAPER,
    "paper_t2i": PAPER,
    "paper_lite": "clip,clip_bin,hpsv2,hpsv2_bin,clip_iqa",
}


# What tables call something else: a function of such a name is called by its file, too.
TAKEN = {"image", "reward", "entropy", "verified", "pixels", "D", "FID", "precision", "recall"}


def known_rewards():
    """All names, as a text for messages.  Imports nothing."""
    names = sorted({*REGISTRY, *MODULES, *MIXTURES})
    return f"{', '.join(names)}, and your own as file.py:function"


def file_of(name):
    """The file that defines the reward of this name, or None if no reward has it."""
    if name in REGISTRY:
        return inspect.getsourcefile(REGISTRY[name])
    if name in MODULES:
        return importlib.util.find_spec(MODULES[name]).origin
    return None


def register(name):
    """Decorator of a factory (device) -> reward: makes it known as `name` to `build_rewards`.

    A file that is read again may register its rewards again; another file may not take a name."""
    def decorator(factory):
        taken = file_of(name)
        if taken and taken != inspect.getsourcefile(factory):
            raise ValueError(f"there is already a reward named {name!r}, in {taken}")
        REGISTRY[name] = factory
        return factory

    return decorator


for plain in (brightness, contrast, jpeg, jpeg_large):
    register(plain.__name__)(lambda device, reward=plain: reward)


# One reward of a text: a file of the user's, a name, which of imagenet may name a model, a weight.
ITEM = re.compile(r"(?:(.+\.py):)?(imagenet:[a-zA-Z]\w*|\w+)(?::([^:]*))?")


def items_of(spec):
    """The rewards that a text asks for: yields (file or None, name, weight).  A mixture is spelled
    out; a model stays with its reward's name."""
    for item in spec.split(","):
        match = ITEM.fullmatch(item.strip())     # C:\my.py:redness:0.5
        if not match:
            raise ValueError(f"cannot read {item!r} in the reward {spec!r}: write name[:weight] or "
                             "file.py:function[:weight]")
        file, name, weight = match.groups()
        weight = 1.0 if weight is None else weight_of(name, weight)
        if file is None and name in MIXTURES:
            for part_file, part_name, part_weight in items_of(MIXTURES[name]):
                yield part_file, part_name, weight * part_weight
        else:
            yield file, name, weight


def weight_of(name, text):
    """The weight of a reward as a number."""
    try:
        weight = float(text)
    except ValueError:
        weight = math.nan
    if not math.isfinite(weight):
        raise ValueError(f"the weight of reward {name!r} must be a finite number, not {text!r}")
    return weight


def check_neighbours(path):
    """Raises BadReward if a file imports a neighbour whose name another module has already.

    Python would hand out that one, which was loaded first."""
    finder = ModuleFinder([str(path.parent)])
    finder.run_script(str(path))                 # reads its imports, and runs nothing
    for name, neighbour in finder.modules.items():
        own, loaded = neighbour.__file__, getattr(sys.modules.get(name), "__file__", None)
        if own and loaded and Path(own).resolve() not in (path, Path(loaded).resolve()):
            raise BadReward(f"{path.name} imports {own}, but another module of that name is "
                            f"loaded, {loaded}: rename one of the two")


@lru_cache
def load_file(path, stamp):
    """A Python file as a module, which may import its neighbours.  It is read again only if its
    stamp, (time of change, size), is another."""
    file_spec = importlib.util.spec_from_file_location(str(path), path)
    module = importlib.util.module_from_spec(file_spec)
    sys.modules[file_spec.name] = module         # where dataclasses look for it
    sys.path.insert(0, str(path.parent))
    folder, dtype, graph = os.getcwd(), torch.get_default_dtype(), torch.is_grad_enabled()
    try:
        with blamed(f"{path.name} cannot be loaded"):
            check_neighbours(path)
            file_spec.loader.exec_module(module)
        there = os.getcwd(), torch.get_default_dtype(), torch.is_grad_enabled()
        if there != (folder, dtype, graph):
            raise BadReward(f"{path.name} changes the working directory, torch's default dtype or "
                            "its gradient mode for all: do that inside the reward, and undo it")
    finally:
        os.chdir(folder)
        torch.set_default_dtype(dtype)
        torch.set_grad_enabled(graph)
        sys.path.remove(str(path.parent))
    return module


def load_function(file, name):
    """The function or class `name` of a Python file."""
    path = Path(file).expanduser().resolve()
    if not path.is_file():
        raise ValueError(f"no such reward file: {file} (looked in {Path.cwd()})")
    module = load_file(path, (path.stat().st_mtime_ns, path.stat().st_size))
    function = getattr(module, name, None)
    if callable(function):
        return function
    raise ValueError(f"{file} has no function {name!r}")


def instance_of(cls, device):
    """A class of the user's, called with the device."""
    name = f"{cls.__name__!r} (line {inspect.getsourcelines(cls)[1]})"
    with blamed(f"{name} cannot be made with a device as its only argument"):
        return cls(device)


def check_call(name, reward):
    """Raises ValueError if the reward cannot be called with images and prompts."""
    try:
        inspect.signature(reward).bind("images", "prompts")
    except TypeError as error:
        raise ValueError(f"{name!r} is no reward, called with (images, prompts): {error}") from None
    except ValueError:
        return                                   # compiled code does not say what it takes


def factory_of(file, name):
    """What makes the reward of one item, (device) -> reward.  Makes nothing yet."""
    if file:
        reward = load_function(file, name)
        return partial(instance_of, reward) if inspect.isclass(reward) else lambda device: reward
    name, _, model = name.partition(":")
    if name in MODULES:
        importlib.import_module(MODULES[name])   # which registers the name
    if name not in REGISTRY:
        raise ValueError(f"unknown reward {name!r}: there are {known_rewards()}")
    return partial(REGISTRY[name], model=model) if model else REGISTRY[name]


def build_rewards(spec, device):
    """A RewardSet from a text: "shapes:1,jpeg:0.5", "my_rewards.py:redness:2", "paper_lite".

    Comma-separated items `name[:weight]` or `file.py:function[:weight]`, weight 1 unless given.  A
    class instead of a function is called with the device, once, and its instance with the images.
    A function is called by its name, or if that is taken, also by another item, by its file and
    name.
    Raises ValueError for anything that cannot be understood or found.  All names are looked up
    before any reward is made."""
    if not spec.strip():
        raise ValueError(f"no reward given: choose with --reward from {known_rewards()}")
    items, factories = list(items_of(spec)), {}
    names = [name for _, name, _ in items]
    for file, name, weight in items:
        factory = factory_of(file, name)
        if file and (names.count(name) > 1 or name in TAKEN):
            name = f"{file}:{name}"
        if name in factories:
            raise ValueError(f"reward {name!r} is named twice in {spec!r}: "
                             "give it once, with the sum of the weights")
        factories[name] = factory, weight
    rewards = {name: (factory(device), weight) for name, (factory, weight) in factories.items()}
    for name, (reward, _) in rewards.items():
        check_call(name, reward)
    return RewardSet(rewards)
