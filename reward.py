"""Reward functions: what "better" means.

A reward is any callable

    reward(images, prompts) -> (B,) float tensor, higher is better

with images (B, 3, height, width) float in [0, 1] on the training device, and prompts the B texts
that they were drawn for.  Several rewards, weighted and added up, are a `RewardSet`, which returns
(total (B,), {name: (B,)}): that is what `argrpo.train` takes as its reward_fn.

GRPO only compares images of one prompt with each other, and divides by their standard deviation.
So a reward's zero does not matter.  Its scale does not matter either as long as that deviation is
far above 1e-4, which is added to it (below, less is learned, or nothing), and below 1e19, where its
square overflows.  Beside other rewards, or with scale_advantages off, the scale is a weight.

Yours takes five lines, in any file:

    # my_rewards.py
    def redness(images, prompts):
        red, green, blue = images.mean(dim=(2, 3)).unbind(dim=1)
        return red - (green + blue) / 2

and one option: `--reward my_rewards.py:redness --out runs/red`.  With others and their weights:
`--reward "shapes:1,jpeg:0.2,my_rewards.py:redness:0.5"`.  Before a long run, examine it, or score
pictures:

    python -m rewards --check my_rewards.py:redness
    python -m rewards --reward clip,aesthetic --prompt "a photo of an otter" one.png two.png

A reward may have, as methods or, if it is a function, as attributes:

    may_miss = True            it gives NaN to an image that it cannot judge (a language model whose
                               answer makes no sense); the image is left out of its group
    check_prompts(prompts)     raises ValueError for prompts that it cannot judge, such as those
                               without a text in quotes; all prompts of a run pass it first
    forget()                   is called after each batch, for what it kept of it
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
import re
import sysconfig
import traceback
from pathlib import Path

import torch

# ---------------------------------------------------------------------------------------------
# Rewards of a few lines
# ---------------------------------------------------------------------------------------------

def brightness(images, prompts):
    """Mean over all pixels and channels, in [0, 1]."""
    return images.mean(dim=(1, 2, 3))


def contrast(images, prompts):
    """Standard deviation of the grey value over the image, in [0, 0.5]."""
    return images.mean(dim=1).flatten(1).std(dim=1)


def jpeg(images, prompts):
    """Compressibility (DDPO, arXiv 2305.13301): minus the kilobytes as a JPEG of quality 95."""
    return -jpeg_kilobytes(images)


def jpeg_large(images, prompts):
    """Incompressibility (DDPO): plus the kilobytes."""
    return jpeg_kilobytes(images)


def jpeg_kilobytes(images, quality=95):
    """Size of each image as a JPEG file: (B, 3, height, width) in [0, 1] -> (B,), in 1000 bytes."""
    from PIL import Image
    sizes = []
    for picture in to_uint8(images).numpy():
        file = io.BytesIO()
        Image.fromarray(picture).save(file, format="jpeg", quality=quality)
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

        The parts are unweighted.  NaN means missing, and makes the total missing.  Raises
        BadReward, with the reward's name and the prompt, if a reward raises an error, changes the
        images or prompts, or gives a score that is not one finite number per image, unless the
        reward may miss."""
        given, total, parts = (images.clone(), list(prompts)), 0, {}
        try:
            for name, (reward, weight) in self.rewards.items():
                parts[name] = checked(name, reward, ask(name, reward, *given), *given)
                if given[1] != list(prompts) or not torch.equal(given[0], images):
                    raise BadReward(f"reward {name!r} changes the images in place, or its prompts, "
                                    "which other rewards read, too: let it work on a copy")
                total = total + weight * parts[name]
        finally:
            for reward, _ in self.rewards.values():
                if hasattr(reward, "forget"):
                    reward.forget()
        return total, parts

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
            else:
                refused = distinct               # each passes alone, but not all together
            raise BadReward(f"reward {name!r} cannot judge {len(refused)} of {len(distinct)} "
                            f"prompts: {some_of(refused)}; {reason}")


# A student of the method can stop reading here: what follows are error messages and names.

def ask(name, reward, images, prompts):
    """What the reward returns.  Its own exception becomes a BadReward."""
    try:
        return reward(images, prompts)
    except (BadReward, torch.OutOfMemoryError):  # for memory, `harness` has advice
        raise
    except Exception as error:
        raise BadReward(f"reward {name!r} failed for the prompts {some_of(prompts)}: "
                        f"{described(error)}") from error


def checked(name, reward, scores, images, prompts):
    """A copy of the scores as float32 on the images' device, if they are (B,) finite numbers.

    A reward that may miss may give NaN as well."""
    got = tuple(scores.shape) if isinstance(scores, torch.Tensor) else type(scores).__name__
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
        return str(error)
    except Exception as error:                   # a bug in the user's check
        return described(error)
    return None


def described(error):
    """An error in one line: its type, the first line of its text, and where it was raised.

    Of the calls that led there, that is the innermost one outside of installed packages, such as
    the line of the user's file that called torch."""
    installed = (sysconfig.get_path("stdlib"), sysconfig.get_path("purelib"), "<frozen")
    calls = [call for call in traceback.extract_tb(error.__traceback__)
             if not call.filename.startswith(installed)]
    text = (str(error).strip() or "no message").splitlines()[0]
    return f"{type(error).__name__}: {text} ({calls[-1].filename}, line {calls[-1].lineno})"


def some_of(prompts):
    """The first three different prompts, as a text for messages."""
    distinct = list(dict.fromkeys(prompts))
    more = f" and {len(distinct) - 3} more" if len(distinct) > 3 else ""
    return ", ".join(map(repr, distinct[:3])) + more


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
WITH_MODELS = ("imagenet",)      # of these a model can be chosen, name:model, as imagenet:resnet50

# Names for several rewards: the paper's eight, each with weight 1, and those of them that
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


for plain in (brightness, contrast, jpeg, jpeg_large):
    register(plain.__name__)(lambda device, reward=plain: reward)


def items_of(spec):
    """The rewards that a text asks for: yields (file or None, name, weight).  A mixture is spelled
    out; a model stays with its reward's name."""
    for item in spec.split(","):
        file, _, rest = item.strip().rpartition(".py:")
        file = file + ".py" if file else None
        name, *numbers = rest.split(":")
        if name in WITH_MODELS and numbers and numbers[0][:1].isalpha():
            name += ":" + numbers.pop(0)
        if not re.fullmatch(r"\w+(:\w+)?", name) or len(numbers) > 1:
            raise ValueError(f"cannot read {item!r} in the reward {spec!r}: write name[:weight] or "
                             "file.py:function[:weight]")
        weight = weight_of(name, *numbers)
        if file is None and name in MIXTURES:
            for part_file, part_name, part_weight in items_of(MIXTURES[name]):
                yield part_file, part_name, weight * part_weight
        else:
            yield file, name, weight


def weight_of(name, text="1"):
    """The weight of a reward as a number."""
    try:
        weight = float(text)
    except ValueError:
        weight = math.nan
    if not math.isfinite(weight):
        raise ValueError(f"the weight of reward {name!r} must be a finite number, not {text!r}")
    return weight


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
