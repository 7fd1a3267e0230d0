"""Captions for text-to-image: reading, cleaning, composing and encoding them.

LlamaGen reads a caption as the features that Flan-T5-XL's encoder gives to its words:

    "a red bird"  --T5-->  4 features of 2048 numbers  --padded on the left-->  (120, 2048) and a mask

so that the last caption position, from which the first code is predicted, is always a real one.
Every distinct caption is encoded once, before training, and T5 is gone when training starts.

Compositional captions ("a photo of two dogs", "a photo of a red bus left of a bench") follow the six
templates of GenEval (arXiv 2310.11513) over COCO's object names.  `compose` writes them and
`requirements` reads them back, for the reward "geneval" must know what to look for.
"""

import html
import json
import random
import re
import warnings
from functools import cache
from pathlib import Path

import torch
from tqdm import tqdm

import argrpo

# ---------------------------------------------------------------------------------------------
# Reading
# ---------------------------------------------------------------------------------------------

FIELDS = ("caption", "prompt", "text")           # where a JSON record may hold its caption; GenEval's says prompt


def clean(caption):
    """A caption as LlamaGen's training saw ordinary ones: repaired encoding, no HTML entities, lower case, single spaces."""
    from ftfy import fix_text
    return " ".join(html.unescape(fix_text(caption)).lower().split())


def read_captions(path):
    """The captions of a file, cleaned, without repetitions, in the file's order.

    .json holds a list and .jsonl one record a line: texts, or objects with a field caption, prompt or
    text, such as GenEval's metadata.  Any other file holds one caption a line; empty lines do not
    count.  Raises ValueError, naming file and line, for what is no caption or no UTF-8."""
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"no such file of captions: {path} (looked in {Path.cwd()})")
    try:
        text = path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = error.object[:error.start].count(b"\n") + 1
        raise ValueError(f"{path}, line {line}: byte 0x{error.object[error.start]:02x} is not UTF-8; "
                         f"convert the file, for instance with: iconv -t utf-8") from None
    try:
        if path.suffix == ".json":
            records = json.loads(text)
            records = list(enumerate(records if isinstance(records, list) else [records], start=1))
        else:
            records = [(number, line) for number, line in enumerate(text.splitlines(), start=1) if line.strip()]
            if path.suffix == ".jsonl":
                records = [(number, json.loads(line)) for number, line in records]
    except json.JSONDecodeError as error:
        raise ValueError(f"{path} is not JSON: {error}") from None
    captions = []
    for number, record in records:
        if isinstance(record, dict):
            record = next((record[field] for field in FIELDS if field in record), None)
        if not isinstance(record, str) or not record.strip():
            raise ValueError(f"{path}, record {number}: no caption there, nor under {', '.join(FIELDS)}")
        captions.append(clean(record))
    if not captions:
        raise ValueError(f"{path} holds no captions: write one a line, or JSON with a field caption")
    return list(dict.fromkeys(captions))


# ---------------------------------------------------------------------------------------------
# Composing: GenEval's templates over COCO's objects
# ---------------------------------------------------------------------------------------------

COLOURS = ("red", "orange", "yellow", "green", "blue", "purple", "pink", "brown", "black", "white")
COUNTS = {"two": 2, "three": 3, "four": 4}
RELATIONS = ("left of", "right of", "above", "below")
# GenEval's names of objects that COCO calls otherwise, and the plurals that no rule gives.
ALIASES = {"computer mouse": "mouse", "tv remote": "remote", "computer keyboard": "keyboard"}
PLURALS = {"person": "people", "sheep": "sheep", "skis": "skis", "scissors": "scissors", "knife": "knives",
           "mouse": "mice", "computer mouse": "computer mice"}


@cache
def coco_objects():
    """COCO's 80 object names, as torchvision's detectors number them: {name: number}."""
    from torchvision.models.detection import MaskRCNN_ResNet50_FPN_V2_Weights
    names = MaskRCNN_ResNet50_FPN_V2_Weights.COCO_V1.meta["categories"]
    return {name: number for number, name in enumerate(names) if name not in ("__background__", "N/A")}


def plural(name):
    return PLURALS.get(name) or name + ("es" if re.search(r"(s|sh|ch|x)$", name) else "s")


def a(name):
    return f"{'an' if name[0] in 'aeiou' else 'a'} {name}"


def compose(n, seed=0):
    """n different captions, equally often of each template: one object, two, counted, coloured, placed, coloured pair."""
    rng = random.Random(seed)
    objects = list(coco_objects())
    captions = {}                                # a dict keeps the order, and each caption once
    while len(captions) < n:
        one, two = rng.sample(objects, 2)
        shade, other = rng.sample(COLOURS, 2)
        templates = (a(one), f"{a(one)} and {a(two)}", f"{rng.choice(list(COUNTS))} {plural(one)}", a(f"{shade} {one}"),
                     f"{a(one)} {rng.choice(RELATIONS)} {a(two)}", f"{a(f'{shade} {one}')} and {a(f'{other} {two}')}")
        if n - len(captions) > 6 and len(captions) % 6 == 0:             # one of each, as long as there are new ones
            captions |= {f"a photo of {text}": None for text in templates}
        else:
            captions[f"a photo of {rng.choice(templates)}"] = None
    return list(captions)[:n]


