"""Text in the image: does it spell what its prompt puts in double quotes?"""

import re

import torch

from reward import register
from rewards.sources import optional

# Straight or curly double quotes around a text that is not blank.
QUOTED = re.compile('["\u201c]([^"\u201c\u201d]*[^"\u201c\u201d\\s][^"\u201c\u201d]*)["\u201d]')


def edit_distance(a, b):
    """The fewest changes of single letters that turn a into b (Levenshtein 1966).

    A change inserts, deletes or replaces one letter."""
    row = list(range(len(b) + 1))                # distances of the empty text to each start of b
    for i, letter in enumerate(a, start=1):
        diagonal, row[0] = row[0], i
        for j, other in enumerate(b, start=1):
            replaced = diagonal + (letter != other)
            diagonal = row[j]
            row[j] = min(diagonal + 1, row[j - 1] + 1, replaced)
    return row[-1]


def letters(text):
    """The text without spaces, in lower case."""
    return re.sub(r"\s+", "", text).lower()


def quoted_texts(prompt):
    """The texts in double quotes, at least one.  Raises ValueError if there is none."""
    quoted = QUOTED.findall(prompt)
    if not quoted:
        raise ValueError("reward 'ocr' needs a text in double quotes, "
                         f"but the prompt is {prompt!r}")
    return quoted


def spelled(wanted, read):
    """Flow-GRPO's rule (arXiv 2505.05470): how well a text is spelled by all that was read.

    1 if it occurs there; else 1 minus the edit distance of the two over the text's length, at
    least 0.  Case and spaces do not count."""
    wanted, read = letters(wanted), letters(read)
    if wanted in read:
        return 1.0
    return max(0.0, 1 - edit_distance(read, wanted) / len(wanted))


@register("ocr")
class Ocr:
    """How well the picture spells the text that its prompt quotes, in [0, 1].

    Of several quoted texts, each is looked for by itself, in any place and order, and the score is
    the mean of theirs; Flow-GRPO looks for the first alone."""

    def __init__(self, device):
        easyocr = optional("easyocr", "ocr")
        self.reader = easyocr.Reader(["en"], gpu=torch.device(device).type == "cuda", verbose=False)

    def check_prompts(self, prompts):
        """Raises ValueError for a prompt without a quoted text."""
        for prompt in prompts:
            quoted_texts(prompt)

    def __call__(self, images, prompts):
        wanted, scores = [quoted_texts(prompt) for prompt in prompts], []
        for image, texts in zip(images, wanted):
            pixels = (image * 255).round().byte().permute(1, 2, 0).cpu().numpy()     # (H, W, 3)
            read = "".join(self.reader.readtext(pixels, detail=0))
            each = [spelled(text, read) for text in texts]
            scores.append(sum(each) / len(each))
        return torch.tensor(scores)
