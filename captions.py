"""Captions for text-to-image: reading, cleaning, composing and encoding them.

LlamaGen reads a caption as the features that Flan-T5-XL's encoder gives to its words:

    "a red bird"  --T5-->  4 features of 2048 numbers  --padded on the left-->  (120, 2048), a mask

so that the last caption position, from which the first code is predicted, is always a real one.
Every distinct caption is encoded once, before training, and T5 is gone when training starts.

Compositional captions ("a photo of two dogs", "a photo of a red bus left of a bench") follow the
six templates of GenEval (arXiv 2310.11513) over COCO's object names.  `compose` writes them and
`requirements` reads them back, for the reward "geneval" must know what to look for.
"""

import html
import json
import random
import re
import unicodedata
import warnings
from functools import cache
from pathlib import Path

import torch
import torch.nn.functional as F
from tqdm import tqdm

from argrpo import Prompts

# ---------------------------------------------------------------------------------------------
# Reading
# ---------------------------------------------------------------------------------------------

FIELDS = ("caption", "prompt", "text")           # where a JSON record may hold its caption
LINE_OF_JSON = re.compile(r'[\s\[{]*[\[{]\s*("|$)')           # how one begins
# Unicode's categories of what leaves no ink: controls, zero widths, lone accents.  And its fillers.
INKLESS, FILLERS = ("Cc", "Cf", "Mn"), "\u115f\u1160\u2800\u3164"


def has_ink(word):
    return any(unicodedata.category(c) not in INKLESS and c not in FILLERS for c in word)


def clean(caption):
    """A caption as LlamaGen's training saw ordinary ones, or "" if nothing in it can be seen.

    Repaired encoding, no HTML entities, lower case, single spaces."""
    from ftfy import fix_text
    caption = re.sub(r"[\v\f\x1c-\x1f]", " ", caption)     # ftfy would join the words around them
    words = html.unescape(fix_text(caption)).lower().split()
    return " ".join(word for word in words if has_ink(word))


def read_text(path):
    """The text of a UTF-8 file; its lines, which may have ended with \\r\\n or \\r, end with \\n.

    Raises ValueError, naming the line, if it is none."""
    text = path.read_text(encoding="utf-8-sig", errors="surrogateescape")
    wrong = re.search("[\0\udc80-\udcff]", text)        # a zero: UTF-16 can be valid UTF-8
    if wrong:
        line, byte = text.count("\n", 0, wrong.start()) + 1, ord(wrong[0]) & 255
        raise ValueError(f"{path}, line {line}: byte 0x{byte:02x} is not UTF-8 text; convert "
                         "the file, for instance with: iconv -f utf-16 (or latin1) -t utf-8")
    return text


def read_json(text, place):
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{place} is not JSON: {error}") from None


def read_records(path):
    """The records of a file, each with its number: [(number, text or JSON value), ...]."""
    if not path.is_file():
        raise FileNotFoundError(f"no such file of captions: {path} (looked in {Path.cwd()})")
    ending = path.suffix.lower()
    if ending not in ("", ".txt", ".json", ".jsonl", ".ndjson"):
        raise ValueError(f"{path}: cannot read captions from {ending}: write one a line into a "
                         ".txt file, or .json, .jsonl or .ndjson with a field caption")
    text = read_text(path)
    if ending == ".json":
        values = read_json(text, path)
        return list(enumerate(values if isinstance(values, list) else [values], start=1))
    lines = [(number, line) for number, line in enumerate(text.split("\n"), start=1)
             if clean(line)]
    if ending in (".jsonl", ".ndjson"):
        return [(number, read_json(line, f"{path}, line {number}")) for number, line in lines]
    for number, line in lines:
        if LINE_OF_JSON.match(line):
            raise ValueError(f"{path}, line {number} is JSON, not a caption: name the file .json, "
                             "or .jsonl if each line is a record")
    return lines


