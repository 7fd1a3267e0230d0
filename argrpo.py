"""AR-GRPO in one file: reinforcement learning of autoregressive image generators.

A Llama-style transformer writes a picture as a row of N tokens, one after another, and a VQ
tokenizer (`vqgan.py`) paints the tokens.  AR-GRPO (arXiv 2508.06924) makes a pretrained one,
LlamaGen, better at whatever a reward function measures.  One step of it:

    1. take P prompts (class labels or captions);
    2. for each draw a group of G pictures, token by token, from the policy pi_theta;
    3. paint them and score each one: rewards r_1 .. r_G per group;
    4. advantage of picture i: how much better it did than its own group,
           A_i = (r_i - mean(r)) / (std(r) + eps);
    5. move pi_theta so that pictures with A > 0 become likelier, and the others less likely:
           L = - mean_{i,t} [ min( rho A_i, clip(rho, 1 - c, 1 + c) A_i ) - beta KL_{i,t} ],
           rho_{i,t} = pi_theta(x_{i,t} | x_{i,<t}) / pi_old(x_{i,t} | x_{i,<t}),
       where KL keeps pi_theta close to the pretrained pi_ref.  Take one AdamW step.  Repeat.

Notation, here and at the end of the lines: P prompts, G samples each, B = P * G images, b of them in
a micro-batch, N tokens per image, V codes, T condition positions in front of the image, L positions
in a pass, R rows (twice the images with guidance), D channels, H heads; rho is the ratio, c is
clip_eps, beta is kl_beta.

Where this file departs from the paper's official code, and why:

 1. The policy that is trained is the policy that is sampled.  The official code draws pictures
    with classifier-free guidance but takes the log-probabilities without it, so it reinforces
    choices of another distribution.  Here both use the guided logits, `guide`.
    `GRPOConfig(logprob_cfg="none")` gives the official behaviour.
 2. A group whose rewards are all equal gets advantages of exactly zero, not amplified rounding.  A
    reward that fails to judge an image leaves it out of its group; officially it becomes a reward of 0.
 3. Weights are float32 masters, with bfloat16 autocast on a GPU.  The official t2i policy lives
    in bfloat16, where a learning rate of 1e-5 is below the rounding step of most weights.
 4. Captions are padded on the left, as LlamaGen was trained; the official code pads on the right.
 5. Cached decoding is a path of its own (`prefill`, `decode`), not a mode of `forward`.

Read on from top to bottom: nothing is used before it is defined.
"""

import argparse
import copy
import hashlib
import platform
import time
import warnings
from collections import OrderedDict
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from math import isfinite, isqrt
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F
from einops import rearrange
from torch.utils.checkpoint import checkpoint
from tqdm import tqdm


# =============================================================================================
# 1. The transformer.  LlamaGen's architecture, with the parameter names of its checkpoints.
# =============================================================================================

@dataclass
class GPTConfig:
    dim: int                       # D, width of the residual stream
    n_layer: int
    n_head: int                    # H, each of D / H channels
    vocab_size: int = 16384        # V, codes of the VQ tokenizer
    block_size: int = 256          # N, tokens per image: a square number, 16 x 16 here
    model_type: str = "c2i"        # condition: "c2i" class label, "t2i" caption features
    num_classes: int = 1000        # c2i
    cls_token_num: int = 1         # T: 1 for c2i, 120 for LlamaGen's t2i
    caption_dim: int = 2048        # t2i, width of the text encoder's features
    multiple_of: int = 256         # the feed-forward width is rounded up to a multiple of this
    rope_base: float = 10000
    norm_eps: float = 1e-5

    def __post_init__(self):
        if self.model_type not in ("c2i", "t2i"):
            raise ValueError(f"model_type must be 'c2i' or 't2i', not {self.model_type!r}")
        if self.dim % self.n_head or (self.dim // self.n_head) % 4:
            raise ValueError(f"dim / n_head must be a multiple of 4 (two rotary axes), not {self.dim} / {self.n_head}")
        if isqrt(self.block_size) ** 2 != self.block_size:
            raise ValueError(f"block_size must be a square number of tokens, not {self.block_size}")
        if self.model_type == "c2i" and self.cls_token_num != 1:
            raise ValueError(f"a class is one condition token: cls_token_num must be 1, not {self.cls_token_num}")


GPT_SIZES = {
    "GPT-B":   dict(n_layer=12, n_head=12, dim=768),     # 111M parameters
    "GPT-L":   dict(n_layer=24, n_head=16, dim=1024),    # 343M
    "GPT-XL":  dict(n_layer=36, n_head=20, dim=1280),    # 775M
    "GPT-XXL": dict(n_layer=48, n_head=24, dim=1536),    # 1.4B
    "GPT-3B":  dict(n_layer=24, n_head=32, dim=3200),    # 3.1B
}


class RMSNorm(nn.Module):
    def __init__(self, dim, eps):
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(dim))

    def forward(self, x):
        h = x.float()                                                # in half precision squares overflow or underflow
        h = h * torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + self.eps)
        return h.type_as(x) * self.weight


def rope_table(config):
    """Cosines and sines of the rotary embedding (RoFormer, arXiv 2104.09864), for a grid: (T + N, D/H/2, 2).

    Half of a head's channel pairs turn with the token's row, the other half with its column, each
    pair at its own speed.  At the condition positions LlamaGen leaves the table at *zero*, not at
    angle zero: queries and keys vanish there, so every query meets a condition key with logit 0.
    """
    side, half = isqrt(config.block_size), config.dim // config.n_head // 2
    speed = 1.0 / config.rope_base ** (torch.arange(0, half, 2).float() / half)    # (D/H/4,)
    angle = torch.outer(torch.arange(side).float(), speed)                         # (side, D/H/4)
    row = angle[:, None, :].expand(side, side, -1)
    column = angle[None, :, :].expand(side, side, -1)
    angle = torch.cat([row, column], dim=-1).flatten(0, 1)                         # (N, D/H/2)
    table = torch.stack([angle.cos(), angle.sin()], dim=-1)                        # (N, D/H/2, 2)
    return torch.cat([torch.zeros(config.cls_token_num, *table.shape[1:]), table])


def apply_rope(x, rope):
    """Turns neighbouring channel pairs of x (B, H, L, D/H) by the angles in rope (L, D/H/2, 2)."""
    cos, sin = rope.unbind(-1)                                       # (L, D/H/2)
    a, b = x.float().unflatten(-1, (-1, 2)).unbind(-1)               # (B, H, L, D/H/2)
    return torch.stack([a * cos - b * sin, a * sin + b * cos], dim=-1).flatten(-2).type_as(x)


