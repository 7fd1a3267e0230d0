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

and one option: `--reward my_rewards.py:redness --out runs/red`.  Several rewards are added up with weights:
`--reward "shapes:1,jpeg:0.2,my_rewards.py:redness:0.5"`.

A reward that needs a model or a device is made by a factory, `(device) -> reward`, which
`@register("name")` puts on the list below.
"""

import importlib.util
import inspect
import io
import math
import re
from pathlib import Path

import torch
from torchvision.transforms.functional import to_pil_image

REGISTRY = {}                                    # name -> factory


def register(name):
    """Decorator of a factory (device) -> reward: makes it known as `name` to `build_rewards`."""
    if not re.fullmatch(r"\w+", name):
        raise ValueError(f"a reward's name is letters, digits and underscores, not {name!r}")

    def decorator(factory):
        if name in REGISTRY and inspect.getsourcefile(REGISTRY[name]) != inspect.getsourcefile(factory):
            raise ValueError(f"there is already a reward named {name!r}, in {inspect.getsourcefile(REGISTRY[name])}")
        REGISTRY[name] = factory
        return factory

    return decorator


# ---------------------------------------------------------------------------------------------
# Rewards that need no model
# ---------------------------------------------------------------------------------------------

@register("shapes")
def shapes(device):
    """The toy's verifier: 1 if the picture shows exactly what the prompt asks for, else 0."""
    from toy import verify
    return verify


def jpeg_kilobytes(images, quality=95):
    """Size of each image as a JPEG file: (B, 3, H, W) in [0, 1] -> (B,), in units of 1000 bytes."""
    sizes = []
    for image in images.float().cpu():
        file = io.BytesIO()
        to_pil_image(image).save(file, format="jpeg", quality=quality)
        sizes.append(len(file.getvalue()))
    return torch.tensor(sizes, dtype=torch.float32, device=images.device) / 1000


@register("jpeg")
def jpeg(device):
    """Compressibility (DDPO, arXiv 2305.13301): minus the kilobytes of the image as a JPEG of quality 95."""
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

class RewardSet:
    """A weighted sum of rewards: {name: (reward, weight)}."""

    def __init__(self, rewards):
        self.rewards = rewards

    @torch.no_grad()
    def __call__(self, images, prompts):
        """images (B, 3, H, W) in [0, 1], prompts B strings -> (total (B,), {name: (B,)}), the parts unweighted.

        Raises ValueError, with the reward's name and the prompt, for a score that is not one finite number per image."""
        parts = {name: checked(name, reward(images, prompts), images, prompts) for name, (reward, _) in self.rewards.items()}
        total = sum(weight * parts[name] for name, (_, weight) in self.rewards.items())
        return total, parts


def checked(name, scores, images, prompts):
    """The scores as float32 on the images' device, if they are (B,) finite numbers."""
    if not isinstance(scores, torch.Tensor) or scores.shape != (len(prompts),):
        got = tuple(scores.shape) if isinstance(scores, torch.Tensor) else type(scores).__name__
        raise ValueError(f"reward {name!r} must return a tensor of shape ({len(prompts)},), one score per image, "
                         f"not {got}")
    scores = scores.to(images.device, torch.float32)
    bad = (~torch.isfinite(scores)).nonzero()[:, 0].tolist()
    if bad:
        raise ValueError(f"reward {name!r} gave {scores[bad[0]].item()} to image {bad[0]}, prompt {prompts[bad[0]]!r}"
                         f" ({len(bad)} of {len(scores)} scores are not finite)")
    return scores


def load_function(path, name):
    """The function or class `name` of the Python file at `path`."""
    if not Path(path).is_file():
        raise ValueError(f"no such reward file: {path} (looked in {Path.cwd()})")
    spec = importlib.util.spec_from_file_location(Path(path).stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    if not callable(getattr(module, name, None)):
        mine = [n for n, value in vars(module).items() if getattr(value, "__module__", "") == spec.name]
        raise ValueError(f"{path} has no function {name!r}; it has {', '.join(mine) or 'none'}")
    return getattr(module, name)


def build_rewards(spec, device):
    """Builds a RewardSet from a text such as "shapes:1,jpeg:0.5", "jpeg" or "my_rewards.py:redness:2".

    Comma-separated items `name[:weight]` or `file.py:function[:weight]`, weight 1 unless given.  A
    class instead of a function is called with the device, once, and its instance with the images.
    Raises ValueError for anything that cannot be understood or found."""
    if not spec.strip():
        raise ValueError(f"no reward given: choose with --reward from {', '.join(sorted(REGISTRY))}, "
                         "or your own as file.py:function")
    rewards = {}
    for item in spec.split(","):
        match = re.fullmatch(r"\s*(?:(?P<file>[^:]+\.py):)?(?P<name>\w+)(?::(?P<weight>[^:]+))?\s*", item)
        if match is None:
            raise ValueError(f"cannot read {item!r} in the reward {spec!r}: write name[:weight] or "
                             "file.py:function[:weight]")
        file, name = match["file"], match["name"]
        try:
            weight = float(match["weight"] or 1)
        except ValueError:
            weight = math.nan
        if not math.isfinite(weight):
            raise ValueError(f"the weight of reward {name!r} must be a finite number, not {match['weight']!r}")
        if name in rewards:
            raise ValueError(f"reward {name!r} is named twice in {spec!r}: give it once, with the sum of the weights")
        if file:
            reward = load_function(file, name)
            reward = reward(device) if inspect.isclass(reward) else reward
        elif name in REGISTRY:
            reward = REGISTRY[name](device)
        else:
            raise ValueError(f"unknown reward {name!r}: there are {', '.join(sorted(REGISTRY))}, "
                             "and your own as file.py:function")
        rewards[name] = reward, weight
    return RewardSet(rewards)