def read_tags(path):
    """{caption: the set of its tags in GenEval's metadata}, as `read_captions` reads them."""
    tags, path = {}, Path(path)
    for number, record in read_records(path):
        if not isinstance(record, dict):
            record = {"caption": record}
        values = [record.get(field) for field in FIELDS]
        values = [clean(value) if isinstance(value, str) else value for value in values]
        caption = next((value for value in values if value not in (None, "")), None)
        if not isinstance(caption, str):
            raise ValueError(f"{path}, record {number}: no caption there, "
                             f"nor under {', '.join(FIELDS)}")
        own = tags.setdefault(caption, set())
        if record.get("tag") is not None:
            own.add(str(record["tag"]))
    if not tags:
        raise ValueError(f"{path} holds no captions: write one a line, "
                         "or JSON with a field caption")
    return tags


def read_captions(path):
    """The captions of a file, cleaned, without repetitions, in the file's order.

    .json holds a list, .jsonl and .ndjson one record a line: texts, or objects with a field
    caption, prompt or text, such as GenEval's metadata; null and blank fields do not count.  .txt,
    or a name without an ending, holds one caption a line; empty lines do not count.  Raises
    ValueError, naming file and line, for another ending and what is no caption or no UTF-8."""
    return list(read_tags(path))


# ---------------------------------------------------------------------------------------------
# Composing: GenEval's templates over COCO's objects
# ---------------------------------------------------------------------------------------------

COLOUR_NAMES = ("red", "orange", "yellow", "green", "blue", "purple", "pink", "brown", "black",
                "white")
NUMBERS = {"two": 2, "three": 3, "four": 4}
POSITIONS = ("left of", "right of", "above", "below")
# GenEval's names of objects that COCO calls otherwise, and the plurals that no rule gives.
ALIASES = {"computer mouse": "mouse", "tv remote": "remote", "computer keyboard": "keyboard"}
PLURALS = {"person": "people", "sheep": "sheep", "skis": "skis", "scissors": "scissors",
           "knife": "knives", "mouse": "mice", "computer mouse": "computer mice"}


@cache
def coco_objects():
    """COCO's 80 object names, as torchvision's detectors number them: {name: number}."""
    from torchvision.models.detection import MaskRCNN_ResNet50_FPN_V2_Weights
    names = MaskRCNN_ResNet50_FPN_V2_Weights.COCO_V1.meta["categories"]
    return {name: number for number, name in enumerate(names)
            if name not in ("__background__", "N/A")}


def plural(name):
    ending = "es" if name.endswith(("s", "sh", "ch", "x")) else "s"
    return PLURALS.get(name, name + ending)


def with_article(name):
    article = "an" if name[0] in "aeiou" else "a"
    return f"{article} {name}"


def random_composition(rng):
    """One caption of each of the six templates, over two random objects and two colours."""
    objects = rng.sample(list(coco_objects()), 2)
    colours = rng.sample(COLOUR_NAMES, 2)
    number, position = rng.choice(list(NUMBERS)), rng.choice(POSITIONS)
    one, two = map(with_article, objects)
    red, blue = [with_article(" ".join(pair)) for pair in zip(colours, objects)]
    texts = [
        one,                                     # one object
        f"{one} and {two}",                      # two
        f"{number} {plural(objects[0])}",        # counted
        red,                                     # coloured
        f"{one} {position} {two}",               # placed
        f"{red} and {blue}",                     # coloured pair
    ]
    return [f"a photo of {text}" for text in texts]


def compose(n, seed=0):
    """n different captions, equally often of each template."""
    rng = random.Random(seed)
    captions = {}                                # a dict keeps the order, and each caption once
    while len(captions) < n:
        new = random_composition(rng)
        room = n - len(captions)
        if room <= 6 or len(captions) % 6 != 0:  # all six are taken as long as all six are new
            new = [rng.choice(new)]
        captions |= dict.fromkeys(new)
    return list(captions)[:n]


# ---------------------------------------------------------------------------------------------
# Reading compositions back
# ---------------------------------------------------------------------------------------------

@cache
def thing_pattern():
    """A pattern for one thing of a composition, with groups (number, colour, name), and the names.

    The names map every singular and plural to COCO's: {name: COCO's name}.  Plurals of GenEval's
    own prompts are mechanical, "two benchs" and "two persons": they count, too."""
    names = {name: name for name in coco_objects()} | ALIASES
    for name, coco in list(names.items()):
        names |= dict.fromkeys((plural(name), name + "s", name + "es"), coco)
    longest_first = sorted(map(re.escape, names), key=len, reverse=True)
    article = rf"(?:an?|one|({'|'.join(NUMBERS)}))"
    colour = rf"(?:({'|'.join(COLOUR_NAMES)}) )?"
    return rf"{article} {colour}({'|'.join(longest_first)})", names


