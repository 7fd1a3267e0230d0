"""The published models: where they are, what they look like, and how to get them.

A checkpoint is named by a local file or folder, by a Hugging Face repository, or by `repo:file`:

    c2i_B_256.pt    CSshihao/AR-GRPO_C2I_B_256    FoundationVision/LlamaGen:c2i_B_256.pt

Downloading and caching is `huggingface_hub`'s job; loading is `argrpo.load_weights`'s, and strict.
"""

import re
from pathlib import Path
from typing import NamedTuple

import torch

from argrpo import GPT_SIZES, GPTConfig, Transformer, load_weights, read_weights, rope_table
from vqgan import VQConfig, VQModel

C2I, T2I = "FoundationVision/LlamaGen", "peizesun/llamagen_t2i"
VQ_C2I, VQ_T2I = f"{C2I}:vq_ds16_c2i.pt", f"{T2I}:vq_ds16_t2i.pt"
GPT_HINT, VQ_HINT = (f"pass a local file or folder with --{kind}-ckpt PATH" for kind in ("gpt", "vq"))


class Published(NamedTuple):
    size: str                # key of GPT_SIZES
    pixels: int              # side of its images
    task: str                # "c2i" or "t2i"
    weights: str             # where they are
    tokenizer: str           # where its VQ-16's weights are (a VQ-8 is published, too: vq_ds8_c2i.pt)


MODELS = {
    "B-256": Published("GPT-B", 256, "c2i", f"{C2I}:c2i_B_256.pt", VQ_C2I),
    "L-256": Published("GPT-L", 256, "c2i", f"{C2I}:c2i_L_256.pt", VQ_C2I),
    "B-384": Published("GPT-B", 384, "c2i", f"{C2I}:c2i_B_384.pt", VQ_C2I),
    "L-384": Published("GPT-L", 384, "c2i", f"{C2I}:c2i_L_384.pt", VQ_C2I),
    "XL-384": Published("GPT-XL", 384, "c2i", f"{C2I}:c2i_XL_384.pt", VQ_C2I),
    "XXL-384": Published("GPT-XXL", 384, "c2i", f"{C2I}:c2i_XXL_384.pt", VQ_C2I),
    "3B-384": Published("GPT-3B", 384, "c2i", f"{C2I}:c2i_3B_384.pt", VQ_C2I),
    "t2i-XL-256": Published("GPT-XL", 256, "t2i", f"{T2I}:t2i_XL_stage1_256.pt", VQ_T2I),
    "t2i-XL-512": Published("GPT-XL", 512, "t2i", f"{T2I}:t2i_XL_stage2_512.pt", VQ_T2I),
}


FOLDER = ["*.safetensors", "pytorch_model*.bin", "*.json", "*.txt", "*.jinja", "*.model"]        # what a model's folder may need


def fetch(spec, hint, patterns=FOLDER):
    """The local path of a checkpoint, downloaded if need be: a file, or a folder with the files of these patterns.

    Raises FileNotFoundError, within seconds, that says what was looked for and where, and ends with the hint."""
    if Path(spec).exists():
        return Path(spec)
    repo, _, name = str(spec).partition(":")
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", repo):
        raise FileNotFoundError(f"{spec}: no such file or folder in {Path.cwd()}, nor a Hugging Face repo or repo:file; "
                                f"{hint}")
    from huggingface_hub import snapshot_download
    try:                     # unlike hf_hub_download, this does not retry for half a minute without a network
        folder = Path(snapshot_download(repo, allow_patterns=name or patterns))
    except Exception as error:                   # the hub's errors have many types and one meaning
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise FileNotFoundError(f"cannot get {name or 'the model'} from https://huggingface.co/{repo} ({reason}), "
                                f"and there is no local {spec} in {Path.cwd()}; {hint}") from error
    if not (folder / name).exists():
        raise FileNotFoundError(f"there is no {name} in https://huggingface.co/{repo} or its local copy {folder}; {hint}")
    return folder / name


def without_memory(make):
    """make() on the meta device: a module with names and shapes, but no numbers."""
    with torch.device("meta"):
        return make()


def gpt_config(preset, patch=16):
    """The GPTConfig of a published model: one token per patch x patch pixels, 16 for VQ-16 and 8 for VQ-8."""
    model = MODELS[preset]
    t2i = dict(model_type="t2i", cls_token_num=120) if model.task == "t2i" else {}
    return GPTConfig(**GPT_SIZES[model.size], block_size=(model.pixels // patch) ** 2, **t2i)


def presets_that_fit(path):
    """Names of the published models whose parameters have just the names and shapes of this checkpoint."""
    shapes = {name: w.shape for name, w in read_weights(path, "gpt_model.").items()}
    return [preset for preset in MODELS if shapes == {
        name: w.shape for name, w in without_memory(lambda: Transformer(gpt_config(preset))).state_dict().items()}]


def load_gpt(preset, spec="", patch=16):
    """The transformer of a preset, in float32 on the CPU, with its published weights or those at `spec`.

    Raises ValueError, naming the preset that would fit, if the checkpoint is another model's."""
    path, config = fetch(spec or MODELS[preset].weights, GPT_HINT), gpt_config(preset, patch)
    model = without_memory(lambda: Transformer(config)).to_empty(device="cpu")     # every weight comes from the file,
    model.rope.copy_(rope_table(config))                                           # and only this table does not
    try:
        return load_weights(model, path)
    except ValueError as error:
        fitting = presets_that_fit(path)
        raise ValueError(f"{error}; it fits --preset {' or '.join(fitting)}" if fitting else str(error)) from None


VQ_CONFIGS = {"VQ-16": VQConfig(), "VQ-8": VQConfig(ch_mult=(1, 2, 2, 4))}


def load_vq(preset, spec=""):
    """The tokenizer of a preset, frozen, with its published weights or those at `spec`, which may also be a VQ-8's."""
    path = fetch(spec or MODELS[preset].tokenizer, VQ_HINT)
    levels = {name.split(".")[2] for name in read_weights(path, "vq_model.") if name.startswith("encoder.conv_blocks.")}
    config = VQ_CONFIGS["VQ-8" if len(levels) == 4 else "VQ-16"]
    return load_weights(without_memory(lambda: VQModel(config)).to_empty(device="cpu"), path).requires_grad_(False)


def load(preset, gpt_spec="", vq_spec=""):
    """Transformer and tokenizer of a preset, on the CPU.  The tokenizer says how many tokens an image has: with a
    VQ-8 at `vq_spec` they are four times as many, for a transformer of your own that was trained on it."""
    if gpt_spec:
        fetch(gpt_spec, GPT_HINT)                # a wrong name is found before anything is downloaded or read
    vq = load_vq(preset, vq_spec)
    patch = vq.downsample_factor
    if patch != 16 and not gpt_spec:
        raise ValueError(f"{vq_spec} has one token per {patch} x {patch} pixels, but LlamaGen's transformers were trained on "
                         "VQ-16: name a transformer that was trained on this tokenizer with --gpt-ckpt")
    return load_gpt(preset, gpt_spec, patch), vq


def imagenet_classes():
    """The names of ImageNet's 1000 classes, in LlamaGen's order, which is ImageNet's."""
    from open_clip import IMAGENET_CLASSNAMES
    return list(IMAGENET_CLASSNAMES)
