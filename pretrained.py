"""The published models: where they are, what they look like, and how to get them.

    fetch("c2i_B_256.pt")                                a local file or folder
    fetch("CSshihao/AR-GRPO_C2I_B_256")                  a whole repository on Hugging Face
    fetch("FoundationVision/LlamaGen:c2i_B_256.pt")      one file of it

Downloading and caching is `huggingface_hub`'s job.  Loading is `argrpo.load_weights`, strictly.
"""

import json
from pathlib import Path

import torch

from argrpo import GPT_SIZES, GPTConfig, Transformer, load_weights, read_weights
from vqgan import VQConfig, VQModel

C2I, T2I = "FoundationVision/LlamaGen", "peizesun/llamagen_t2i"

TOKENIZERS = {                                   # name -> (configuration, where its weights are)
    "VQ-16": (VQConfig(), f"{C2I}:vq_ds16_c2i.pt"),
    "VQ-8": (VQConfig(ch_mult=(1, 2, 2, 4)), f"{C2I}:vq_ds8_c2i.pt"),
    "VQ-16-t2i": (VQConfig(), f"{T2I}:vq_ds16_t2i.pt"),
}
MODELS = {                                       # preset -> (size, pixels, task, where its weights are)
    "B-256": ("GPT-B", 256, "c2i", f"{C2I}:c2i_B_256.pt"),
    "L-256": ("GPT-L", 256, "c2i", f"{C2I}:c2i_L_256.pt"),
    "B-384": ("GPT-B", 384, "c2i", f"{C2I}:c2i_B_384.pt"),
    "L-384": ("GPT-L", 384, "c2i", f"{C2I}:c2i_L_384.pt"),
    "XL-384": ("GPT-XL", 384, "c2i", f"{C2I}:c2i_XL_384.pt"),
    "XXL-384": ("GPT-XXL", 384, "c2i", f"{C2I}:c2i_XXL_384.pt"),
    "3B-384": ("GPT-3B", 384, "c2i", f"{C2I}:c2i_3B_384.pt"),
    "t2i-XL-256": ("GPT-XL", 256, "t2i", f"{T2I}:t2i_XL_stage1_256.pt"),
    "t2i-XL-512": ("GPT-XL", 512, "t2i", f"{T2I}:t2i_XL_stage2_512.pt"),
}
