"""Plain samplers to measure argrpo.py's against.

Only the weights are argrpo.py's: when its code gets faster, these must not.  Letters as there:
B images, C channels, H heads, V codes, T condition positions.
"""

from functools import partial

import torch
import torch.nn.functional as F

import argrpo


def plain_norm(x, weight, eps):
    y = x.float()
    return (y * torch.rsqrt(y.pow(2).mean(-1, keepdim=True) + eps)).type_as(x) * weight


def plain_rotate(x, cos, sin):
    """x (rows, positions, H, C/H), cos and sin (positions, 1, C/H/2)."""
    a, b = x.float().unflatten(-1, (-1, 2)).unbind(-1)
    turned = torch.stack([a * cos - b * sin, a * sin + b * cos], dim=-1)
    return turned.flatten(-2).type_as(x)


def plain_forward(model, h, rope, attend):
    """The transformer, one plain operation after another.

    h (rows, positions, C) -> logits (rows, V) behind the last position.  attend(layer, q, k, v)
    does the attention; rope (positions, C/H/2, 2) is float32."""
    c = model.config
    cos, sin = rope[:, None].unbind(-1)
    for i, layer in enumerate(model.layers):
        attention, ffn = layer.attention, layer.feed_forward
        qkv = attention.wqkv(plain_norm(h, layer.attention_norm.weight, c.norm_eps))
        q, k, v = qkv.unflatten(-1, (3, c.n_head, -1)).unbind(2)     # (rows, positions, H, C/H)
        q, k = plain_rotate(q, cos, sin), plain_rotate(k, cos, sin)
        y = attend(i, q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2))
        h = h + attention.wo(y.transpose(1, 2).flatten(2))
        x = plain_norm(h, layer.ffn_norm.weight, c.norm_eps)
        h = h + ffn.w2(F.silu(ffn.w1(x)) * ffn.w3(x))
    return model.output(plain_norm(h[:, -1], model.norm.weight, c.norm_eps)).float()


def every_row(model, labels, samples, cfg_scale):
    """Labels (P,), `samples` times each; with guidance the unconditional ones below them."""
    labels = labels.repeat_interleave(samples)
    if cfg_scale == 1:
        return labels
    return torch.cat([labels, model.null_cond(labels)])


def choose(logits, cfg_scale, greedy):
    """Logits (rows, V) -> one code per image (B,)."""
    if cfg_scale != 1:
        cond, null = logits.chunk(2)
        logits = null + cfg_scale * (cond - null)
    if greedy:
        return logits.argmax(dim=-1)
    return torch.multinomial(logits.softmax(dim=-1), 1)[:, 0]


def attend_to_all_slots(cache, position, mask, layer, q, k, v):
    """Writes k and v (rows, H, positions, C/H) into the cache, and attends to all of it."""
    keys, values = cache[layer]                                          # (rows, H, slots, C/H)
    keys[:, :, position], values[:, :, position] = k, v
    return F.scaled_dot_product_attention(q, keys, values, attn_mask=mask)


def attend_to_the_past(layer, q, k, v):
    return F.scaled_dot_product_attention(q, k, v, is_causal=True)


@torch.no_grad()
def full_mask_sampler(model, labels, samples=1, cfg_scale=1.0, greedy=False):
    """Labels (P,) -> tokens (B, N), through a static cache that is always attended to as a
    whole."""
    c = model.config
    cond = every_row(model, labels, samples, cfg_scale)                              # (rows,)
    branches = 1 if cfg_scale == 1 else 2
    h = model.cls_embedding(cond)
    rope = argrpo.rope_table(c).to(cond.device)
    slots = c.cls_token_num + c.block_size - 1
    cache = h.new_zeros(c.n_layer, 2, len(cond), c.n_head, slots, c.dim // c.n_head)
    causal = torch.ones(slots, slots, dtype=torch.bool, device=h.device).tril()
    position = torch.arange(c.cls_token_num, device=h.device)
    tokens = []
    for _ in range(c.block_size):
        attend = partial(attend_to_all_slots, cache, position, causal[position])
        logits = plain_forward(model, h, rope[position], attend)
        tokens.append(choose(logits, cfg_scale, greedy))
        h = model.tok_embeddings(tokens[-1].repeat(branches))[:, None]               # (rows, 1, C)
        position = position[-1:] + 1
    return torch.stack(tokens, dim=1)


@torch.no_grad()
def uncached_sampler(model, labels, samples=1, cfg_scale=1.0, greedy=False, positions=None):
    """The same without a cache.

    Of given positions alone it draws nothing of use, but takes as long for each."""
    c = model.config
    cond = every_row(model, labels, samples, cfg_scale)                              # (rows,)
    branches = 1 if cfg_scale == 1 else 2
    rope = argrpo.rope_table(c).to(cond.device)
    tokens = torch.zeros(len(cond) // branches, c.block_size, dtype=torch.long, device=cond.device)
    if positions is None:
        positions = range(c.block_size)
    for i in positions:
        past = model.tok_embeddings(tokens[:, :i].repeat(branches, 1))
        h = torch.cat([model.cls_embedding(cond), past], dim=1)                  # (rows, T + i, C)
        logits = plain_forward(model, h, rope[:h.shape[1]], attend_to_the_past)
        tokens[:, i] = choose(logits, cfg_scale, greedy)
    return tokens