class Attention(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.n_head = config.n_head
        self.wqkv = nn.Linear(config.dim, 3 * config.dim, bias=False)
        self.wo = nn.Linear(config.dim, config.dim, bias=False)

    def qkv(self, x, rope):
        q, k, v = rearrange(self.wqkv(x), "b l (three h d) -> three b h l d", three=3, h=self.n_head)
        return apply_rope(q, rope), apply_rope(k, rope), v           # (B, H, L, D/H) each

    def forward(self, x, rope, mask=None, kv=None):
        """All positions at once: x (B, L, D) -> (B, L, D).

        mask (B, 1, L, L) bool says who sees whom; without it everyone sees itself and the past.
        The list kv, where there is one, receives the keys and values."""
        q, k, v = self.qkv(x, rope)
        if kv is not None:
            kv += [k, v]
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None)
        return self.wo(rearrange(y, "b h l d -> b l (h d)"))

    def decode(self, x, rope, cache, position, mask=None):
        """One new position: x (B, 1, D) -> (B, 1, D).  Looks at the filled part of the cache only.

        mask (B, 1, 1, position + 1) bool hides padded captions."""
        q, k, v = self.qkv(x, rope)
        keys, values = cache
        keys[:, :, position:position + 1], values[:, :, position:position + 1] = k, v
        y = F.scaled_dot_product_attention(q, keys[:, :, :position + 1], values[:, :, :position + 1], attn_mask=mask)
        return self.wo(rearrange(y, "b h l d -> b l (h d)"))


