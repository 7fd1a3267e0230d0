"""Reward functions: what "better" means.

A reward is any callable

    reward(images, prompts) -> (B,) float tensor, higher is better

with images (B, 3, H, W) float in [0, 1] on the training device and prompts a list of B strings.
GRPO only ever compares images of one prompt with each other, so a reward's zero does not matter,
and its scale matters only beside other rewards.

Yours takes five lines, in any file:

    # my_rewards.py
    def redness(images, prompts):
        red, green, blue = images.mean(dim=(2, 3)).unbind(dim=1)
        return red - (green + blue) / 2

and one option: `--reward my_rewards.py:redness --out runs/red`.  Several rewards are added up with
weights: `--reward "shapes:1,jpeg:0.2,my_rewards.py:redness:0.5"`.  Before a long run, examine it,
or score pictures:

    python -m rewards --check my_rewards.py:redness
    python -m rewards --reward clip,aesthetic --prompt "a photo of an otter" one.png two.png

A reward that needs a model or a device is made by a factory, `(device) -> reward`, which
`@register("name")` makes known by its name.  The rewards with models are in the folder rewards/,
one file a family.  Such a file is imported when one of its rewards is asked for, and not before.

A reward that cannot judge an image (a language model whose answer makes no sense) says so: it
carries `may_miss = True` and gives NaN, and the image is left out of its group.

A reward that needs something of its prompts, such as a text in quotes, has a method (or, if it is a
function, an attribute) `check_prompts(prompts)`, which raises ValueError for those that it cannot
judge.  All prompts of a run pass it before training.
"""

import importlib
import importlib.util
import inspect
import io
import math
import re
import sysconfig
import traceback
from pathlib import Path

import torch

# ---------------------------------------------------------------------------------------------
# Names: where the reward of a name comes from
# ---------------------------------------------------------------------------------------------

# The rewards that are known so far: name -> factory, (device) -> reward.
REGISTRY = {}

# The rewards whose file is imported when they are asked for: name -> module that registers it.
MODULES = {
    "shapes": "rewards.shapes",
    "clip": "rewards.clip",
    "clip_bin": "rewards.clip",
    "hpsv2": "rewards.clip",
    "hpsv2_bin": "rewards.clip",
    "pickscore": "rewards.clip",
    "clip_iqa": "rewards.quality",
    "aesthetic": "rewards.quality",
    "maniqa": "rewards.quality",
    "qwen_label": "rewards.vlm",
    "qwen_fake": "rewards.vlm",
    "qwen_weird": "rewards.vlm",
    "geneval": "rewards.geneval",
    "imagenet": "rewards.imagenet",
    "ocr": "rewards.ocr",
}

# Names for several rewards: the paper's eight, each with weight 1, and the part of them that
# open_clip alone can run, with CLIP-IQA in the place of MANIQA.
PAPER = "clip,clip_bin,hpsv2,hpsv2_bin,maniqa,qwen_label,qwen_fake,qwen_weird"
MIXTURES = {
    "paper_c2i": PAPER,
    "paper_t2i": PAPER,
    "paper_lite": "clip,clip_bin,hpsv2,hpsv2_bin,clip_iqa",
}


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
    if not re.fullmatch(r"\w+", name):
        raise ValueError(f"a reward's name is letters, digits and underscores, not {name!r}")

    def decorator(factory):
        taken = file_of(name)
        if taken and taken != inspect.getsourcefile(factory):
            raise ValueError(f"there is already a reward named {name!r}, in {taken}")
        REGISTRY[name] = factory
        return factory

    return decorator


# ---------------------------------------------------------------------------------------------
# Rewards of a few lines
# ---------------------------------------------------------------------------------------------

def to_uint8(images):
    """(..., 3, height, width) in [0, 1] -> (..., height, width, 3) uint8 on the CPU, rounded: how
    pictures are stored."""
    return images.detach().float().mul(255).round().byte().movedim(-3, -1).cpu()


def jpeg_kilobytes(images, quality=95):
    """Size of each image as a JPEG file: (B, 3, height, width) in [0, 1] -> (B,), in units of 1000
    bytes."""
    from PIL import Image
    sizes = []
    for picture in to_uint8(images).numpy():
        file = io.BytesIO()
        Image.fromarray(picture).save(file, format="jpeg", quality=quality)
        sizes.append(len(file.getvalue()))
    return torch.tensor(sizes, dtype=torch.float32, device=images.device) / 1000


