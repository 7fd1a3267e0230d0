"""AR-GRPO in one file: reinforcement learning of autoregressive image generators.

LlamaGen is a Llama-style transformer that generates an image as a sequence of N tokens, one after
another; a VQ tokenizer (`vqgan.py`) turns tokens into pixels.  AR-GRPO (arXiv 2508.06924) takes the
pretrained LlamaGen and makes it better at whatever a reward function measures.  One step of it:

    1. take P prompts (class labels or captions);
    2. for each sample a group of G images, token by token, from the policy pi_theta;
    3. score each image: rewards r_1 .. r_G per group;
    4. advantage of image i: how much better it did than its own group,
           A_i = (r_i - mean(r)) / (std(r) + eps);
    5. compute how likely the frozen, pretrained model pi_ref finds every token of these images;
    6. move pi_theta so that images with A > 0 become likelier, those with A < 0 less likely:
           loss = mean over all images i and tokens t of
                  [ -min( rho A_i, clip(rho, 1 - eps_c, 1 + eps_c) A_i ) + beta KL_{i,t} ],
           rho = pi_theta(x_{i,t} | x_{i,<t}) / pi_old(x_{i,t} | x_{i,<t}),
       where pi_old is pi_theta before this step's first update, a constant without gradient, and
       KL, estimated by `kl_k3`, keeps pi_theta close to pi_ref.  Take one AdamW step.  Repeat.

With one update per rollout, the default, pi_theta and pi_old are equal: rho is exactly 1, the clip
does nothing, and the gradient of the first term is that of -A_i log pi_theta.  rho and the clip
matter where the same images are used for several updates (`update_epochs` > 1).

Classifier-free guidance mixes predictions with and without the prompt: those without it are the
null branch.  Letters: P prompts, G samples of each, B = P * G images, b images in a micro-batch, N
tokens per image, V codes that a token can be, T condition positions in front of the image, C
channels, H heads.  A pass of the transformer has R rows, one for each image or prompt, or two with
guidance, and L positions: T + N - 1 with all tokens but the last, T with the condition alone, 1
when one more token is drawn.  rho is `ratio`, eps_c `clip_eps`, beta `kl_beta`.  The end of this
file lists where it departs from the official code, and why.
"""

import hashlib
from collections import namedtuple
from dataclasses import dataclass
from math import ceil, inf, isfinite, isqrt

import torch
import torch.nn as nn
import torch.nn.functional as F
from einops import rearrange, repeat

# ===== 1. The transformer =========================================================================

@dataclass
class GPTConfig:
    dim: int                       # C, channels of the residual stream
    n_layer: int
    n_head: int                    # H, each of C / H channels
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
        side, T = isqrt(self.block_size), self.cls_token_num
        rules = {"model_type must be 'c2i' or 't2i'": self.model_type in ("c2i", "t2i"),
                 "dim / n_head must be a multiple of 4": self.dim % (4 * self.n_head) == 0,
                 "block_size must be a square number": side * side == self.block_size,
                 "cls_token_num must be 1 for c2i": T == 1 or self.model_type == "t2i"}
        for rule, holds in rules.items():
            if not holds:
                raise ValueError(f"{rule}: {self}")


GPT_SIZES = {
    "GPT-B":   dict(n_layer=12, n_head=12, dim=768),     # 111M parameters, for c2i
    "GPT-L":   dict(n_layer=24, n_head=16, dim=1024),    # 343M
    "GPT-XL":  dict(n_layer=36, n_head=20, dim=1280),    # 775M
    "GPT-XXL": dict(n_layer=48, n_head=24, dim=1536),    # 1.4B
    "GPT-3B":  dict(n_layer=24, n_head=32, dim=3200),    # 3.1B
}


class RMSNorm(nn.Module):
    """Divides each position's vector by its root mean square, times weights (arXiv 1910.07467)."""
    def __init__(self, dim, eps):
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(dim))

    def forward(self, x):
        h = x.float()                            # in half precision sums of squares are too coarse
        h = h * torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + self.eps)
        return h.type_as(x) * self.weight


