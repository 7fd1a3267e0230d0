"""A plain sampler to measure argrpo.py's against.

Only the weights are argrpo.py's: when its code gets faster, this must not.  Letters as there:
B images, C channels, H heads, V codes, T condition positions.
"""

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


def plain_forward(model, h, rope, cache, position, mask):
    """The transformer, one plain operation after another.

    h (rows, positions, C) at position (positions,), where rope (positions, C/H/2, 2) is float32
    -> logits (rows, V) behind the last one.  cache (layers, 2, rows, H, slots, C/H) takes the new
    keys and values, and all of its slots are attended to through mask (positions, slots)."""
    c = model.config
    cos, sin = rope[:, None].unbind(-1)
    for i, layer in enumerate(model.layers):
        attention, ffn = layer.attention, layer.feed_forward
        qkv = attention.wqkv(plain_norm(h, layer.attention_norm.weight, c.norm_eps))
        q, k, v = qkv.unflatten(-1, (3, c.n_head, -1)).unbind(2)     # (rows, positions, H, C/H)
        q, k = plain_rotate(q, cos, sin), plain_rotate(k, cos, sin)
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))             # (rows, H, positions, C/H)
        keys, values = cache[i]
        keys[:, :, position], values[:, :, position] = k, v
        y = F.scaled_dot_product_attention(q, keys, values, attn_mask=mask)
        h = h + attention.wo(y.transpose(1, 2).flatten(2))
        x = plain_norm(h, layer.ffn_norm.weight, c.norm_eps)
        h = h + ffn.w2(F.silu(ffn.w1(x)) * ffn.w3(x))
    return model.output(plain_norm(h[:, -1], model.norm.weight, c.norm_eps)).float()


def choose(logits, cfg_scale, greedy):
    """Logits (rows, V) -> one code per image (B,)."""
    if cfg_scale != 1:
        cond, null = logits.chunk(2)
        logits = null + cfg_scale * (cond - null)
    if greedy:
        return logits.argmax(dim=-1)
    return torch.multinomial(logits.softmax(dim=-1), 1)[:, 0]


@torch.no_grad()
def plain_sampler(model, labels, samples=1, cfg_scale=1.0, greedy=False):
    """Labels (P,) -> tokens (B, N), through a cache that is always attended to as a whole."""
    c, cond = model.config, labels.repeat_interleave(samples)
    tokens = cond.new_zeros(len(cond), c.block_size)
    branches = 1 if cfg_scale == 1 else 2
    if branches == 2:                            # the null branch's rows are below
        cond = torch.cat([cond, model.null_cond(cond)])                              # (rows,)
    h, rope = model.cls_embedding(cond), argrpo.rope_table(c).to(cond.device)        # (rows, T, C)
    slots = c.cls_token_num + c.block_size - 1
    causal = torch.ones(slots, slots, dtype=torch.bool, device=cond.device).tril()
    cache = h.new_zeros(c.n_layer, 2, len(cond), c.n_head, slots, c.dim // c.n_head)
    position = torch.arange(c.cls_token_num, device=cond.device)
    for i in range(c.block_size):
        logits = plain_forward(model, h, rope[position], cache, position, causal[position])
        tokens[:, i] = choose(logits, cfg_scale, greedy)
        h = model.tok_embeddings(tokens[:, i:i + 1].repeat(branches, 1))             # (rows, 1, C)
        position = position[-1:] + 1
    return tokens