@register("jpeg")
def jpeg(device):
    """Compressibility (DDPO, arXiv 2305.13301): minus the kilobytes as a JPEG of quality 95."""
    return lambda images, prompts: -jpeg_kilobytes(images)


@register("jpeg_large")
def jpeg_large(device):
    """Incompressibility (DDPO): plus the kilobytes."""
    return lambda images, prompts: jpeg_kilobytes(images)


@register("brightness")
def brightness(device):
    """Mean over all pixels and channels, in [0, 1]."""
    return lambda images, prompts: images.mean(dim=(1, 2, 3))


@register("contrast")
def contrast(device):
    """Standard deviation of the grey value over the image, in [0, 0.5]."""
    return lambda images, prompts: images.mean(dim=1).flatten(1).std(dim=1)


# ---------------------------------------------------------------------------------------------
# Several rewards, added up
# ---------------------------------------------------------------------------------------------

class BadReward(ValueError):
    """A reward failed, cannot judge its prompts, or gave no finite number per image."""


def described(error):
    """An error in one line: its type, the first line of its text, and where it was raised.

    Of the calls that led there, that is the innermost one outside of installed packages, such as
    the line of the user's file that called torch."""
    installed = (sysconfig.get_path("stdlib"), sysconfig.get_path("purelib"), "<frozen")
    calls = [call for call in traceback.extract_tb(error.__traceback__)
             if not call.filename.startswith(installed)]
    text = (str(error).strip() or "no message").splitlines()[0]
    return f"{type(error).__name__}: {text} ({calls[-1].filename}, line {calls[-1].lineno})"


def refusal(reward, prompts):
    """What the reward's `check_prompts` has against the prompts, or None."""
    try:
        if hasattr(reward, "check_prompts"):
            reward.check_prompts(prompts)
    except ValueError as error:
        return str(error)
    except Exception as error:                   # a bug in the user's check
        return described(error)
    return None


def some_of(prompts):
    """The first three different prompts, as a text for messages."""
    distinct = list(dict.fromkeys(prompts))
    more = f" and {len(distinct) - 3} more" if len(distinct) > 3 else ""
    return ", ".join(map(repr, distinct[:3])) + more


def checked(name, reward, scores, images, prompts):
    """The scores as float32 on the images' device, if they are (B,) finite numbers.

    A reward that may miss may give NaN as well."""
    got = tuple(scores.shape) if isinstance(scores, torch.Tensor) else type(scores).__name__
    if got != (len(prompts),):
        raise BadReward(f"reward {name!r} must return a tensor of shape ({len(prompts)},), "
                        f"one score per image, not {got}")
    scores = scores.to(images.device, torch.float32)
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


# Dicts in which rewards keep what other rewards of the same batch may need again, such as CLIP's
# features of its images.  A model appends its dict here.  RewardSet empties them after each batch.
BATCH_CACHES = []


class RewardSet:
    """A weighted sum of rewards: {name: (reward, weight)}."""

    def __init__(self, rewards):
        self.rewards = rewards

    def check_prompts(self, prompts):
        """Raises BadReward, in one line, if a reward cannot judge some of the prompts.

        Called with all prompts of a run before its training."""
        distinct = list(dict.fromkeys(prompts))
        for name, (reward, _) in self.rewards.items():
            reason = refusal(reward, distinct)
            if reason is None:
                continue
            refused = [prompt for prompt in distinct if refusal(reward, [prompt]) is not None]
            if refused:
                reason = refusal(reward, refused[:1])
            raise BadReward(f"reward {name!r} cannot judge {len(refused) or len(distinct)} of "
                            f"{len(distinct)} prompts: {some_of(refused or distinct)}; {reason}")

    def ask(self, name, images, prompts):
        """The checked scores (B,) of one reward.  Its own exception becomes a BadReward."""
        reward, _ = self.rewards[name]
        try:
            scores = reward(images, prompts)
        except (BadReward, torch.OutOfMemoryError):      # for memory, `harness.run` has advice
            raise
        except Exception as error:
            raise BadReward(f"reward {name!r} failed for the prompts {some_of(prompts)}: "
                            f"{described(error)}") from error
        return checked(name, reward, scores, images, prompts)

    @torch.no_grad()
    def __call__(self, images, prompts):
        """images (B, 3, H, W) in [0, 1], prompts B strings -> (total (B,), {name: (B,)}).

        The parts are unweighted.  NaN means missing, and makes the total missing.  Raises
        BadReward, with the reward's name and the prompt, if a reward raises an error, or gives
        a score that is not one finite number per image, unless the reward may miss."""
        total, parts = 0, {}
        try:
            for name, (_, weight) in self.rewards.items():
                parts[name] = self.ask(name, images, prompts)
                total = total + weight * parts[name]
        finally:
            for cache in BATCH_CACHES:
                cache.clear()
            for reward, _ in self.rewards.values():
                if hasattr(reward, "forget"):
                    reward.forget()
        return total, parts


