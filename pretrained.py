"""The published models: where they are, what they look like, and how to get them.

A checkpoint is named by a local file or folder, by a Hugging Face repository, or by `repo:file`:

    c2i_B_256.pt    CSshihao/AR-GRPO_C2I_B_256    FoundationVision/LlamaGen:c2i_B_256.pt

Downloading and caching is `huggingface_hub`'s job.  Loading is `load_weights`'s: every format that
LlamaGen and AR-GRPO have published, strictly, and without running code from the file.
"""

import os
import re
from pathlib import Path
from typing import NamedTuple

import torch

from argrpo import GPT_SIZES, GPTConfig, Transformer, rope_table
from vqgan import VQConfig, VQModel

C2I, T2I = "FoundationVision/LlamaGen", "peizesun/llamagen_t2i"
VQ_C2I, VQ_T2I = f"{C2I}:vq_ds16_c2i.pt", f"{T2I}:vq_ds16_t2i.pt"
GPT_HINT = "pass a local file or folder with --gpt-ckpt PATH"
VQ_HINT = "pass a local file or folder with --vq-ckpt PATH"


class Published(NamedTuple):
    size: str                # key of GPT_SIZES
    pixels: int              # side of its images
    task: str                # "c2i" or "t2i"
    weights: str             # where they are
    tokenizer: str           # where its VQ-16 is; a VQ-8 is published, too: vq_ds8_c2i.pt


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


# ----- Reading checkpoints -----------------------------------------------------------------------

# Where a file holds the trained weights: DDP; DeepSpeed; Lightning; by habit.  FSDP has none of
# these.  As LlamaGen does, "model" is taken of a file that has an "ema", too.
KEYS = ("model", "module", "state_dict", "model_state_dict")
BESIDE = ("freqs_cis", "n_averaged")             # tensors that are no weights
# What a model's folder holds, the first that is there: Hugging Face's, or a run's.
FOLDER_FILES = (r"[^.].*\.safetensors", r"pytorch_model.*\.bin", r"model\.pt")


class Ignored:
    """Stands for plain data beside the weights, of which nothing is asked."""

    def __init__(self, *data):
        pass

    __setstate__ = __init__


# Plain data that torch does not know, by module and names: options, paths of any system, times.
PATHS = "PosixPath WindowsPath PurePosixPath PureWindowsPath"
PLAIN = [type(name, (Ignored,), {"__module__": module}) for module, names in {
    "argparse": "Namespace", "types": "SimpleNamespace", "pathlib": PATHS, "pathlib._local": PATHS,
    "datetime": "datetime date timedelta", "numpy": "dtype", "numpy.core.multiarray": "scalar",
    "numpy._core.multiarray": "scalar",
}.items() for name in names.split()]


def count(named):
    return sum(isinstance(value, torch.Tensor) for value in named.values())


def weights_in(state):
    """The weights by name in a checkpoint's dicts: those under KEYS, else the most."""
    inner = {key: weights_in(value) for key, value in state.items() if isinstance(value, dict)}
    for key in KEYS:
        if count(inner.get(key, {})):
            return inner[key]
    return max([state, *inner.values()], key=count)


def read_file(path):
    """What one checkpoint file holds by name, a safetensors file whatever its name is.

    Only tensors and plain data are unpickled: a file that asks for more could run code, and is
    refused with a ValueError."""
    from safetensors.torch import load_file
    try:
        with open(path, "rb") as file:
            if file.read(9)[8:] == b"{":         # the header's length, and the header: JSON
                return load_file(path)
        with torch.serialization.safe_globals(PLAIN):
            state = torch.load(path, map_location="cpu", weights_only=True)
    except (FileNotFoundError, PermissionError):
        raise
    except Exception as error:       # of many types; torch's own text advises to trust the file
        asked = re.search(r"GLOBAL ([\w.]+)", str(error))
        reason = f"it asks for {asked[1]}" if asked else type(error).__name__
        raise ValueError(f"{path} is damaged, or holds more than tensors and plain data, which "
                         f"could run code ({reason})") from error
    weights = weights_in(state) if isinstance(state, dict) else {}
    if not weights or not all(isinstance(name, str) for name in weights):
        raise ValueError(f"{path} holds no weights by name")
    return weights


def read_weights(path, part=""):
    """All tensors by name of a checkpoint: a .pt, .pth, .bin or .safetensors file, a Hugging Face
    folder, in one file or in shards, or a run's folder.

    Where names hold the part, only those count: AR-GRPO's folders hold the transformer as
    gpt_model. and the tokenizer as vq_model."""
    path = Path(path)
    files = [path]
    if path.is_dir():
        names = sorted(file.name for file in path.iterdir())
        found = [[path / name for name in names if re.fullmatch(pattern, name, re.IGNORECASE)]
                 for pattern in FOLDER_FILES]
        files = next(filter(None, found), [])
    if not files:
        raise FileNotFoundError("no *.safetensors, pytorch_model*.bin or model.pt in the folder "
                                f"{path}")
    weights = {name: tensor for file in files for name, tensor in read_file(file).items()
               if isinstance(tensor, torch.Tensor) and name.split(".")[-1] not in BESIDE}
    return {name: weights[name] for name in weights if part in name} or weights


def named_as(wanted, weights):
    """The weights without the prefix that all their names share, such as module._orig_mod., or the
    part of it that leaves the most of the wanted names."""
    shared = os.path.commonprefix(list(weights))
    starts = [0] + [dot.end() for dot in re.finditer(r"\.", shared)]
    return max(({name[start:]: tensor for name, tensor in weights.items()} for start in starts),
               key=lambda named: len(named.keys() & wanted.keys()))


