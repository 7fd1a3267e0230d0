"""Text in the image: does it spell what its prompt puts in double quotes?

The reader is PP-OCRv6, whose weights (27 MB, Apache-2.0) come in the package rapidocr.  It runs on
the CPU, wherever the policy is.
"""

import re

import torch

from reward import register, to_uint8
from rewards.sources import optional

# Straight or curly double quotes around a text that is not blank.
QUOTED = re.compile('["\u201c]([^"\u201c\u201d]*[^"\u201c\u201d\\s][^"\u201c\u201d]*)["\u201d]')


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
    from rapidfuzz.distance import Levenshtein
    wanted, read = letters(wanted), letters(read)
    if wanted in read:
        return 1.0
    return max(0.0, 1 - Levenshtein.distance(read, wanted) / len(wanted))


@register("ocr")
class Ocr:
    """How well the picture spells the text that its prompt quotes, in [0, 1].

    Of several quoted texts, each is looked for by itself, in any place and order, and the score is
    the mean of theirs; Flow-GRPO looks for the first alone."""

    def __init__(self, device):
        for package in ("rapidfuzz", "onnxruntime"):
            optional(package, "ocr")
        self.engine = optional("rapidocr", "ocr").RapidOCR(params={
            "Global.log_level": "error",
            "Global.use_cls": False,             # no line is upside down
            "Global.text_score": 0,              # what it is unsure of counts, too
            "Det.limit_side_len": 256,           # pictures of 256 pixels are searched as they are
            "Rec.rec_batch_num": 1,              # each line by itself: in a batch it would be
                                                 # padded to the widest, and so depend on it
            "EngineConfig.onnxruntime.intra_op_num_threads": torch.get_num_threads(),
        })

    def check_prompts(self, prompts):
        """Raises ValueError for a prompt without a quoted text."""
        for prompt in prompts:
            quoted_texts(prompt)

    def __call__(self, images, prompts):
        wanted, scores = [quoted_texts(prompt) for prompt in prompts], []
        pixels = to_uint8(images).flip(-1).contiguous().numpy()          # (B, H, W, BGR)
        for picture, texts in zip(pixels, wanted):
            read = "".join(self.engine(picture).txts or ())
            each = [spelled(text, read) for text in texts]
            scores.append(sum(each) / len(each))
        return torch.tensor(scores)