def rope_table(config):
    """Cosines and sines of the rotary embedding for a grid of tokens: (T + N, C/H/2, 2).

    Rotary embedding (RoFormer, arXiv 2104.09864) turns each pair of a head's channels by an angle
    that grows with the position.  Here half of the pairs turn with the token's row, the other half
    with its column, and the pairs of each half at different speeds.

    At the T condition positions LlamaGen's table is zero, cosine and sine both.  That is not a
    rotation: it sets queries and keys there to zero.  So a query meets each condition key that it
    sees with logit 0, and gives all of them the same weight, e^0 over the softmax's sum.
    The condition's *values* are not touched: they carry the prompt to later positions."""
    side, head = isqrt(config.block_size), config.dim // config.n_head
    speed = 1.0 / config.rope_base ** (torch.arange(0, head // 2, 2).float() / (head // 2))
    angle = torch.outer(torch.arange(side).float(), speed)           # (side, C/H/4)
    row = repeat(angle, "row pair -> (row column) pair", column=side)
    column = repeat(angle, "column pair -> (row column) pair", row=side)
    angle = torch.cat([row, column], dim=-1)                         # (N, C/H/2)
    table = torch.stack([angle.cos(), angle.sin()], dim=-1)          # (N, C/H/2, 2)
    return torch.cat([torch.zeros(config.cls_token_num, *table.shape[1:]), table])


def apply_rope(x, rope):
    """Turns neighbouring channels of x (R, H, L, C/H) by the angles of rope (L, C/H/2, 2)."""
    cos, sin = rope.unbind(-1)                                       # (L, C/H/2)
    x0, x1 = x.float().unflatten(-1, (-1, 2)).unbind(-1)             # (R, H, L, C/H/2)
    return torch.stack([x0 * cos - x1 * sin, x0 * sin + x1 * cos], -1).flatten(-2).type_as(x)


class Attention(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.n_head = config.n_head
        self.wqkv = nn.Linear(config.dim, 3 * config.dim, bias=False)
        self.wo = nn.Linear(config.dim, config.dim, bias=False)

    def qkv(self, x, rope):
        """Queries, keys and values: x (R, L, C) -> three (R, H, L, C/H)."""
        q, k, v = rearrange(self.wqkv(x), "r l (qkv h c) -> qkv r h l c", qkv=3, h=self.n_head)
        return apply_rope(q, rope), apply_rope(k, rope), v

    def forward(self, x, rope, mask=None):
        """All positions at once: x (R, L, C) -> y (R, L, C) and (keys, values), those of `qkv`.

        y is what all heads found, in the order "h c", through `wo`.  Position i sees j where
        mask[..., i, j], bool (R, 1, L, L), is True; without a mask, itself and those before it."""
        q, k, v = self.qkv(x, rope)
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None)
        return self.wo(rearrange(y, "r h l c -> r l (h c)")), (k, v)

    def decode_step(self, x, rope, cache, position, mask=None):
        """One new position: x (R, 1, C) -> (R, 1, C), with its own row of the table as rope.

        cache holds keys and values, (R, H, T + N - 1, C/H) each, filled before `position`.  The new
        ones are written into them.  The new position sees itself and all before it or, of these,
        only those where mask (R, 1, 1, position + 1) is True."""
        q, k, v = self.qkv(x, rope)
        keys, values = cache                                         # (R, H, T + N - 1, C/H) each
        keys[:, :, position:position + 1], values[:, :, position:position + 1] = k, v
        keys, values = keys[:, :, :position + 1], values[:, :, :position + 1]
        y = F.scaled_dot_product_attention(q, keys, values, attn_mask=mask)
        return self.wo(rearrange(y, "r h l c -> r l (h c)"))


class FeedForward(nn.Module):
    """SwiGLU (arXiv 2002.05202): three matrices of width about 8/3 C, not the usual two of 4 C."""
    def __init__(self, config):
        super().__init__()
        width = config.multiple_of * ceil(int(2 * 4 * config.dim / 3) / config.multiple_of)
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

    def forward(self, x, rope, mask=None):
        attended, keys_values = self.attention(self.attention_norm(x), rope, mask)
        x = x + attended
        return x + self.feed_forward(self.ffn_norm(x)), keys_values

    def decode_step(self, x, rope, cache, position, mask=None):
        x = x + self.attention.decode_step(self.attention_norm(x), rope, cache, position, mask)
        return x + self.feed_forward(self.ffn_norm(x))


class LabelEmbedder(nn.Module):
    """A class label is one condition token.  Label num_classes is "no class", for guidance."""
    def __init__(self, config):
        super().__init__()
        self.embedding_table = nn.Embedding(config.num_classes + 1, config.dim)

    def forward(self, labels):
        return self.embedding_table(labels)[:, None]                 # (R,) -> (R, 1, C)


class CaptionEmbedder(nn.Module):
    """A caption is T condition tokens: text-encoder features, projected by a small MLP.
    "No caption", for guidance, is a block of random features for the same MLP.  LlamaGen draws it
    once and never trains it: a buffer, in checkpoints but not among the parameters."""
    def __init__(self, config):
        super().__init__()
        features = torch.randn(config.cls_token_num, config.caption_dim)
        self.register_buffer("uncond_embedding", features / config.caption_dim ** 0.5)
        self.cap_proj = nn.ModuleDict(dict(
            fc1=nn.Linear(config.caption_dim, config.dim, bias=False),
            fc2=nn.Linear(config.dim, config.dim, bias=False)))

    def forward(self, features):
        if features.shape[1:] != self.uncond_embedding.shape:
            T, width = self.uncond_embedding.shape
            raise ValueError(f"captions must be (B, {T}, {width}), not {tuple(features.shape)}")
        h = self.cap_proj["fc1"](features.type_as(self.uncond_embedding))
        h = self.cap_proj["fc2"](F.gelu(h, approximate="tanh"))      # (R, T, C)
        return h.type_as(self.uncond_embedding)      # float32, under autocast, too


class Transformer(nn.Module):
    """LlamaGen: p(x_1 .. x_N | condition), one token at a time, row by row from the top left."""
    def __init__(self, config):
        super().__init__()
        self.config = config
        self.cls_embedding = dict(c2i=LabelEmbedder, t2i=CaptionEmbedder)[config.model_type](config)
        self.tok_embeddings = nn.Embedding(config.vocab_size, config.dim)
        self.layers = nn.ModuleList(Block(config) for _ in range(config.n_layer))
        self.norm = RMSNorm(config.dim, config.norm_eps)
        self.output = nn.Linear(config.dim, config.vocab_size, bias=False)
        self.register_buffer("rope", rope_table(config), persistent=False)
        for module in self.modules():            # so that a matrix keeps the size of what it reads
            if isinstance(module, nn.Linear):
                nn.init.normal_(module.weight, std=module.in_features ** -0.5)
            elif isinstance(module, nn.Embedding):
                nn.init.normal_(module.weight)
        nn.init.zeros_(self.output.weight)       # an untrained model finds all codes equally likely

    def null_cond(self, cond):
        """The null branch's condition, in the shape of cond: (R,), or (R, T, caption_dim)."""
        if self.config.model_type == "c2i":
            return torch.full_like(cond, self.config.num_classes)
        return self.cls_embedding.uncond_embedding.to(cond.dtype).expand_as(cond)

    def attention_mask(self, cond_mask, L):
        """Who sees whom where captions are padded: cond_mask (R, T) -> (R, 1, L, L) bool, or None.
        Each position sees the words and image tokens before it, but no padding.  Each also sees
        itself, even if it is padding, so that no softmax is over nothing."""
        if cond_mask is None:
            return None
        word = F.pad(cond_mask, (0, L - cond_mask.shape[1]), value=True)     # or image: (R, L)
        square = torch.ones(L, L, dtype=torch.bool, device=cond_mask.device)
        itself = torch.eye(L, dtype=torch.bool, device=cond_mask.device)
        return ((square.tril() & word[:, None, :]) | itself)[:, None]

    def forward(self, tokens, cond, cond_mask=None):
        """Teacher forcing: every position's prediction at once, given the true tokens before it.

        tokens (R, N) int64; cond (R,) int64 labels for c2i, (R, T, caption_dim) for t2i with
        cond_mask (R, T) bool, True at the words, captions padded on the left.
        Returns logits (R, N, V) float32; logits[:, i] predicts tokens[:, i].
        Raises ValueError if tokens are not N per row, or captions not of the model's shape."""
        N = self.config.block_size
        if tokens.shape[1:] != (N,):
            raise ValueError(f"tokens must be (B, {N}), not {tuple(tokens.shape)}")
        h = torch.cat([self.cls_embedding(cond), self.tok_embeddings(tokens[:, :-1])], dim=1)
        rope, mask = self.rope[:h.shape[1]], self.attention_mask(cond_mask, h.shape[1])
        for layer in self.layers:
            h, _ = layer(h, rope, mask)                              # (R, T + N - 1, C)
        # The output at position T - 1 + i predicts token i; the last condition position, token 0.
        return self.output(self.norm(h[:, self.config.cls_token_num - 1:])).float()

    def prefill(self, cond, cond_mask=None, copies=1):
        """Reads each condition once, and makes room for `copies` images that share it.
        cond (R, ...) and cond_mask as in `forward`.  Returns the first token's logits, (R * copies,
        V), and a cache for `decode_step`: per layer a pair of keys and values, each
        (R * copies, H, T + N - 1, C/H), of which the first T positions are filled."""
        h = self.cls_embedding(cond)                                 # (R, T, C)
        rope, mask = self.rope[:h.shape[1]], self.attention_mask(cond_mask, h.shape[1])
        room = (0, 0, 0, self.config.block_size - 1)     # none of C/H, and N - 1 more of L
        cache = []
        for layer in self.layers:
            h, keys_values = layer(h, rope, mask)
            cache.append([F.pad(x.repeat_interleave(copies, dim=0), room) for x in keys_values])
        logits = self.output(self.norm(h[:, -1])).float()            # (R, V)
        return logits.repeat_interleave(copies, dim=0), cache

    def decode_step(self, token, i, cache, cond_mask=None):
        """Feeds the i-th token of each row, (R,) int64; returns the next one's logits, (R, V).
        cond_mask (R, T) bool as in `forward`."""
        position, mask = self.config.cls_token_num + i, None
        if cond_mask is not None:
            mask = F.pad(cond_mask, (0, i + 1), value=True)[:, None, None]
        h = self.tok_embeddings(token)[:, None]                      # (R, 1, C)
        rope = self.rope[position:position + 1]
        for layer, keys_values in zip(self.layers, cache):
            h = layer.decode_step(h, rope, keys_values, position, mask)
        return self.output(self.norm(h[:, -1])).float()              # (R, V)


# ===== 2. The policy: what is drawn from, and what is trained =====================================

def check_policy(cfg_scale, temperature, top_k=0, top_p=1.0, samples=1):
    """Raises ValueError for numbers that make no distribution, NaN among them, or no sample."""
    fine = isfinite(cfg_scale) and 0 < temperature < inf and top_k >= 0 and 0 < top_p <= 1
    if not fine or samples < 1:
        raise ValueError("a policy needs finite cfg_scale, temperature > 0, top_k >= 0, 0 < top_p "
                         f"<= 1, samples > 0: not {cfg_scale, temperature, top_k, top_p, samples}")


def both_branches(model, cond, cond_mask, cfg_scale):
    """The conditions that guidance needs: the rows' own, then as many of the null branch.

    The null branch keeps the captions' masks, as LlamaGen's does.  At scale 1 it is left out."""
    if cfg_scale == 1:
        return cond, cond_mask
    cond_mask = None if cond_mask is None else cond_mask.repeat(2, 1)
    return torch.cat([cond, model.null_cond(cond)]), cond_mask


def guide(logits, cfg_scale):
    """Classifier-free guidance (arXiv 2207.12598): logits of both branches (2 B, ..., V), one below
    the other -> (B, ..., V).  At scale 1 there is one branch."""
    if cfg_scale == 1:
        return logits
    prompted, null = logits.chunk(2)
    return null + cfg_scale * (prompted - null)


def filter_logits(logits, top_k=0, top_p=1.0):
    """New logits (..., V): -inf for all but the top_k largest (0 or above V: all) and their equals,
    then for all outside the nucleus (arXiv 1904.09751): by the softmax of what top_k left, the
    fewest codes, from the likeliest down, that add up to more than top_p (1: all)."""
    if top_k:
        kth = logits.topk(min(top_k, logits.shape[-1])).values[..., -1:]
        logits = logits.masked_fill(logits < kth, -torch.inf)
    if top_p < 1:
        ordered, order = logits.sort(dim=-1, descending=True)
        mass_before = F.pad(ordered.softmax(-1).cumsum(-1)[..., :-1], (1, 0))    # 0 for the first
        outside = torch.zeros_like(order, dtype=torch.bool).scatter(-1, order, mass_before > top_p)
        logits = logits.masked_fill(outside, -torch.inf)
    return logits


def finest_float(device):
    """float64, or float32 on Apple's and Intel's GPUs, many of which have no float64."""
    return torch.float32 if device.type in ("mps", "xpu") else torch.float64


def sample_inverse_cdf(logp, uniform):
    """One token per row, drawn from log-probabilities: logp (B, V), uniform (B,) in [0, 1) -> (B,).
    Inverse-CDF sampling: the first code whose cumulative probability reaches 1 - uniform."""
    cdf = logp.to(finest_float(logp.device)).exp().cumsum(-1)   # else rare codes drown in rounding
    # 1 - uniform is never 0, so a code of probability 0 is not drawn.  The clamp is for NaNs.
    chosen = torch.searchsorted(cdf, (1 - uniform[:, None]) * cdf[:, -1:])[:, 0]
    return chosen.clamp(max=cdf.shape[-1] - 1)


@torch.no_grad()
def generate(model, cond, cond_mask=None, *, samples_per_prompt=1, cfg_scale=1.0, temperature=1.0,
             top_k=0, top_p=1.0, greedy=False, generator=None, uniform=None, prefix=None):
    """Samples images, token by token, through a key-value cache: the rollout.
    cond and cond_mask are as in `Transformer.forward`, for P prompts.  Returns tokens (P*G, N)
    int64 and logp (P*G, N) float32, the log-probability with which each token was drawn, after
    guidance, temperature, top-k and top-p.  The G = samples_per_prompt samples of a prompt are
    neighbours and share its prefill.  greedy takes the likeliest token, and gives its logp.
    prefix (P*G, n) int64 are the first n tokens of each image, given instead of drawn, but with
    their log-probabilities.  uniform (P*G, N - n) float64 in [0, 1) are the random numbers, if not
    the generator's.  Raises ValueError for settings out of range or a prefix of other rows."""
    P, G, N = len(cond), samples_per_prompt, model.config.block_size
    check_policy(cfg_scale, temperature, top_k, top_p, G)
    given = 0 if prefix is None else prefix.shape[1]
    if given and len(prefix) != P * G:
        raise ValueError(f"prefix must have {P * G} rows, one for each image, not {len(prefix)}")
    if uniform is None and not greedy:
        uniform = torch.rand(N - given, P * G, generator=generator, device=cond.device,
                             dtype=finest_float(cond.device)).T      # in the order of their use
    cond, cond_mask = both_branches(model, cond, cond_mask, cfg_scale)
    # Rows: G of the first prompt, G of the second, ...; then the null branch's, in the same order.
    logits, cache = model.prefill(cond, cond_mask, copies=G)         # (P * G, V), or twice as many
    cond_mask = None if cond_mask is None else cond_mask.repeat_interleave(G, dim=0)
    tokens, logps = [], []
    for i in range(N):
        if i > 0:
            logits = model.decode_step(tokens[-1].repeat(len(cond) // P), i - 1, cache, cond_mask)
        logits = filter_logits(guide(logits, cfg_scale) / temperature, top_k, top_p)
        logp = logits.log_softmax(-1)                                # (P * G, V)
        if i < given:
            token = prefix[:, i]
        elif greedy:
            token = logp.argmax(-1)
        else:
            token = sample_inverse_cdf(logp, uniform[:, i - given])
        tokens.append(token)
        logps.append(logp.gather(-1, token[:, None])[:, 0])
    return torch.stack(tokens, dim=1), torch.stack(logps, dim=1)


def token_logp(model, tokens, cond, cond_mask=None, *, cfg_scale=1.0, temperature=1.0):
    """Log-probability of every given token and entropy of every choice, in nats: (B, N) each.
    This is the distribution that `generate` draws from without top-k and top-p.  Both are
    differentiable.  Raises ValueError for numbers that make no policy."""
    check_policy(cfg_scale, temperature)
    both, both_masks = both_branches(model, cond, cond_mask, cfg_scale)
    logits = model(tokens.repeat(len(both) // len(cond), 1), both, both_masks)       # (R, N, V)
    logp = (guide(logits, cfg_scale) / temperature).log_softmax(-1)  # (B, N, V)
    entropy = -(logp.exp() * logp).sum(-1)                           # (B, N)
    return logp.gather(-1, tokens[..., None])[..., 0], entropy


# ===== 3. GRPO, as maths ==========================================================================

def group_statistics(rewards, group_size):
    """Per group: mean, unbiased standard deviation, is it flat?  rewards (P*G,) -> three (P, 1).

    A reward of NaN is missing: it is left out of all three.  A group is flat if its known rewards
    are all equal; with one known reward, or none, it is flat, too.  Raises ValueError for groups of
    one, which have nothing to be compared with, and for rewards that do not fill whole groups."""
    if group_size < 2 or rewards.ndim != 1 or len(rewards) % group_size:
        raise ValueError("rewards must be (P * G,) with group_size G >= 2, "
                         f"not {tuple(rewards.shape)} with group_size {group_size}")
    r = rearrange(rewards.float(), "(p g) -> p g", g=group_size)
    known = (~r.isnan()).sum(dim=1, keepdim=True)
    mean = r.nanmean(dim=1, keepdim=True)
    std = ((r - mean).square().nansum(dim=1, keepdim=True) / (known - 1).clamp(min=1)).sqrt()
    flat = r.nan_to_num(-inf).amax(1, keepdim=True) <= r.nan_to_num(inf).amin(1, keepdim=True)
    return mean, std, flat                                           # flat if none is known, too


def group_advantages(rewards, group_size, eps=1e-4, scale=True):
    """How much better each sample did than its group: rewards (P*G,) -> advantages (P*G,).
    A = (r - mean) / std (DeepSeekMath, arXiv 2402.03300, section 4.1).  The unbiased std, and
    eps = 1e-4 beside it, are the official code's choice, and TRL's: so the rewards' scale cancels
    only while std is far above eps (at 1e-6 A is a hundredth) and, in float32, below 1e18.
    scale=False leaves the division out (Dr. GRPO, arXiv 2503.20783).  A missing reward (NaN) and a
    flat group get exactly 0.  Errors as in `group_statistics`."""
    mean, std, flat = group_statistics(rewards, group_size)
    r = rearrange(rewards.float(), "(p g) -> p g", g=group_size)
    advantages = (r - mean) / (std + eps) if scale else r - mean
    # These images teach nothing, not even by rounding errors.  The KL penalty still acts on them.
    return rearrange(advantages.masked_fill(flat | r.isnan(), 0.0), "p g -> (p g)")


def kl_k3(logp, ref_logp):
    """KL penalty from the sampled token alone, elementwise, >= 0 but for rounding: k3 (Schulman
    2020, "Approximating KL divergence").
    At a token that pi has drawn its *value* is an unbiased estimate of KL(pi || pi_ref).  The mean
    of its *gradient*, E_pi[(1 - pi_ref / pi) grad log pi], is that of KL(pi_ref || pi), the other
    direction.  The latter is what this loop minimises, token by token, while samples are pi's."""
    d = ref_logp - logp
    return d.exp() - d - 1


def kl_exact(logits, ref_logits):
    """KL(pi || pi_ref) summed over the vocabulary: (..., V) -> (...), in nats."""
    logp, ref_logp = logits.log_softmax(-1), ref_logits.log_softmax(-1)
    return (logp.exp() * (logp - ref_logp)).sum(-1)


def grpo_loss(logp, old_logp, ref_logp, advantages, *, clip_eps=0.2, clip_eps_high=None,
              kl_beta=0.0):
    """The loss of step 6: logp, old_logp, ref_logp (B, N), advantages (B,) -> (scalar, stats).

    advantages may also be (B, N), one for each token.  ref_logp may be None when kl_beta is 0.
    clip_eps_high sets the upper side alone (DAPO, arXiv 2503.14476).  Every image has exactly N
    tokens, so the mean over all tokens and the mean of the images' means are the same number.
    stats are floats by name."""
    if ref_logp is None and kl_beta > 0:
        raise ValueError(f"a KL penalty (kl_beta {kl_beta}) needs the reference's log-probs")
    high = clip_eps if clip_eps_high is None else clip_eps_high
    A = advantages if advantages.ndim == 2 else advantages[:, None]  # the same for all N tokens
    ratio = (logp - old_logp).exp()                                  # rho, (B, N)
    unclipped = ratio * A
    clipped = ratio.clamp(1 - clip_eps, 1 + high) * A
    loss = -torch.minimum(unclipped, clipped).mean()     # no reward for leaving the clip range
    clip_frac = (clipped < unclipped).float().mean()     # share of tokens that the clip stops
    stats = dict(ratio=ratio.mean(), ratio_max=ratio.max(), clip_frac=clip_frac, loss=loss)
    if ref_logp is not None:
        kl = kl_k3(logp, ref_logp).mean()
        loss = loss + kl_beta * kl
        stats |= dict(kl=kl, loss=loss)
    numbers = torch.stack(list(stats.values())).tolist()             # one wait for the GPU
    return loss, dict(zip(stats, numbers))


# ===== 4. What the loop needs: settings, prompts, random streams, images ========================

@dataclass
class GRPOConfig:
    """Settings of the loop.  The defaults suit the models of toy/, train_c2i.py has LlamaGen's."""
    steps: int = 180                     # rollouts, and with update_epochs 1 also optimizer steps
    prompts_per_step: int = 8            # P, prompts per step, of all processes
    group_size: int = 16                 # G, images per prompt
    micro_batch: int | None = 64         # b, images per pass but the sampler's; None is all
    rollout_prompts: int = 0             # prompts per pass of the sampler; 0 is all
    update_epochs: int = 1               # optimizer steps per rollout; above 1 the clip can matter
    lr: float = 8e-4                     # AdamW's learning rate, before warm-up and decay
    warmup_steps: int = 5                # steps, at least 1, in which the learning rate rises
    lr_end: float = 0.0                  # share of lr left after its linear decay; 1 is no decay
    weight_decay: float = 0.0            # AdamW's weight decay
    max_grad_norm: float = 1.0           # a longer gradient is scaled down to this norm
    clip_eps: float = 0.2                # the ratio is clipped to [1 - clip_eps, 1 + clip_eps]
    clip_eps_high: float | None = None   # if given, the ratio is clipped at 1 + clip_eps_high
    kl_beta: float = 0.01                # weight of the KL penalty to the pretrained model
    scale_advantages: bool = True        # divide advantages by the group's standard deviation
    cfg_scale: float = 1.0               # classifier-free guidance at rollout: 1 is none
    temperature: float = 1.0             # temperature, at rollout and of log-probs
    logprob_cfg: str = "guided"          # guidance of log-probs: "guided" as at rollout, or "none"
    seed: int = 0                        # of prompts and rollouts

    LEAST = dict(steps=1, prompts_per_step=1, group_size=2, micro_batch=1, update_epochs=1,
                 warmup_steps=1, max_grad_norm=1e-9, temperature=1e-3)     # others: 0

    def __post_init__(self):
        for name, value in vars(self).items():
            least = self.LEAST.get(name, 0)
            if isinstance(value, (int, float)) and not least <= value < inf:     # nor NaN
                raise ValueError(f"{name} must be a finite number of at least {least}, not {value}")
        if self.logprob_cfg not in ("guided", "none"):
            raise ValueError(f"logprob_cfg must be 'guided' or 'none', not {self.logprob_cfg!r}")


@dataclass
class Prompts:
    """M prompts: the texts that rewards read, the conditions that the transformer reads."""
    texts: list                                # M strings
    cond: torch.Tensor                         # (M,) int64 for c2i, (M, T, caption_dim) for t2i
    cond_mask: torch.Tensor | None = None      # (M, T) bool for t2i

    def pick(self, index, device):
        """Conditions and mask of the prompts at index (R,), which may name one twice."""
        cond_mask = None if self.cond_mask is None else self.cond_mask[index].to(device)
        return self.cond[index].to(device), cond_mask


def rng_for(device, *key):
    """A device's random generator, which depends on the key alone, as (seed, "rollout", step).
    No stream runs on from one step to the next, so a resumed run restores no generator."""
    digest = hashlib.blake2b(repr(key).encode(), digest_size=7).digest()
    return torch.Generator(device).manual_seed(int.from_bytes(digest, "big"))


def pick_prompts(n, step, per_step, seed):
    """Which of n prompts a step uses, (per_step,): endless rounds through all, shuffled anew.

    Of 3 prompts, 2 a step, in rounds such as 2 0 1, 1 2 0, ..: step 0 has 2 0, step 1 has 1 1."""
    first, last = step * per_step, (step + 1) * per_step - 1         # places in that sequence
    rounds = range(first // n, last // n + 1)
    order = [torch.randperm(n, generator=rng_for("cpu", seed, "prompts", k)) for k in rounds]
    return torch.cat(order)[first - rounds[0] * n:][:per_step]


def autocast(device):
    """bfloat16 for the transformer's matrix products on a GPU, but float32 on a CPU, and on GPUs
    before compute capability 8 (T4, V100), which only emulate bfloat16, slowly."""
    fast = device.type == "cuda" and torch.cuda.get_device_capability(device) >= (8, 0)
    return torch.autocast(device.type, dtype=torch.bfloat16, enabled=fast)


@torch.no_grad()
def to_images(vq, tokens, micro_batch=None):
    """tokens (B, N) -> images (B, 3, height, width) in [0, 1], as rewards want them."""
    parts = [(vq.decode(rows) + 1) / 2 for rows in tokens.split(micro_batch or len(tokens))]
    return torch.cat(parts).clamp(0, 1)


@torch.no_grad()
def draw_images(model, vq, prompts, index, generator, *, micro_batch=None, **how):
    """Samples images of the prompts at index (P,): tokens (B, N), logp (B, N), images in [0, 1].
    how is what else `generate` takes: samples_per_prompt, cfg_scale, temperature, ..."""
    device = next(model.parameters()).device
    cond, cond_mask = prompts.pick(index, device)
    with autocast(device):
        tokens, logp = generate(model, cond, cond_mask, generator=generator, **how)
    return tokens, logp, to_images(vq, tokens, micro_batch)


def policy_logp(model, prompts, index, tokens, config):
    """`token_logp` as the settings want it, of images (b, N) of the prompts at index (b,)."""
    cond, cond_mask = prompts.pick(index, tokens.device)
    cfg_scale = config.cfg_scale if config.logprob_cfg == "guided" else 1.0
    with autocast(tokens.device):
        return token_logp(model, tokens, cond, cond_mask, cfg_scale=cfg_scale,
                          temperature=config.temperature)


def make_optimizer(model, config):
    return torch.optim.AdamW(model.parameters(), lr=config.lr, betas=(0.9, 0.95),
                             weight_decay=config.weight_decay)


def learning_rate(config, step):
    """A line from lr at step 0 to lr_end * lr after the last step, times a linear warm-up."""
    warm_up = min(1.0, (step + 1) / config.warmup_steps)
    return config.lr * warm_up * (1 - (1 - config.lr_end) * step / config.steps)


# ===== 5. The loop ================================================================================

# What `train` yields: the log {name: number}, and what made it: index (P,), texts (B strings),
# tokens (B, N), images (B, 3, height, width) in [0, 1], rewards (B,), their parts {name: (B,)},
# advantages (B,) or (B, N), and (B, N) each: logp of pi_old, ref_logp, entropy of pi_old.
Step = namedtuple("Step", "metrics index texts tokens images rewards parts advantages "
                          "logp ref_logp entropy")


def train(model, reference, vq, prompts, reward_fn, config, optimizer, first_step=0, *,
          sampler=None, advantage_fn=None, loss_fn=None, extra_loss=None, shard=(0, 1), sync=None):
    """AR-GRPO: improves `model` in place.  A generator: each `next` makes a step and gives a Step.

    reward_fn(images (B, 3, height, width) in [0, 1], texts) returns (total (B,), {name: (B,)}), as
    a RewardSet of reward.py does; a total of NaN is missing.  Only the model, the optimizer and the
    step's number change: whoever saves those three can continue with first_step = step + 1.
    Raises FloatingPointError, before the update that would take it, if a gradient is not finite.

    Each keyword replaces a part of the method, or adds one:
    sampler(model) -> the model to sample from, such as a faster copy
    advantage_fn(rewards, images, tokens, index, step) -> advantages, as (B,) or (B, N)
    loss_fn(logp, old_logp, ref_logp, advantages, entropy) -> a mean over images, and stats
    extra_loss(model, index, step) -> {name: number}, adds gradients of its own in each epoch
    shard = (rank, size), this process of so many, which share the prompts
    sync(model) averages the gradients of all processes before they are clipped"""
    device, (rank, size), G = model.output.weight.device, shard, config.group_size
    if config.prompts_per_step % size:
        raise ValueError(f"{config.prompts_per_step} prompts cannot be shared by {size} processes")
    if loss_fn in (None, grpo_loss):
        def loss_fn(logp, old_logp, ref_logp, advantages, entropy):
            return grpo_loss(logp, old_logp, ref_logp, advantages, clip_eps=config.clip_eps,
                             clip_eps_high=config.clip_eps_high, kl_beta=config.kl_beta)
    optimizer.zero_grad()

    for step in range(first_step, config.steps):
        # 1. Prompts.
        index = pick_prompts(len(prompts.texts), step, config.prompts_per_step, config.seed)
        index = index.chunk(size)[rank]                              # (P,), of this process
        prompt_of = index.repeat_interleave(G)                       # (B,), each image's
        texts = [prompts.texts[i] for i in prompt_of.tolist()]
        micro_batches = torch.arange(len(texts)).split(config.micro_batch or len(texts))     # (b,)

        # 2. Rollout: G images per prompt from the current policy, in one pass or several.
        drawer = model if sampler is None else sampler(model)
        passes, drawn = index.split(config.rollout_prompts or len(index)), []
        for k, chosen in enumerate(passes, start=rank * len(passes)):        # of all processes
            rng = rng_for(device, config.seed, "rollout", step, k)   # no two passes share a stream
            drawn.append(draw_images(drawer, vq, prompts, chosen, rng, samples_per_prompt=G,
                                     cfg_scale=config.cfg_scale, temperature=config.temperature,
                                     micro_batch=config.micro_batch))
        tokens, sampler_logp, images = (torch.cat(column) for column in zip(*drawn))

        # 3. Reward.
        pair = reward_fn(images, texts)
        if not isinstance(pair, tuple):
            raise TypeError("reward_fn must return (total, parts), as reward.py's RewardSet does")
        rewards, parts = pair                                        # (B,), {name: (B,)}

        # 4. Advantages: every image against its own group.
        if advantage_fn is None:
            advantages = group_advantages(rewards, G, scale=config.scale_advantages)     # (B,)
        else:
            advantages = advantage_fn(rewards, images, tokens, index, step)

        # 5. Reference: it never changes, so once is enough for all update epochs.
        with torch.no_grad():
            ref_logp = torch.cat([policy_logp(reference, prompts, prompt_of[rows], tokens[rows],
                                              config)[0] for rows in micro_batches])     # (B, N)

        # 6. Update.  A micro-batch's loss is the mean over its b images.  Weighted by b / B, these
        #    means add up to the mean over all B images, and so do their gradients.
        for param_group in optimizer.param_groups:
            param_group["lr"] = learning_rate(config, step)
        old_logp = None                          # that of pi_old, once the first epoch has it
        for _ in range(config.update_epochs):
            scored = []
            for rows in micro_batches:
                logp, entropy = policy_logp(model, prompts, prompt_of[rows], tokens[rows], config)
                # Before the first update pi_old is pi_theta: rho is 1, but has a gradient.  (The
                # sampler's log-probs differ, by rounding or, with logprob_cfg "none", in guidance.)
                old = logp.detach() if old_logp is None else old_logp[rows]
                loss, _ = loss_fn(logp, old, ref_logp[rows], advantages[rows], entropy)
                (loss * len(rows) / len(texts)).backward()           # adds to .grad
                scored.append((logp.detach(), entropy.detach()))
            logp, entropy = (torch.cat(column) for column in zip(*scored))           # (B, N) each
            if old_logp is None:
                old_logp, old_entropy = logp, entropy
            extra = {} if extra_loss is None else extra_loss(model, index, step)
            if sync is not None:
                sync(model)
            grad_norm = nn.utils.clip_grad_norm_(model.parameters(), config.max_grad_norm).item()
            if not isfinite(grad_norm):
                raise FloatingPointError(f"step {step}: the gradient's norm is {grad_norm}, with "
                                         f"prompts such as {sorted(set(texts))[:3]}")
            optimizer.step()
            optimizer.zero_grad()                # now, so that the next rollout has its memory

        # For the log: the loss's statistics over all images in the last epoch; the rest of pi_old.
        _, stats = loss_fn(logp, old_logp, ref_logp, advantages, entropy)
        _, std, flat = group_statistics(rewards, G)
        mismatch = (old_logp - sampler_logp).abs()                   # sampler against learner
        metrics = {
            "step": step, "reward": rewards.nanmean().item(),
            **{f"reward/{name}": part.nanmean().item() for name, part in parts.items()},
            "reward_std": std.mean().item(), "flat_groups": flat.float().mean().item(),
            "missing": rewards.isnan().float().mean().item(), "entropy": old_entropy.mean().item(),
            **stats, **extra, "mismatch": mismatch.max().item(),
            "mismatch_mean": mismatch.mean().item(), "grad_norm": grad_norm}
        yield Step(metrics, index, texts, tokens, images, rewards, parts, advantages, old_logp,
                   ref_logp, old_entropy)


# ===== 6. Where this file departs from the paper's official code, and why =========================

# 1. The policy that is trained is the policy that is sampled.  The official code samples images
#    with guidance but takes the log-probabilities without it, so it reinforces choices of another
#    distribution.  Here `guide` guides both, so with guidance the null branch is trained, too.
#    `GRPOConfig(logprob_cfg="none")` gives the official behaviour.
# 2. A group whose rewards are all equal gets advantages of exactly zero, not amplified rounding.
#    An image that a reward fails to judge is left out of its group; officially its reward is 0.
# 3. Weights are float32, on GPUs with bfloat16 autocast.  The official t2i policy is held in
#    bfloat16, where a learning rate of 1e-5 is below the rounding step of most weights.
# 4. Captions come padded on the left (captions.py), as LlamaGen was trained: the last condition
#    position, which predicts the first token, is then a word.  The official code pads on the right.
# 5. AdamW's betas are LlamaGen's, (0.9, 0.95), not torch's (0.9, 0.999).  A short warm-up keeps the
#    first steps small, when AdamW's averages are not yet reliable.