def first_few(problems):
    more = f" and {len(problems) - 4} more" if len(problems) > 4 else ""
    return "; ".join(problems[:4]) + more


def not_finite(named):
    """The names, of pairs (name, tensor), whose tensors hold NaN or infinite numbers."""
    return [name for name, w in named if not torch.stack(w.aminmax()).isfinite().all()]


def load_weights(module, path):
    """Fills a Transformer or a VQModel from any LlamaGen or AR-GRPO checkpoint, and returns it.

    Half-precision weights are widened to the module's own type.  Strict: raises ValueError naming
    the first few parameters that are missing, unexpected, of another shape or not finite."""
    part = "gpt_model." if isinstance(module, Transformer) else "vq_model."
    wanted = module.state_dict()
    weights = named_as(wanted, read_weights(path, part))
    missing = [f"{name} is missing" for name in wanted if name not in weights]
    unexpected = [f"{name} is unexpected" for name in weights if name not in wanted]
    shapes = {name: (tuple(weights[name].shape), tuple(wanted[name].shape))
              for name in wanted if name in weights}
    misshapen = [f"{name} has shape {given}, not {right}"
                 for name, (given, right) in shapes.items() if given != right]
    problems = "; ".join(map(first_few, filter(None, (missing, unexpected, misshapen))))
    if problems:
        raise ValueError(f"{path} does not fit this {type(module).__name__}: {problems}")
    ill = not_finite((name, weights[name].to(w.dtype)) for name, w in wanted.items())
    if ill:
        raise ValueError(f"{path} holds NaN or infinite numbers in {first_few(ill)}: take an "
                         "earlier checkpoint, from before that run diverged")
    module.load_state_dict(weights)
    return module


# ----- Finding and downloading them --------------------------------------------------------------

# What a model's folder may need.
FOLDER = ["*.safetensors", "pytorch_model*.bin", "*.json", "*.txt", "*.jinja", "*.model"]


def fetch(spec, hint, patterns=FOLDER):
    """The local path of a checkpoint, downloaded if need be: a file, or a folder with the files of
    these patterns.

    Raises FileNotFoundError, within seconds, that says what was looked for and where, and ends with
    the hint."""
    if Path(spec).exists():
        return Path(spec)
    repo, _, name = str(spec).partition(":")
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", repo):
        raise FileNotFoundError(f"{spec}: no such file or folder in {Path.cwd()}, nor a Hugging "
                                f"Face repo or repo:file; {hint}")
    from huggingface_hub import snapshot_download
    try:             # unlike hf_hub_download, this fails at once without a network
        path = Path(snapshot_download(repo, allow_patterns=name or patterns)) / name
        path.stat()                              # a pattern that fits no file is no error there
    except Exception as error:                   # the hub's errors have many types and one meaning
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        what = name or "the model"
        raise FileNotFoundError(f"cannot get {what} from https://huggingface.co/{repo} ({reason}), "
                                f"and there is no local {spec} in {Path.cwd()}; {hint}") from error
    return path


def unfilled(kind, config):
    """A Transformer or a VQModel on the CPU, whose weights are still to be read."""
    with torch.device("meta"):                   # draws no numbers
        return kind(config).to_empty(device="cpu")


def gpt_config(preset, patch=16):
    """The GPTConfig of a published model.  patch is 16 for a VQ-16 and 8 for a VQ-8."""
    model = MODELS[preset]
    t2i = dict(model_type="t2i", cls_token_num=120) if model.task == "t2i" else {}
    return GPTConfig(**GPT_SIZES[model.size], block_size=(model.pixels // patch) ** 2, **t2i)


def load_gpt(preset, spec="", patch=16):
    """The transformer of a preset, in float32 on the CPU, with its own weights or those at `spec`.
    """
    path, config = fetch(spec or MODELS[preset].weights, GPT_HINT), gpt_config(preset, patch)
    model = unfilled(Transformer, config)
    model.rope.copy_(rope_table(config))         # not in the file
    return load_weights(model, path)


VQ_CONFIGS = {"VQ-16": VQConfig(), "VQ-8": VQConfig(ch_mult=(1, 2, 2, 4))}


def load_vq(preset, spec=""):
    """The tokenizer of a preset, frozen, with its weights or those at `spec`, maybe a VQ-8's."""
    path = fetch(spec or MODELS[preset].tokenizer, VQ_HINT)
    names = " ".join(read_weights(path, "vq_model."))
    levels = set(re.findall(r"encoder\.conv_blocks\.(\d+)", names))
    config = VQ_CONFIGS["VQ-8" if len(levels) == 4 else "VQ-16"]
    vq = unfilled(VQModel, config)
    return load_weights(vq, path).requires_grad_(False)


def load(preset, gpt_spec="", vq_spec=""):
    """Transformer and tokenizer of a preset, on the CPU.

    The tokenizer says how many tokens an image has: with a VQ-8 at `vq_spec` they are four times as
    many, for a transformer of your own that was trained on it."""
    if gpt_spec:
        fetch(gpt_spec, GPT_HINT)        # a wrong name is found before anything else is downloaded
    vq = load_vq(preset, vq_spec)
    patch = vq.downsample_factor
    if patch != 16 and not gpt_spec:
        raise ValueError(f"{vq_spec} has one token per {patch} x {patch} pixels, but LlamaGen's "
                         "transformers were trained on VQ-16: name one that was trained on this "
                         "tokenizer with --gpt-ckpt")
    return load_gpt(preset, gpt_spec, patch), vq


def imagenet_classes():
    """The names of ImageNet's 1000 classes, in LlamaGen's order, which is ImageNet's."""
    from open_clip import IMAGENET_CLASSNAMES
    return list(IMAGENET_CLASSNAMES)