class FeedForward(nn.Module):
    """SwiGLU (arXiv 2002.05202), two thirds as wide as usual because it has three matrices."""

    def __init__(self, config):
        super().__init__()
        width = -(-int(2 / 3 * 4 * config.dim) // config.multiple_of) * config.multiple_of   # rounded up
        self.w1 = nn.Linear(config.dim, width, bias=False)
        self.w3 = nn.Linear(config.dim, width, bias=False)
        self.w2 = nn.Linear(width, config.dim, bias=False)

    def forward(self, x):
        return self.w2(F.silu(self.w1(x)) * self.w3(x))


class Block(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.attention = Attention(config)
        self.feed_forward = FeedForward(config)
        self.attention_norm = RMSNorm(config.dim, config.norm_eps)
        self.ffn_norm = RMSNorm(config.dim, config.norm_eps)

    def forward(self, x, *args):
        x = x + self.attention(self.attention_norm(x), *args)
        return x + self.feed_forward(self.ffn_norm(x))

    def decode(self, x, *args):
        x = x + self.attention.decode(self.attention_norm(x), *args)
        return x + self.feed_forward(self.ffn_norm(x))


class LabelEmbedder(nn.Module):
    """A class label is one condition token.  The extra last row is "no class", for guidance."""

    def __init__(self, config):
        super().__init__()
        self.embedding_table = nn.Embedding(config.num_classes + 1, config.dim)

    def forward(self, labels):
        return self.embedding_table(labels)[:, None]                 # (B,) -> (B, 1, D)

    def null(self, labels):
        return torch.full_like(labels, self.embedding_table.num_embeddings - 1)


class CaptionEmbedder(nn.Module):
    """A caption is T condition tokens: text-encoder features, projected by a small MLP.

    "No caption" is a learned block of features in the caption's place, for guidance."""

    def __init__(self, config):
        super().__init__()
        self.uncond_embedding = nn.Parameter(torch.randn(config.cls_token_num, config.caption_dim)
                                             / config.caption_dim ** 0.5)
        self.cap_proj = nn.Sequential(OrderedDict(fc1=nn.Linear(config.caption_dim, config.dim, bias=False),
                                                  act=nn.GELU(approximate="tanh"),
                                                  fc2=nn.Linear(config.dim, config.dim, bias=False)))

    def forward(self, features):
        if features.shape[1:] != self.uncond_embedding.shape:
            raise ValueError(f"captions must be (B, {', '.join(map(str, self.uncond_embedding.shape))}), "
                             f"not {tuple(features.shape)}")
        h = self.cap_proj(features.type_as(self.uncond_embedding))   # (B, T, D)
        return h.type_as(self.uncond_embedding)                      # autocast would leave the residual stream in bfloat16

    def null(self, features):
        return self.uncond_embedding.to(features.dtype).expand_as(features)


class Transformer(nn.Module):
    """LlamaGen: p(x_1 .. x_N | condition), one code at a time, in rows from the top left."""

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.cls_embedding = (LabelEmbedder if config.model_type == "c2i" else CaptionEmbedder)(config)
        self.tok_embeddings = nn.Embedding(config.vocab_size, config.dim)
        self.layers = nn.ModuleList(Block(config) for _ in range(config.n_layer))
        self.norm = RMSNorm(config.dim, config.norm_eps)
        self.output = nn.Linear(config.dim, config.vocab_size, bias=False)
        self.register_buffer("rope", rope_table(config), persistent=False)
        self.checkpointing = False               # True saves memory: a backward pass computes the layers' insides again
        for module in self.modules():                                # at every width, each layer keeps its input's size
            if isinstance(module, (nn.Linear, nn.Embedding)):
                nn.init.normal_(module.weight, std=module.in_features ** -0.5 if isinstance(module, nn.Linear) else 1.0)
        nn.init.zeros_(self.output.weight)                           # an untrained model finds all codes equally likely

    def null_cond(self, cond):
        """The unconditional counterpart of cond, in its shape: the input of guidance's other branch."""
        return self.cls_embedding.null(cond)

    def prefix_mask(self, cond_mask, length):
        """Who sees whom when captions are padded: (B, 1, length, length) bool, or None when all is visible.

        Everyone sees the past but its padding; padding sees itself, so that no softmax is empty."""
        if cond_mask is None:
            return None
        visible = F.pad(cond_mask, (0, length - cond_mask.shape[1]), value=True)      # (B, length), as keys
        causal = torch.ones(length, length, dtype=torch.bool, device=cond_mask.device).tril()
        itself = torch.eye(length, dtype=torch.bool, device=cond_mask.device)
        return ((causal & visible[:, None, :]) | itself)[:, None]

    def forward(self, tokens, cond, cond_mask=None):
        """Teacher forcing: every position's prediction at once, given the true tokens before it.

        tokens (B, N) int64; cond (B,) int64 labels for c2i, (B, T, caption_dim) for t2i with
        cond_mask (B, T) bool, True at the words, captions padded on the left.
        Returns logits (B, N, V) float32; logits[:, i] predicts tokens[:, i].
        Raises ValueError if tokens are not N per row."""
        return self.output(self.hidden(tokens, cond, cond_mask)).float()

    def hidden(self, tokens, cond, cond_mask=None):
        """All of `forward` but its last layer: (B, N, D), of which `output` makes the logits."""
        if tokens.ndim != 2 or tokens.shape[1] != self.config.block_size:
            raise ValueError(f"tokens must be (B, {self.config.block_size}), not {tuple(tokens.shape)}")
        h = torch.cat([self.cls_embedding(cond), self.tok_embeddings(tokens[:, :-1])], dim=1)   # (B, T+N-1, D)
        rope, mask = self.rope[:h.shape[1]], self.prefix_mask(cond_mask, h.shape[1])
        for layer in self.layers:
            h = checkpoint(layer, h, rope, mask, use_reentrant=False) if self.checkpointing else layer(h, rope, mask)
        return self.norm(h[:, self.config.cls_token_num - 1:])       # the last condition token predicts the first code

    def prefill(self, cond, cond_mask=None, copies=1):
        """Reads each condition once, and makes room for `copies` images that share it.

        cond as in `forward`, R rows.  Returns the logits (R * copies, V) of the first code and a
        cache for `decode`: per layer [keys, values], each (R * copies, H, T + N - 1, D/H)."""
        h = self.cls_embedding(cond)                                 # (R, T, D)
        rope, mask = self.rope[:h.shape[1]], self.prefix_mask(cond_mask, h.shape[1])
        cache = []
        for layer in self.layers:
            kv = []
            h = layer(h, rope, mask, kv)
            cache.append([F.pad(x.repeat_interleave(copies, dim=0), (0, 0, 0, self.config.block_size - 1)) for x in kv])
        logits = self.output(self.norm(h[:, -1])).float()            # (R, V)
        return logits.repeat_interleave(copies, dim=0), cache

    def decode(self, token, i, cache, visible=None):
        """Feeds the i-th code of every row, token (R,) int64, and returns the logits (R, V) of the next.

        visible (R, 1, 1, T + N - 1) bool hides padded caption positions; None hides nothing."""
        position = self.config.cls_token_num + i
        h = self.tok_embeddings(token)[:, None]                      # (R, 1, D)
        rope = self.rope[position:position + 1]
        mask = None if visible is None else visible[..., :position + 1]
        for layer, kv in zip(self.layers, cache):
            h = layer.decode(h, rope, kv, position, mask)
        return self.output(self.norm(h[:, -1])).float()              # (R, V)


# =============================================================================================
# 2. Weights
# =============================================================================================

def read_file(path):
    """What one checkpoint file holds by name.  Only tensors and plain data are unpickled: a file that asks
    for more could run code, and is refused with a ValueError."""
    from safetensors.torch import load_file
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        with torch.serialization.safe_globals([argparse.Namespace]):         # LlamaGen stores its options
            state = torch.load(path, map_location="cpu", weights_only=True)
    except PermissionError:
        raise
    except Exception as error:               # many kinds, one meaning; torch's own text would advise to trust the file
        raise ValueError(f"{path} is damaged, or holds more than tensors and plain data, which could run code "
                         f"({type(error).__name__})") from error
    if not isinstance(state, dict) or not all(isinstance(name, str) for name in state):
        raise ValueError(f"{path} holds no weights by name")
    for key in ("model", "module", "state_dict"):                    # DDP; DeepSpeed; Lightning; FSDP has none
        if isinstance(state.get(key), dict):
            return state[key]
    return state


def read_weights(path, prefix=""):
    """All tensors by name of a checkpoint: a .pt, .pth, .bin or .safetensors file, or a Hugging Face folder,
    in one file or in shards.  Where names carry the prefix, as in AR-GRPO's folders, which hold the
    transformer as gpt_model. and the tokenizer as vq_model., only those count, without it."""
    path = Path(path)
    if not path.exists():
        raise FileNotFoundError(f"no such checkpoint: {path}")
    files = [path]
    if path.is_dir():
        files = sorted(path.glob("*.safetensors")) or sorted(path.glob("pytorch_model*.bin"))
        if not files:
            raise FileNotFoundError(f"no *.safetensors or pytorch_model*.bin in the folder {path}")
    weights = {name: tensor for file in files for name, tensor in read_file(file).items()}
    if any(name.startswith(prefix) for name in weights):
        weights = {name.removeprefix(prefix): tensor for name, tensor in weights.items() if name.startswith(prefix)}
    return {name: tensor for name, tensor in weights.items() if isinstance(tensor, torch.Tensor) and name != "freqs_cis"}


def load_weights(module, path):
    """Fills a Transformer or a VQModel from any LlamaGen or AR-GRPO checkpoint, and returns it.

    Half-precision weights are widened to the module's own type.  Strict: raises ValueError naming
    the first few parameters that are missing, unexpected or of another shape."""
    weights = read_weights(path, "gpt_model." if isinstance(module, Transformer) else "vq_model.")
    wanted = module.state_dict()
    problems = [f"{name} is missing" for name in wanted if name not in weights]
    problems += [f"{name} is unexpected" for name in weights if name not in wanted]
    problems += [f"{name} has shape {tuple(weights[name].shape)}, not {tuple(w.shape)}"
                 for name, w in wanted.items() if name in weights and weights[name].shape != w.shape]
    if problems:
        more = f" and {len(problems) - 4} more" if len(problems) > 4 else ""
        raise ValueError(f"{path} does not fit this {type(module).__name__}: {'; '.join(problems[:4])}{more}")
    module.load_state_dict(weights)
    return module


# =============================================================================================
# 3. The policy: what is drawn from, and what is trained
# =============================================================================================

def both_branches(model, cond, cond_mask, cfg_scale):
    """The conditions that guidance needs: cond itself and, below it, its unconditional counterpart.

    The null branch keeps the caption's mask, as LlamaGen's does.  Guidance of 1 needs no null branch."""
    if cfg_scale == 1:
        return cond, cond_mask
    return torch.cat([cond, model.null_cond(cond)]), None if cond_mask is None else cond_mask.repeat(2, 1)


def guide(logits, cfg_scale):
    """Classifier-free guidance (arXiv 2207.12598): (2 B, ..., V) of both branches -> (B, ..., V)."""
    if cfg_scale == 1:
        return logits
    cond, null = logits.chunk(2)
    return null + cfg_scale * (cond - null)


def filter_logits(logits, top_k=0, top_p=1.0):
    """Sets to -inf all but the top_k largest logits (0: all), then all outside the nucleus: the
    fewest codes that together have probability top_p (arXiv 1904.09751).  (..., V) -> (..., V)."""
    if top_k:
        kth = logits.topk(min(top_k, logits.shape[-1])).values[..., -1:]
        logits = logits.masked_fill(logits < kth, -torch.inf)
    if top_p < 1:
        ordered, order = logits.sort(dim=-1, descending=True)
        mass_before = F.pad(ordered.softmax(-1).cumsum(-1)[..., :-1], (1, 0))       # 0 for the first: it always stays
        outside = torch.zeros_like(logits, dtype=torch.bool).scatter(-1, order, mass_before > top_p)
        logits = logits.masked_fill(outside, -torch.inf)
    return logits


def draw(logp, generator=None):
    """One code per row from log-probabilities (R, V) -> (R,): the first at which the probabilities of it and all before
    it reach a random share of the whole.  A code of probability 0 is never that.

    One random number per row is less work than torch.multinomial's V, and no GPU is ever waited for."""
    mass = logp.double().exp().cumsum(-1)                                           # (R, V)
    share = 1 - torch.rand(len(logp), 1, generator=generator, device=logp.device, dtype=torch.double)    # in (0, 1]
    return torch.searchsorted(mass, share * mass[:, -1:])[:, 0].clamp(max=logp.shape[-1] - 1)            # the last, of NaNs


@contextmanager
def packed_weights(model, rows):
    """While this lasts, the model's large products read weights that oneDNN has put into the order of its reading.

    On an x86 CPU that makes them twice as fast, for as few rows as a decoding step has.  The sums are the same but for
    rounding.  Elsewhere, in a compiled model, and for weights that fit into a cache anyway, nothing changes."""
    packed = [module for module in model.modules() if isinstance(module, nn.Linear) and module.weight.numel() >= 2 ** 18
              and module.weight.device.type == "cpu" and module.weight.dtype == torch.float32]
    x86 = platform.machine() in ("x86_64", "AMD64") and torch.backends.mkldnn.is_available()
    if not x86 or torch.is_autocast_enabled("cpu") or "decode" in vars(model):
        packed = []
    try:
        for module in packed:
            weight = torch.ops.mkldnn._reorder_linear_weight(module.weight.detach(), rows)
            module.forward = lambda x, w=weight, b=module.bias: torch.ops.mkldnn._linear_pointwise(x, w, b, "none", [], "")
        yield
    finally:
        for module in packed:
            module.__dict__.pop("forward", None)


@torch.no_grad()
def generate(model, cond, cond_mask=None, *, samples_per_prompt=1, cfg_scale=1.0, temperature=1.0, top_k=0,
             top_p=1.0, greedy=False, generator=None):
    """Draws images, code by code, through a key-value cache: the rollout.

    cond and cond_mask are as in `Transformer.forward`, for P prompts.  Returns tokens (P*S, N)
    int64 and logp (P*S, N) float32, the log-probability with which each code was drawn, after
    guidance, temperature, top-k and top-p.  The S = samples_per_prompt samples of a prompt are
    neighbours and share its prefill.  greedy takes the likeliest code, and gives that code's logp.
    Raises ValueError for settings out of range."""
    if temperature <= 0 or not 0 < top_p <= 1 or top_k < 0 or samples_per_prompt < 1:
        raise ValueError("generate needs temperature > 0 (for the likeliest codes use greedy), 0 < top_p <= 1, top_k >= 0 "
                         f"and samples_per_prompt >= 1, not {temperature}, {top_p}, {top_k} and {samples_per_prompt}")
    N = model.config.block_size
    branches = 1 if cfg_scale == 1 else 2
    cond, cond_mask = both_branches(model, cond, cond_mask, cfg_scale)              # (R, ...), R = P or 2 P
    visible = None
    if cond_mask is not None:                                                       # once, not once a step
        visible = F.pad(cond_mask.repeat_interleave(samples_per_prompt, dim=0), (0, N - 1), value=True)[:, None, None]
    tokens, logps = [], []
    with packed_weights(model, len(cond) * samples_per_prompt):
        logits, cache = model.prefill(cond, cond_mask, copies=samples_per_prompt)   # (R S, V)
        for i in range(N):
            if i > 0:
                logits = model.decode(tokens[-1].repeat(branches), i - 1, cache, visible)
            logp = filter_logits(guide(logits, cfg_scale) / temperature, top_k, top_p).log_softmax(-1)  # (P S, V)
            tokens.append(logp.argmax(dim=-1) if greedy else draw(logp, generator))
            logps.append(logp.gather(-1, tokens[-1][:, None])[:, 0])
    return torch.stack(tokens, dim=1), torch.stack(logps, dim=1)


def policy_logits(model, tokens, cond, cond_mask=None, *, cfg_scale=1.0, temperature=1.0):
    """Logits (B, N, V) whose softmax is the distribution that `generate` draws from, top-k and top-p aside."""
    branches = 1 if cfg_scale == 1 else 2
    logits = model(tokens.repeat(branches, 1), *both_branches(model, cond, cond_mask, cfg_scale))
    return guide(logits, cfg_scale) / temperature


def logp_and_entropy(logits, tokens):
    """Log-probability of the given codes (B, N) and entropy, in nats, under softmax(logits (B, N, V)): (B, N) each."""
    logp = logits.log_softmax(-1)
    entropy = -(logp.exp() * logp).sum(-1)                                          # (B, N)
    return logp.gather(-1, tokens[..., None])[..., 0], entropy


CHUNK = 2 ** 23              # logits that are looked at in one go: 32 MB of them


def at_every_code(function, models, tokens, cond, cond_mask=None, *, cfg_scale=1.0, temperature=1.0):
    """What function(tokens (B, n), logits (B, n, V) of each model) -> tuple of (B, n) says of all codes: tuple of (B, N).

    The logits are `policy_logits`.  With 16384 codes they and their gradients would need more memory than the model:
    so the function sees CHUNK of them at a time, and the backward pass makes each chunk anew."""
    branches = 1 if cfg_scale == 1 else 2
    hidden = [model.hidden(tokens.repeat(branches, 1), *both_branches(model, cond, cond_mask, cfg_scale))
              for model in models]                                                  # (B or 2 B, N, D) each

    def look(tokens, *hidden):
        # Autocast's cache would make all chunks share one rounded weight, and add up its gradient in bfloat16.
        kind = "cuda" if tokens.is_cuda else "cpu"
        with torch.autocast(kind, torch.get_autocast_dtype(kind), torch.is_autocast_enabled(kind), cache_enabled=False):
            logits = [model.output(h).float() for model, h in zip(models, hidden)]
        return function(tokens, *(guide(each, cfg_scale) / temperature for each in logits))

    n = max(1, CHUNK // (branches * len(tokens) * models[0].config.vocab_size))     # positions in a chunk
    if n >= tokens.shape[1]:
        return look(tokens, *hidden)
    chunks = zip(*(x.split(n, dim=1) for x in (tokens, *hidden)))
    answers = [checkpoint(look, *chunk, use_reentrant=False) for chunk in chunks]
    return tuple(torch.cat(parts, dim=1) for parts in zip(*answers))


def token_logp(model, tokens, cond, cond_mask=None, *, cfg_scale=1.0, temperature=1.0):
    """Log-probability of every given code and entropy of every choice, in nats: (B, N) each, differentiable."""
    return at_every_code(lambda tokens, logits: logp_and_entropy(logits, tokens), [model], tokens, cond, cond_mask,
                         cfg_scale=cfg_scale, temperature=temperature)


# =============================================================================================
# 4. GRPO, as maths
# =============================================================================================

def group_statistics(rewards, group_size):
    """Mean, unbiased standard deviation and flatness of every group: rewards (P*G,) -> three (P, 1).

    A NaN is a reward that is missing, and does not count.  A group is flat if its known rewards are all
    equal, as are one or none.  Raises ValueError for groups of one, which have nothing to compare with,
    and for rewards that do not fill whole groups."""
    if group_size < 2 or rewards.ndim != 1 or len(rewards) % group_size:
        raise ValueError("rewards must be (P * G,) with group_size G >= 2, "
                         f"not {tuple(rewards.shape)} with group_size {group_size}")
    r = rearrange(rewards.float(), "(p g) -> p g", g=group_size)
    known = (~r.isnan()).sum(dim=1, keepdim=True)
    mean = r.nanmean(dim=1, keepdim=True)
    std = ((r - mean).square().nansum(dim=1, keepdim=True) / (known - 1).clamp(min=1)).sqrt()
    largest = r.nan_to_num(-torch.inf).amax(dim=1, keepdim=True)
    smallest = r.nan_to_num(torch.inf).amin(dim=1, keepdim=True)
    return mean, std, largest <= smallest


def group_advantages(rewards, group_size, eps=1e-4, scale=True):
    """How much better each sample did than its group: rewards (P*G,) -> advantages (P*G,).

    A = (r - mean) / (std + eps) with the unbiased std (DeepSeekMath, arXiv 2402.03300, section 4.1);
    scale=False leaves the division out (Dr. GRPO, arXiv 2503.20783).  A sample whose reward is missing
    (NaN) gets 0 and is left out of its group's mean and std.  Errors as in `group_statistics`."""
    mean, std, flat = group_statistics(rewards, group_size)
    r = rearrange(rewards.float(), "(p g) -> p g", g=group_size)
    advantages = (r - mean) / (std + eps) if scale else r - mean
    # Nothing is to be learned from a flat group, not even its rounding errors, nor from a missing reward.
    return rearrange(advantages.masked_fill(flat | r.isnan(), 0.0), "p g -> (p g)")


def are_verdicts(rewards):
    """Whether rewards say only right (1) or wrong (0), or nothing (NaN)."""
    return bool(((rewards == 0) | (rewards == 1) | rewards.isnan()).all())


def right_images(rewards, group_size):
    """Which images of a group are right: rewards (P*G,) -> (P, G) bool.

    Verdicts are right at 1.  Graded rewards are right above their group's median, or at its maximum where more than half
    of a group share that, but not all.  A missing reward (NaN) is never right."""
    r = rearrange(rewards.float(), "(p g) -> p g", g=group_size)
    if are_verdicts(rewards):
        return r == 1
    above = r > r.nanmedian(dim=1, keepdim=True).values
    best = (r == r.nan_to_num(-torch.inf).amax(dim=1, keepdim=True)) & ~group_statistics(rewards, group_size)[2]
    return torch.where(above.any(dim=1, keepdim=True), above, best)


def diversity_bonus(rewards, features, group_size, weight):
    """Reward for right images that differ from the other right ones of their group: (P*G,), (P*G, ...) -> (P*G,).

    bonus_i = weight * unit * (d_i / mean(d) - 1), where d_i is the mean L1 distance of image i's features
    to those of the group's other right images.  It sums to zero in every group: it moves reward among the
    right images, and never pays for a wrong one.  Fewer than three right images share nothing.
    The unit is 1 for verdicts, and the group's standard deviation for graded rewards (see `right_images`).  Where all of
    a group are right, the bonus is all that its advantages are made of, and dividing by their spread cancels the weight."""
    x = rearrange(features.float().flatten(1), "(p g) d -> p g d", g=group_size)
    right = right_images(rewards, group_size)                                       # (P, G)
    unit = 1.0 if are_verdicts(rewards) else group_statistics(rewards, group_size)[1]
    n = right.sum(dim=1, keepdim=True)                                              # (P, 1)
    distances = torch.cdist(x, x, p=1) * right[:, None, :]                          # (P, G, G), to right images only
    d = distances.sum(dim=2) / (n - 1).clamp(min=1)                                 # (P, G); to oneself it is 0
    d_mean = (d * right).sum(dim=1, keepdim=True) / n.clamp(min=1)
    bonus = weight * unit * (d / d_mean.clamp(min=1e-12) - 1)
    return rearrange(bonus.masked_fill(~right | (n < 3) | (d_mean == 0), 0.0), "p g -> (p g)")


def kl_k3(logp, ref_logp):
    """Estimate of KL(pi || pi_ref) from the sampled code alone, elementwise: unbiased and never
    negative (Schulman 2020, "Approximating KL divergence", estimator k3)."""
    d = ref_logp - logp
    return d.exp() - d - 1


def kl_exact(logits, ref_logits):
    """KL(pi || pi_ref) summed over the vocabulary: (..., V) -> (...), in nats."""
    logp, ref_logp = logits.log_softmax(-1), ref_logits.log_softmax(-1)
    return (logp.exp() * (logp - ref_logp)).sum(-1)


def grpo_loss(logp, old_logp, ref_logp, advantages, *, clip_eps=0.2, clip_eps_high=None, kl_beta=0.0, kl=None):
    """The loss of step 5 above: logp, old_logp, ref_logp (B, N), advantages (B,) -> (scalar, stats).

    ref_logp may be None when kl_beta is 0.  kl (B, N), such as `kl_exact`'s, takes the place of the k3
    estimate.  clip_eps_high widens the upper side alone (DAPO,
    arXiv 2503.14476).  Every image has exactly N tokens, so the mean over tokens, the mean of
    per-image means, and the sum over tokens divided by a constant length are all the same number."""
    if ref_logp is None and kl is None and kl_beta > 0:
        raise ValueError(f"a KL penalty (kl_beta {kl_beta}) needs the reference's log-probabilities")
    high = clip_eps if clip_eps_high is None else clip_eps_high
    A = advantages[:, None]                                          # one advantage for all N tokens of an image
    ratio = (logp - old_logp).exp()                                  # rho, (B, N)
    unclipped = ratio * A
    clipped = ratio.clamp(1 - clip_eps, 1 + high) * A
    loss = -torch.minimum(unclipped, clipped).mean()                 # the minimum: no gain from leaving the trust region
    stats = {
        "ratio": ratio.mean().item(),
        "ratio_max": ratio.max().item(),
        "clip_frac": (clipped < unclipped).float().mean().item(),    # tokens whose gradient the clip has cut off
    }
    if ref_logp is not None or kl is not None:
        kl = (kl_k3(logp, ref_logp) if kl is None else kl).mean()
        loss = loss + kl_beta * kl
        stats["kl"] = kl.item()
    return loss, stats | {"loss": loss.item()}


# =============================================================================================
# 5. The training loop
# =============================================================================================

@dataclass
class GRPOConfig:
    """Settings of the loop.  The defaults are the toy's; the presets of the scripts hold LlamaGen's."""
    steps: int = 180                     # rollouts, and with inner_epochs 1 also optimizer steps
    prompts_per_step: int = 8            # P, prompts per step
    group_size: int = 16                 # G, images per prompt: a larger group knows its own mean better
    micro_batch: int | None = 64         # images per pass of update and painting, None for all: never changes the result
    rollout_prompts: int = 0             # prompts per pass of the sampler, to save memory; 0 is all of them
    checkpointing: bool = False          # save memory: the backward pass computes the layers' insides again
    compile: bool = False                # torch.compile the sampler's decoding step: minutes at first, meant for GPUs
    inner_epochs: int = 1                # optimizer steps per rollout; above 1 the clip starts to matter
    lr: float = 8e-4                     # AdamW's learning rate after the warm-up
    warmup_steps: int = 5                # steps over which the learning rate rises linearly
    lr_end: float = 0.0                  # share of lr that is left at the end of its linear decay; 1 is no decay
    weight_decay: float = 0.0            # AdamW's weight decay
    max_grad_norm: float = 1.0           # the gradient is scaled down to this norm where it is longer
    clip_eps: float = 0.2                # the ratio's trust region is [1 - clip_eps, 1 + clip_eps]
    clip_eps_high: float | None = None   # if given, the trust region ends at 1 + clip_eps_high instead
    kl_beta: float = 0.01                # weight of the KL penalty to the pretrained model
    kl: str = "k3"                       # that penalty: "k3", estimated from the drawn code, or "exact", over all codes
    diversity_bonus: float = 0.0         # reward moved, among a group's right images, to those that differ from the others
    scale_advantages: bool = True        # divide advantages by the group's standard deviation
    cfg_scale: float = 1.0               # classifier-free guidance at rollout: 1 is none
    temperature: float = 1.0             # temperature at rollout
    logprob_cfg: str = "guided"          # log-probs "guided" like the rollout, or "none" as in the official code
    seed: int = 0                        # of prompts and rollouts

    def __post_init__(self):
        for name in ("steps", "prompts_per_step", "micro_batch", "inner_epochs", "warmup_steps"):
            if getattr(self, name) is not None and getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, not {getattr(self, name)}")
        if self.rollout_prompts < 0:
            raise ValueError(f"rollout_prompts must be at least 1, or 0 for all at once, not {self.rollout_prompts}")
        if self.group_size < 2:
            raise ValueError(f"group_size must be at least 2, for a group is compared with itself, not {self.group_size}")
        for name in ("lr", "lr_end", "weight_decay", "clip_eps", "clip_eps_high", "kl_beta", "diversity_bonus", "cfg_scale"):
            value = getattr(self, name)
            if value is not None and not 0 <= value < float("inf"):          # NaN fails this, too
                raise ValueError(f"{name} must be a finite number of at least 0, not {value}")
        for name in ("temperature", "max_grad_norm"):
            if not 0 < getattr(self, name) < float("inf"):
                raise ValueError(f"{name} must be a finite number above 0, not {getattr(self, name)}")
        if self.logprob_cfg not in ("guided", "none"):
            raise ValueError(f"logprob_cfg must be 'guided' or 'none', not {self.logprob_cfg!r}")
        if self.kl not in ("k3", "exact"):
            raise ValueError(f"kl must be 'k3' or 'exact', not {self.kl!r}")


@dataclass
class Prompts:
    """What to draw: the texts that rewards read, and the conditions that the transformer reads."""
    texts: list
    cond: torch.Tensor                         # (M,) int64 for c2i, (M, T, caption_dim) for t2i
    cond_mask: torch.Tensor | None = None      # (M, T) bool for t2i

    def pick(self, index, device):
        """Texts, conditions and mask of the prompts at index (P,)."""
        mask = None if self.cond_mask is None else self.cond_mask[index].to(device)
        return [self.texts[i] for i in index.tolist()], self.cond[index].to(device), mask


def rng_for(device, *key):
    """A random generator that depends on nothing but the key, such as (seed, "rollout", step).

    Every step has a stream of its own, so a resumed run has no random state to restore."""
    digest = hashlib.blake2b(repr(key).encode(), digest_size=7).digest()
    return torch.Generator(device).manual_seed(int.from_bytes(digest, "big"))


def pick_prompts(n, step, per_step, seed):
    """Which of n prompts a step uses, (per_step,): endless passes over all, each newly shuffled."""
    first = step * per_step
    passes = range(first // n, (first + per_step - 1) // n + 1)
    order = torch.cat([torch.randperm(n, generator=rng_for("cpu", seed, "prompts", p)) for p in passes])
    return order[first - passes[0] * n:][:per_step]


def autocast(device):
    """bfloat16 for the transformer's matrix products on a GPU, float32 elsewhere."""
    return torch.autocast("cuda", torch.bfloat16) if device.type == "cuda" else nullcontext()


def clock(device):
    """Seconds, after the GPU has done what it was asked to do."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


@torch.no_grad()
def paint(vq, tokens, micro_batch=16):
    """tokens (B, N) -> images (B, 3, H, W) in [0, 1], as rewards want them."""
    return torch.cat([(vq.decode(rows) + 1) / 2 for rows in tokens.split(micro_batch)]).clamp(0, 1)


def group_diversity(images, group_size):
    """Mean L1 distance per pixel and channel between two images of a group: (P*G, 3, H, W) -> (P,), in [0, 1]."""
    x = rearrange(images.float(), "(p g) c h w -> p g (c h w)", g=group_size)
    pairs = group_size * (group_size - 1)
    return torch.cdist(x, x, p=1).sum((1, 2)) / pairs / x.shape[-1]


def frozen_copy(model, dtype=None):
    """A copy for reading only: the reference pi_ref, and what draws the rollouts on a GPU.

    Its matrices are kept in dtype, by default bfloat16 on a GPU.  Autocast would round them to that for every product
    anyway: under it the copy computes the very same numbers, in half the memory."""
    frozen = copy.deepcopy(model).requires_grad_(False)
    dtype = dtype or (torch.bfloat16 if next(model.parameters()).is_cuda else torch.float32)
    for module in frozen.modules():
        if isinstance(module, nn.Linear):
            module.to(dtype)
    return frozen


@torch.no_grad()
def refresh(frozen, model):
    """Gives the copy the model's present weights."""
    for ours, theirs in zip(frozen.parameters(), model.parameters(), strict=True):
        ours.copy_(theirs)


def rank_and_size():
    """This process's number and how many there are: (0, 1) unless started by torchrun."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def average_over_processes(values, maximum=()):
    """Means over all processes of {name: number}, but the largest of the names in `maximum`."""
    if rank_and_size()[1] == 1:
        return values
    answers = [None] * dist.get_world_size()
    dist.all_gather_object(answers, values)
    return {name: max(a[name] for a in answers) if name in maximum else sum(a[name] for a in answers) / len(answers)
            for name in values}


def average_gradients(model):
    """Every process has looked at prompts of its own: the step follows the mean of their gradients."""
    size = rank_and_size()[1]
    for p in model.parameters() if size > 1 else ():
        if p.grad is not None:
            dist.all_reduce(p.grad)
            p.grad /= size


def name_prompts(texts):
    """The distinct texts, three at most, for an error message."""
    distinct = sorted(set(texts))
    return ", ".join(map(repr, distinct[:3])) + (", ..." if len(distinct) > 3 else "")


def mean_of(name, history):
    """The mean of a statistic over micro-batches, those that have it: history is a list of (number of images, statistics)."""
    known = [(images, stats[name]) for images, stats in history if name in stats]
    return sum(images * value for images, value in known) / sum(images for images, _ in known)


def check_finite(step, texts, **parts):
    """Raises FloatingPointError, with the step, the part and the prompts, if a part (b, ...) has a NaN or an infinity."""
    for name, values in parts.items():
        bad = (~torch.isfinite(values.detach()).view(len(texts), -1).all(dim=1)).nonzero()[:, 0].tolist()
        if bad:
            raise FloatingPointError(f"step {step}: {name.replace('_', ' ')} not finite for {len(bad)} of {len(texts)} "
                                     f"images, of the prompts {name_prompts(texts[i] for i in bad)}")


def make_optimizer(model, config):
    return torch.optim.AdamW(model.parameters(), lr=config.lr, betas=(0.9, 0.95), weight_decay=config.weight_decay)


def learning_rate(config, step):
    """A linear decay from lr to lr_end * lr over all steps, times a linear warm-up over the first few."""
    return config.lr * min(1.0, (step + 1) / config.warmup_steps) * (1 - (1 - config.lr_end) * step / config.steps)


def train(model, reference, vq, prompts, reward_fn, config, optimizer, first_step=0, embed=None, extra_loss=None,
          watch=None):
    """AR-GRPO.  A generator: improves `model` in place, and yields a dict of metrics after every step.

    reward_fn(images (B, 3, H, W) in [0, 1], texts) returns (total (B,), {name: (B,)}).  All that
    changes from step to step is the model, the optimizer and the step's number: whoever saves those
    three can continue with first_step.  Raises FloatingPointError, before the update touches the
    weights, if a reward is infinite, or a log-probability or the gradient not finite; a reward of NaN is missing.

    The diversity bonus compares images by embed(images, tokens) -> (B, ...), by default by their pixels.  A loss of
    your own is extra_loss(model, index, step) -> {name: number}: it adds its gradient to the model's, for the prompts
    at index (P,) of the step, and returns what is to be logged (see rehearsal.py).  What watch(step, images, texts) ->
    {name: number} says is logged, too.
    Under torchrun each process takes an equal share of the step's prompts, whole groups always."""
    device = next(model.parameters()).device
    rank, size = rank_and_size()
    if config.prompts_per_step % size:
        raise ValueError(f"prompts_per_step {config.prompts_per_step} cannot be shared equally by {size} processes")
    P, G = config.prompts_per_step // size, config.group_size        # P of this process
    B = P * G
    micro_batches = torch.arange(B, device=device).split(config.micro_batch or B)
    rollout = dict(cfg_scale=config.cfg_scale, temperature=config.temperature)
    learner = rollout if config.logprob_cfg == "guided" else dict(rollout, cfg_scale=1.0)
    compared = [model, reference] if config.kl == "exact" else [model]          # the exact KL needs all logits of both

    def judge(tokens, logits, *ref_logits):                      # ref_logits: one tensor, or none
        logp, entropy = logp_and_entropy(logits, tokens)
        return logp, entropy.detach(), *(kl_exact(logits, r) for r in ref_logits)

    def inputs(rows):
        return tokens[rows], cond[rows], None if cond_mask is None else cond_mask[rows]

    model.checkpointing = config.checkpointing
    sampler = frozen_copy(model) if device.type == "cuda" or config.compile else model
    if config.compile:
        sampler.decode = torch.compile(sampler.decode, dynamic=True)
    optimizer.zero_grad()
    bar = tqdm(range(first_step, config.steps), initial=first_step, total=config.steps, desc="GRPO", unit="step",
               **({"disable": True} if rank > 0 else {}))
    for step in bar:
        start = clock(device)

        # 1. Prompts.
        index = pick_prompts(len(prompts.texts), step, config.prompts_per_step, config.seed)[rank * P:(rank + 1) * P]
        texts, cond, cond_mask = prompts.pick(index, device)

        # 2. Rollout: G images per prompt from the current policy, which is also pi_old.
        if sampler is not model:
            refresh(sampler, model)
        drawn, passes = [], torch.arange(P, device=device).split(config.rollout_prompts or P)
        for k, some in enumerate(passes, start=rank * len(passes)):
            given = cond[some], None if cond_mask is None else cond_mask[some]
            with autocast(device):
                drawn.append(generate(sampler, *given, samples_per_prompt=G, **rollout,
                                      generator=rng_for(device, config.seed, "rollout", step, k)))
        tokens, sampler_logp = (torch.cat(column) for column in zip(*drawn))                       # (B, N) each
        rolled_out = clock(device)

        # 3. Reward.
        images = paint(vq, tokens, config.micro_batch or B)                                        # (B, 3, H, W)
        texts = [text for text in texts for _ in range(G)]                                         # one per image
        rewards, parts = reward_fn(images, texts)                                                  # (B,), {name: (B,)}
        check_finite(step, texts, reward=rewards.nan_to_num(0.0, torch.inf, -torch.inf))           # NaN is only missing
        rewarded = clock(device)

        # 4. Advantages: every image against its own group.
        bonus = 0.0
        if config.diversity_bonus:
            bonus = diversity_bonus(rewards, embed(images, tokens) if embed else images, G, config.diversity_bonus)
        advantages = group_advantages(rewards + bonus, G, scale=config.scale_advantages)           # (B,)

        # 5. The same images as the reference sees them: it never changes, so once is enough for all inner epochs.  Where
        # nothing depends on it, a micro-batch is enough to watch the KL; the exact KL looks for itself.
        cond = cond.repeat_interleave(G, dim=0)                                                    # (B, ...)
        cond_mask = None if cond_mask is None else cond_mask.repeat_interleave(G, dim=0)
        with torch.no_grad(), autocast(device):
            looked_at = micro_batches if config.kl_beta else micro_batches[:1]
            ref_logp = [token_logp(reference, *inputs(rows), **learner)[0]                          # (b, N) each
                        for rows in (looked_at if config.kl == "k3" else ())]
        for rows, logp in zip(micro_batches, ref_logp):
            check_finite(step, [texts[i] for i in rows.tolist()], reference_log_probabilities=logp)
        referred = clock(device)

        # 6. Update.  Micro-batches add up to the gradient of the whole batch, so their size is a matter of memory alone.
        old_logp = torch.empty_like(sampler_logp)
        history = []                                             # (number of images, stats), one per micro-batch
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(config, step)
        for epoch in range(config.inner_epochs):
            for m, rows in enumerate(micro_batches):
                with autocast(device):       # a block of its own: autocast keeps its bfloat16 weights until the block ends
                    logp, entropy, *kl = at_every_code(judge, compared, *inputs(rows), **learner)              # (b, N)
                if epoch == 0:
                    # The weights are still those that drew the images, so this pass is pi_old as well.  (The sampler's
                    # own log-probs may differ from it by rounding: in bfloat16 the ratio would not start at 1.)
                    old_logp[rows] = logp.detach()
                check_finite(step, [texts[i] for i in rows.tolist()], log_probabilities=logp)
                loss, stats = grpo_loss(logp, old_logp[rows], ref_logp[m] if m < len(ref_logp) else None, advantages[rows],
                                        clip_eps=config.clip_eps, clip_eps_high=config.clip_eps_high, kl_beta=config.kl_beta,
                                        kl=kl[0] if kl else None)
                (loss * len(rows) / B).backward()
                history.append((len(rows), dict(stats, entropy=entropy.mean().item())))
            extra = extra_loss(model, index, step) if extra_loss else {}
            average_gradients(model)
            grad_norm = nn.utils.clip_grad_norm_(model.parameters(), config.max_grad_norm).item()
            if not isfinite(grad_norm):
                known = rewards[~rewards.isnan()].tolist() or [float("nan")]
                also = "".join(f", {name} {value:g}" for name, value in extra.items())
                raise FloatingPointError(f"step {step}: the gradient's norm is {grad_norm}, with rewards from {min(known):g} "
                                         f"to {max(known):g}{also}, of the prompts {name_prompts(texts)}")
            optimizer.step()
            optimizer.zero_grad()                                # now, so that the next rollout has the gradients' memory
        updated = clock(device)

        # On policy, sampler and learner must agree: if they don't, one of them computes another distribution.
        mismatch = (old_logp - sampler_logp).abs()
        if step == first_step and learner == rollout and mismatch.mean() > (0.05 if device.type == "cuda" else 1e-3):
            warnings.warn(f"the ratio should be 1 on the first pass over a rollout, but sampler and learner differ by "
                          f"{mismatch.mean():.4f} nats a token on average (largest {mismatch.max():.4f})")

        _, std, flat = group_statistics(rewards, G)
        metrics = {
            "step": step,
            "reward": rewards.nanmean().item(),
            **{f"reward/{name}": part.nanmean().item() for name, part in parts.items()},
            "reward_std": std.mean().item(),
            "flat_groups": flat.float().mean().item(),               # they teach nothing, or variety alone
            "missing": rewards.isnan().float().mean().item(),        # images that a reward could not judge
            **{name: mean_of(name, history) for name in history[0][1]},
            "ratio_max": max(stats["ratio_max"] for _, stats in history),                          # but of this the largest
            **extra,
            **(watch(step, images, texts) if watch else {}),
            "mismatch": mismatch.max().item(),
            "grad_norm": grad_norm,                                  # of the last inner epoch, before it was clipped
            "diversity": group_diversity(images, G).mean().item(),
            "seconds": updated - start,
            "seconds_rollout": rolled_out - start,
            "seconds_reward": rewarded - rolled_out,                 # painting included
            "seconds_reference": referred - rewarded,
            "seconds_update": updated - referred,
        }
        metrics = average_over_processes(metrics, maximum=("step", "ratio_max", "mismatch"))
        bar.set_postfix(reward=f"{metrics['reward']:.3f}", kl=f"{metrics['kl']:.4f}", entropy=f"{metrics['entropy']:.3f}")
        yield metrics
