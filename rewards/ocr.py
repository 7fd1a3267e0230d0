"""Text in the image: does it spell what its prompt puts in double quotes?"""

import re

import torch

from reward import register
from rewards.sources import optional

# Straight or curly double quotes around a text that is not blank.
QUOTED = re.compile('["\u201c]([^"\u201c\u201d]*\\S[^"\u201c\u201d]*)["\u201d]')


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


@register("ocr")
def ocr(device):
    """1 minus the edit distance over the text's length, at least 0.

    Case and spaces do not count.  Raises ValueError for a prompt without a quoted text."""
    easyocr = optional("easyocr", "ocr")
    reader = easyocr.Reader(["en"], gpu=torch.device(device).type == "cuda", verbose=False)

    def reward(images, prompts):
        scores = []
        for image, prompt in zip(images, prompts):
            quoted = QUOTED.findall(prompt)
            if not quoted:
                raise ValueError(f"reward 'ocr' needs a text in double quotes, "
                                 f"but the prompt is {prompt!r}")
            target = letters("".join(quoted))
            pixels = (image * 255).round().byte().permute(1, 2, 0).cpu().numpy()     # (H, W, 3)
            read = letters("".join(reader.readtext(pixels, detail=0)))
            scores.append(max(0.0, 1 - edit_distance(read, target) / len(target)))
        return torch.tensor(scores)

    return reward
