"""The toy's models, LlamaGen's classes at small size, and the features of its captions."""

import json
from dataclasses import replace
from pathlib import Path

import torch

from argrpo import GPTConfig, Prompts, Transformer
from pretrained import load_weights
from toy.scenes import CLASSES, COUNTS, PALETTE, PLACES, SHAPES, parse
from toy.verifier import mean_if_any
from vqgan import VQConfig, VQModel

FOLDER = Path(__file__).parent / "weights"       # the shipped checkpoints

# ---------------------------------------------------------------------------------------------
# Captions as features: what Flan-T5 does for LlamaGen
# ---------------------------------------------------------------------------------------------

WORDS = ["a", *COUNTS, *PALETTE, *SHAPES, *(shape + "s" for shape in SHAPES),
         "above", "below", "left", "right", "of"]
CAPTION_LENGTH = 8
CONTEXTS = (None, *PLACES)
CAPTION_DIM = len(CONTEXTS) * CAPTION_LENGTH * len(WORDS)


def encode_captions(captions):
    """Features (B, 8, CAPTION_DIM) and mask (B, 8) of captions, padded on the left as LlamaGen's.

    A word's feature is one-hot in three things together: the word, its position, and the
    caption's relation.  The position is in it because the transformer cannot tell: without
    rotation, all condition tokens are alike to its attention.  The relation is in it because T5,
    too, gives words in their context: the "red" of what stands above is not the "red" of what
    stands below."""
    features = torch.zeros(len(captions), CAPTION_LENGTH, CAPTION_DIM)
    for b, caption in enumerate(captions):
        context = CONTEXTS.index(parse(caption).relation)
        words = caption.split()
        for position, word in enumerate(words):
            block = context * CAPTION_LENGTH + position
            from_the_end = position - len(words)
            features[b, from_the_end, block * len(WORDS) + WORDS.index(word)] = 1
    return features, features.any(dim=2)


def as_prompts(task, texts):
    """The texts with the conditions that the task's transformer reads."""
    if task == "t2i":
        return Prompts(texts, *encode_captions(texts))
    return Prompts(texts, torch.tensor([CLASSES.index(text) for text in texts]))


# ---------------------------------------------------------------------------------------------
# The models
# ---------------------------------------------------------------------------------------------

VQ_CONFIG = VQConfig(ch=16, ch_mult=(1, 2, 2), z_channels=32, codebook_size=128,
                     codebook_embed_dim=8)
GPT_CONFIG = GPTConfig(dim=128, n_layer=3, n_head=4, vocab_size=128, block_size=36, multiple_of=8)
CONFIGS = {
    "c2i": replace(GPT_CONFIG, num_classes=len(CLASSES)),
    "t2i": replace(GPT_CONFIG, model_type="t2i", cls_token_num=CAPTION_LENGTH,
                   caption_dim=CAPTION_DIM),
}


def shipped_spread(task, texts):
    """The spread of the shipped model's right pictures, {part: mean over the texts}, as
    `verifier.spread` gives it, but from 128 pictures of each text: `tests/toy/measure_spread.py`
    measured it once.  None if one of the texts is not among those measured."""
    known = json.loads((FOLDER / "spread.json").read_text("utf-8"))[task]
    if not set(texts) <= set(known["texts"]):
        return None
    return {part: mean_if_any([values[text] for text in texts if text in values])
            for part, values in known["parts"].items()}


def load(task, folder=FOLDER, gpt_path="", vq_path=""):
    """The pretrained toy, (Transformer, VQModel), for the task "c2i" or "t2i".

    The paths name files of your own."""
    gpt = load_weights(Transformer(CONFIGS[task]), gpt_path or Path(folder) / f"toy_{task}.pt")
    vq = load_weights(VQModel(VQ_CONFIG), vq_path or Path(folder) / "toy_vq.pt")
    return gpt, vq.requires_grad_(False)