def requirements(caption):
    """What a compositional caption asks for, as in GenEval's metadata.

    A list of {"class", "count", "color", "position"}, where position is [relation, number of the
    thing it relates to].  "color" and "position" only stand where they are asked for.

    Raises ValueError for a caption that follows none of the templates."""
    thing, names = thing_pattern()
    links = "|".join(("and", *POSITIONS))
    match = re.fullmatch(rf"(?:a photo of )?{thing}(?: ({links}) {thing})?", clean(caption))
    if match is None:
        raise ValueError(f"cannot read {caption!r} as a composition: write for instance "
                         "'a photo of two dogs' or 'a photo of a red bus left of a bench', "
                         "with objects of COCO")
    link, wanted = match[4], []
    for number, colour, name in (match.groups()[:3], match.groups()[4:]):
        if name:
            wanted.append({"class": names[name], "count": NUMBERS.get(number, 1)})
        if colour:
            wanted[-1]["color"] = colour
    if link in POSITIONS:                        # "A left of B": A's place is checked against B's
        wanted.reverse()
        wanted[1]["position"] = [link, 0]
    return wanted


# ---------------------------------------------------------------------------------------------
# Encoding.  Shapes: M captions, P of them picked, T condition positions, C numbers a word.
# ---------------------------------------------------------------------------------------------

class PaddedFeatures:
    """Features of M captions, stored without padding.

    Indexed with (P,) it gives (P, T, C), padded on the left.  At 120 positions of 2048 numbers,
    ten thousand padded captions would fill ten gigabytes."""

    def __init__(self, features, length):
        self.features, self.length = features, length        # M tensors (words, C); T

    def __getitem__(self, index):
        rows = [self.features[i] for i in index.tolist()]
        return torch.stack([F.pad(words, (0, 0, self.length - len(words), 0)) for words in rows])


class T5Captions:
    """Flan-T5's encoder: called with captions, it returns Prompts.

    folder holds the model.  Every distinct caption is encoded once.  bfloat16 on a GPU, as for
    LlamaGen's training."""

    def __init__(self, folder, device="cpu", length=120, batch=32):
        from transformers import AutoTokenizer, T5EncoderModel
        device = torch.device(device)
        self.tokenizer = AutoTokenizer.from_pretrained(folder)
        dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
        model = T5EncoderModel.from_pretrained(folder, dtype=dtype)
        self.model = model.to(device).eval().requires_grad_(False)
        self.length, self.batch = length, batch
        self.features = {}                       # caption -> (words, C)

    @torch.no_grad()
    def __call__(self, captions):
        """Prompts whose conditions are T5's features of the captions.

        Captions of more than `length` tokens, T5's end mark included, lose their end; one warning
        counts them."""
        new = [text for text in dict.fromkeys(captions) if text not in self.features]
        long = sum(len(self.tokenizer(caption).input_ids) > self.length for caption in new)
        if long:
            warnings.warn(f"{long} of {len(new)} captions are longer than {self.length} tokens "
                          "and lose their end")
        for start in tqdm(range(0, len(new), self.batch), desc="T5", unit="batch"):
            some = new[start:start + self.batch]
            tokens = self.tokenizer(some, max_length=self.length, truncation=True, padding=True,
                                    return_tensors="pt").to(self.model.device)
            output = self.model(input_ids=tokens.input_ids, attention_mask=tokens.attention_mask)
            states, real = output.last_hidden_state.cpu(), tokens.attention_mask.bool().cpu()
            self.features |= {caption: state[words]          # without the batch's padding
                              for caption, state, words in zip(some, states, real)}
        chosen = [self.features[caption] for caption in captions]
        lengths = torch.tensor([len(features) for features in chosen])
        mask = torch.arange(self.length) >= self.length - lengths[:, None]
        return Prompts(list(captions), PaddedFeatures(chosen, self.length), mask)     # mask (M, T)