@cache
def thing_pattern():
    """Matches one thing of a composition, as (count, colour, name)."""
    names = {name: name for name in coco_objects()} | ALIASES
    names |= {plural(name): coco for name, coco in names.items()}
    pattern = (rf"(?:an?|one|({'|'.join(COUNTS)})) (?:({'|'.join(COLOURS)}) )?"
               rf"({'|'.join(sorted(map(re.escape, names), key=len, reverse=True))})")
    return pattern, names


def requirements(caption):
    """What a compositional caption asks for, as in GenEval's metadata: a list of {"class", "count", "color",
    "position"}, where position is [relation, number of the thing it relates to].  "color" and "position"
    only stand where they are asked for.

    Raises ValueError for a caption that follows none of the templates."""
    thing, names = thing_pattern()
    text = clean(caption)
    match = re.fullmatch(rf"(?:a photo of )?{thing}(?: (and|{'|'.join(RELATIONS)}) {thing})?", text)
    if match is None:
        raise ValueError(f"cannot read {caption!r} as a composition: write for instance 'a photo of two dogs' or "
                         "'a photo of a red bus left of a bench', with objects of COCO")
    count, colour, name, relation, *second = match.groups()
    things = [(count, colour, name)] + ([tuple(second)] if relation else [])
    wanted = [{"class": names[name], "count": COUNTS.get(count, 1)} | ({"color": colour} if colour else {})
              for count, colour, name in things]
    if relation in RELATIONS:                    # "A left of B": A's place is checked against B's
        wanted.reverse()
        wanted[1]["position"] = [relation, 0]
    return wanted


# ---------------------------------------------------------------------------------------------
# Encoding
# ---------------------------------------------------------------------------------------------

class PaddedFeatures:
    """Features of M captions, stored without padding; index it with (P,) to get (P, T, dim), padded on the left.

    At 120 positions of 2048 numbers, ten thousand padded captions would fill ten gigabytes."""

    def __init__(self, features, length):
        self.features, self.length = features, length                # M tensors (words, dim), and T

    def __getitem__(self, index):
        return torch.stack([torch.nn.functional.pad(self.features[i], (0, 0, self.length - len(self.features[i]), 0))
                            for i in index.tolist()])


class T5Captions:
    """Flan-T5's encoder: call it with captions to get Prompts.  Every distinct caption is encoded once.

    bfloat16 on a GPU, as for LlamaGen's training.  Raises FileNotFoundError where the model cannot be had."""

    def __init__(self, spec="google/flan-t5-xl", device=torch.device("cpu"), length=120, batch=32):
        from transformers import AutoTokenizer, T5EncoderModel

        from pretrained import fetch
        folder = fetch(spec, "pass a local folder with --t5 PATH", ["*.safetensors", "*.json", "*.model"])
        self.tokenizer = AutoTokenizer.from_pretrained(folder)
        dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
        self.model = T5EncoderModel.from_pretrained(folder, dtype=dtype).to(device).eval().requires_grad_(False)
        self.length, self.batch, self.features = length, batch, {}       # features: caption -> (words, 2048)

    @torch.no_grad()
    def __call__(self, captions):
        """Prompts whose conditions are T5's features of the captions.

        Captions of more than `length` tokens, T5's end mark included, lose their end; one warning counts them."""
        new = [caption for caption in dict.fromkeys(captions) if caption not in self.features]
        long = sum(len(self.tokenizer(caption).input_ids) > self.length for caption in new)
        if long:
            warnings.warn(f"{long} of {len(new)} captions are longer than {self.length} tokens and lose their end")
        for start in tqdm(range(0, len(new), self.batch), desc="T5", unit="batch"):
            chunk = new[start:start + self.batch]
            tokens = self.tokenizer(chunk, max_length=self.length, truncation=True, padding=True,
                                    return_tensors="pt").to(self.model.device)
            states = self.model(input_ids=tokens.input_ids, attention_mask=tokens.attention_mask).last_hidden_state.cpu()
            for caption, state, real in zip(chunk, states, tokens.attention_mask.bool().cpu()):
                self.features[caption] = state[real]                     # T5's own padding, on whichever side, is gone
        chosen = [self.features[caption] for caption in captions]
        lengths = torch.tensor([len(features) for features in chosen])
        mask = torch.arange(self.length) >= self.length - lengths[:, None]           # (M, T), True at the last positions
        return argrpo.Prompts(list(captions), PaddedFeatures(chosen, self.length), mask)