# ---------------------------------------------------------------------------------------------
# From a text to a RewardSet
# ---------------------------------------------------------------------------------------------

def items_of(spec):
    """The rewards that a text asks for: yields (file or None, name, weight).

    A mixture is spelled out.  "imagenet:resnet50" is one name: the reward, and its classifier."""
    item_pattern = (r"\s*(?:(?P<file>[^:]+\.py):)?(?P<name>imagenet:[a-z]\w+|\w+)"
                    r"(?::(?P<weight>[^:]+))?\s*")
    for item in spec.split(","):
        match = re.fullmatch(item_pattern, item)
        if match is None:
            raise ValueError(f"cannot read {item!r} in the reward {spec!r}: write name[:weight] or "
                             "file.py:function[:weight]")
        file, name = match["file"], match["name"]
        try:
            weight = float(match["weight"] or 1)
        except ValueError:
            weight = math.nan
        if not math.isfinite(weight):
            raise ValueError(f"the weight of reward {name!r} must be a finite number, "
                             f"not {match['weight']!r}")
        if file is None and name in MIXTURES:
            for part_file, part_name, part_weight in items_of(MIXTURES[name]):
                yield part_file, part_name, weight * part_weight
        else:
            yield file, name, weight


def load_function(path, name):
    """The function or class `name` of the Python file at `path`."""
    if not Path(path).is_file():
        raise ValueError(f"no such reward file: {path} (looked in {Path.cwd()})")
    file_spec = importlib.util.spec_from_file_location(Path(path).stem, path)
    module = importlib.util.module_from_spec(file_spec)
    file_spec.loader.exec_module(module)
    function = getattr(module, name, None)
    if callable(function):
        return function
    mine = [n for n, value in vars(module).items()
            if getattr(value, "__module__", "") == file_spec.name]
    raise ValueError(f"{path} has no function {name!r}; it has {', '.join(mine) or 'none'}")


def factory_of(file, name):
    """What makes the reward of one item, (device) -> reward.  Makes nothing yet."""
    if file:
        reward = load_function(file, name)
        return reward if inspect.isclass(reward) else lambda device: reward
    name, _, model = name.partition(":")
    if name in MODULES:
        importlib.import_module(MODULES[name])   # which registers the name
    if name not in REGISTRY:
        raise ValueError(f"unknown reward {name!r}: there are {known_rewards()}")
    if model:
        return lambda device: REGISTRY[name](device, model)
    return REGISTRY[name]


def build_rewards(spec, device):
    """A RewardSet from a text: "shapes:1,jpeg:0.5", "my_rewards.py:redness:2", "paper_lite".

    Comma-separated items `name[:weight]` or `file.py:function[:weight]`, weight 1 unless given.  A
    class instead of a function is called with the device, once, and its instance with the images.
    Raises ValueError for anything that cannot be understood or found, before it loads any model."""
    if not spec.strip():
        raise ValueError(f"no reward given: choose with --reward from {known_rewards()}")
    wanted = {}                                  # name -> (factory, weight)
    for file, name, weight in items_of(spec):
        if name in wanted:
            raise ValueError(f"reward {name!r} is named twice in {spec!r}: "
                             "give it once, with the sum of the weights")
        wanted[name] = factory_of(file, name), weight
    rewards = {}
    for name, (factory, weight) in wanted.items():
        rewards[name] = factory(device), weight
    return RewardSet(rewards)
