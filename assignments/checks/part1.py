"""Part 1, the policy: rotary table, attention, guidance, filters, drawing, `generate`."""

from types import SimpleNamespace

import torch

from checks import CAPTIONS, check, conditions, transformer, with_gradients


def table(m, d, **changes):
    """The rotary table of a drawn grid, its condition rows, and a quarter of a head's channels."""
    head, side = 4 * d.size(1, 4), d.size(2, 5)
    c = m.GPTConfig(dim=2 * head, n_layer=1, n_head=2, block_size=side ** 2, model_type="t2i",
                    cls_token_num=d.size(1, 4), **changes)
    return m.rope_table(c), c.cls_token_num, head // 4


@check("1.1", "the table has one row for each condition position and token: (T + N, C/H/2, 2)")
def _(m, d):
    rope, _, _ = table(m, d)
    return str(list(rope.shape)), str(rope.dtype)


@check("1.1", "cosine and sine are both zero at the condition positions")
def _(m, d):
    rope, T, _ = table(m, d)
    return rope[:T]


@check("1.1", "the first half of the pairs turns with the token's row")
def _(m, d):
    rope, T, quarter = table(m, d)
    return rope[T:, :quarter]


@check("1.1", "the second half of the pairs turns with the token's column")
def _(m, d):
    rope, T, quarter = table(m, d)
    return rope[T:, quarter:]


@check("1.1", "the pairs' speeds fall from 1 by powers of config.rope_base")
def _(m, d):
    rope, _, _ = table(m, d, rope_base=d.number(50, 500))
    return rope[-1]                              # the last token's row and column are the same


def rotary_inputs(d):
    positions, pairs = d.size(1, 6), d.size(1, 4)
    angle = d.normal(positions, pairs)
    return d.normal(d.size(1, 3), d.size(1, 2), positions, 2 * pairs), torch.stack(
        [angle.cos(), angle.sin()], dim=-1)


@check("1.2", "channels 2k and 2k + 1 turn together, by pair k's angle")
def _(m, d):
    return m.apply_rope(*rotary_inputs(d))


@check("1.2", "the gradient turns back: that of the result's sum, weighted from 0.5 to 1.5")
def _(m, d):
    x, rope = rotary_inputs(d)
    return with_gradients(lambda x: m.apply_rope(x, rope), x)[1]


@check("1.2", "where the table is zero, the result is zero")
def _(m, d):
    x, rope = rotary_inputs(d)
    return m.apply_rope(x, rope * 0)


@check("1.2", "the result has the type of x: bfloat16 stays bfloat16", tolerance=0.02)
def _(m, d):
    x, rope = rotary_inputs(d)
    y = m.apply_rope(x.bfloat16(), rope)
    return str(y.dtype), y.float()


def attention(m, d):
    """A random Attention, x (R, L, C) and a table of real rotations."""
    H, positions, B = d.size(1, 3), d.size(2, 6), d.size(1, 3)
    layer = m.Attention(SimpleNamespace(dim=8 * H, n_head=H))
    for parameter in layer.parameters():
        parameter.data = 0.4 * d.normal(*parameter.shape)
    angle = d.normal(positions, 4)
    rope = torch.stack([angle.cos(), angle.sin()], dim=-1)
    return layer, d.normal(B, positions, 8 * H), rope


def drawn_mask(d, B, rows, columns):
    """A mask (B, 1, rows, columns) in which every position sees itself."""
    sees = d.normal(B, 1, rows, columns) > 0
    return sees | torch.eye(columns, dtype=torch.bool)[-rows:]


@check("1.3", "without a mask each position sees itself and those before it, and no later one")
def _(m, d):
    layer, x, rope = attention(m, d)
    return layer(x, rope)[0]


@check("1.3", "with a mask each position sees exactly those where the mask is True")
def _(m, d):
    layer, x, rope = attention(m, d)
    return layer(x, rope, drawn_mask(d, len(x), x.shape[1], x.shape[1]))[0]


@check("1.3", "the keys (rotated) and the values are returned, for the cache")
def _(m, d):
    layer, x, rope = attention(m, d)
    keys, values = layer(x, rope)[1]
    return keys, values


@check("1.3", "the gradient reaches x and both matrices")
def _(m, d):
    layer, x, rope = attention(m, d)
    _, by_x = with_gradients(lambda x: layer(x, rope)[0], x)
    layer(x, rope)[0].square().sum().backward()
    return by_x, layer.wqkv.weight.grad, layer.wo.weight.grad


def decoded(m, d, mask=False):
    """The last position by decode_step, the cache, and what there was behind it: rubbish."""
    layer, x, rope = attention(m, d)
    last, room = x.shape[1] - 1, d.size(1, 4)
    with torch.no_grad():
        _, filled, values = layer.qkv(x, rope)
        cache = [torch.cat([f[:, :, :last], 9 * d.normal(*f.shape[:2], room + 1, 8)], dim=2)
                 for f in (filled, values)]
        sees = drawn_mask(d, len(x), 1, last + 1) if mask else None
        y = layer.decode_step(x[:, last:], rope[last:], cache, last, sees)
    return y, cache, last


@check("1.4", "decoding the last position gives what all positions at once give for it")
def _(m, d):
    return decoded(m, d)[0]


@check("1.4", "the new key and value are written into the cache, at their position")
def _(m, d):
    _, (keys, values), _ = decoded(m, d)
    return keys, values


@check("1.4", "nothing behind the new position is changed")
def _(m, d):
    _, (keys, values), last = decoded(m, d)
    return keys[:, :, last + 1:], values[:, :, last + 1:]


@check("1.4", "where the mask is False, a position is not seen")
def _(m, d):
    return decoded(m, d, mask=True)[0]


def branches(d):
    return d.normal(2 * d.size(1, 4), d.size(2, 9))


@check("1.5", "at scale 1 there is one branch alone, and nothing to mix")
def _(m, d):
    return m.guide(d.normal(d.size(1, 4), d.size(2, 9)), 1)


@check("1.5", "at scale 0 only the null branch, the second half of the rows, is left")
def _(m, d):
    return m.guide(branches(d), 0.0)


@check("1.5", "above 1 it goes beyond the prompted branch, away from the null branch")
def _(m, d):
    return m.guide(branches(d), d.number(1.5, 7))


@check("1.5", "the gradient reaches both branches, and further dimensions stay as they are")
def _(m, d):
    logits, scale = d.normal(2 * d.size(1, 3), d.size(1, 3), d.size(2, 5)), d.number(1.5, 4)
    return with_gradients(lambda x: m.guide(x, scale), logits)


def choices(d):
    return 2 * d.normal(d.size(1, 4), d.size(4, 12))


@check("1.6", "the top_k largest logits stay as they are, the others become -inf")
def _(m, d):
    logits = choices(d)
    return m.filter_logits(logits, top_k=d.size(1, 3)), m.filter_logits(logits, top_k=1)


@check("1.6", "more than V for top_k keeps all, and so do top_k 0 and top_p 1")
def _(m, d):
    logits = choices(d)
    return m.filter_logits(logits, top_k=99), m.filter_logits(logits)


@check("1.6", "the nucleus: the code that crosses top_p is kept, the next one is not")
def _(m, d):
    logits = choices(d)
    return [m.filter_logits(logits, top_p=p) for p in (d.number(0.3, 0.6), d.number(0.6, 0.95))]


@check("1.6", "the likeliest code stays, however small top_p is")
def _(m, d):
    return m.filter_logits(choices(d), top_p=1e-4)


@check("1.6", "the nucleus is that of the distribution after top_k")
def _(m, d):
    return m.filter_logits(choices(d), top_k=3, top_p=d.number(0.4, 0.9))


@check("1.6", "any number of leading dimensions, and the input is left as it was")
def _(m, d):
    logits = d.normal(2, d.size(1, 3), d.size(4, 9))
    filtered = m.filter_logits(logits, top_k=3, top_p=0.8)
    return filtered, logits


DRAWS = 20_000


def frequencies(drawn, V):
    """How often each of V codes comes up, or, of pairs (n, 2), each pair."""
    if drawn.ndim == 2:
        drawn = drawn[:, 0] * V + drawn[:, 1]
        V = V * V
    return torch.bincount(drawn, minlength=V).float() / len(drawn)


@check("1.7", "one code for each row: (B,) int64")
def _(m, d):
    logp = choices(d).log_softmax(-1)
    drawn = m.sample_inverse_cdf(logp, d.uniform(len(logp)))
    return str(list(drawn.shape)), str(drawn.dtype)


@check("1.7", "each code comes up with its probability", tolerance=0.02)
def _(m, d):
    logp = d.normal(d.size(2, 9)).log_softmax(-1)
    return frequencies(m.sample_inverse_cdf(logp.expand(DRAWS, -1), d.uniform(DRAWS)), len(logp))


@check("1.7", "the rows have distributions of their own, and are drawn independently",
       tolerance=0.02)
def _(m, d):
    logp = d.normal(2, 3).log_softmax(-1)
    drawn = m.sample_inverse_cdf(logp.repeat(DRAWS, 1), d.uniform(2 * DRAWS))
    return frequencies(drawn.view(-1, 2), 3)


@check("1.7", "codes of probability 0, -inf, are never drawn: not by 0, nor by the number below 1")
def _(m, d):
    logits = d.normal(50, d.size(3, 9))
    ends = torch.tensor([0.0, 1 - 2 ** -53], dtype=torch.float64)
    logits[:, [0, -1]] = -torch.inf
    drawn = m.sample_inverse_cdf(logits.log_softmax(-1).repeat(2, 1), ends.repeat_interleave(50))
    return (drawn == 0).any(), (drawn == logits.shape[1] - 1).any()


@check("1.7", "the numbers decide: the same ones draw the same codes, others draw others")
def _(m, d):
    logp, uniform = d.normal(60, d.size(4, 9)).log_softmax(-1), d.uniform(60)
    drawn = [m.sample_inverse_cdf(logp, u) for u in (uniform, uniform, 1 - uniform)]
    return torch.equal(drawn[0], drawn[1]), torch.equal(drawn[0], drawn[2])


@check("1.8", "greedy takes the likeliest code at every step, and its log-probability")
def _(m, d):
    model = transformer(m, d)
    return m.generate(model, d.codes(3, d.size(1, 3)), greedy=True)


@check("1.8", "guidance, temperature, top-k and top-p, in this order; captions with masks")
def _(m, d):
    model = transformer(m, d, **CAPTIONS)
    cond, mask = conditions(d, model, d.size(1, 3))
    how = dict(cfg_scale=d.number(1.5, 3), temperature=d.number(0.4, 0.7))
    return m.generate(model, cond, mask, greedy=True, top_k=4, top_p=d.number(0.5, 0.9), **how)


@check("1.8", "the images of a prompt are neighbours: P * G rows, prompt after prompt")
def _(m, d):
    model, G = transformer(m, d), d.size(2, 4)
    tokens, logp = m.generate(model, torch.arange(2), samples_per_prompt=G, greedy=True,
                              cfg_scale=2.0)
    return tokens, logp


@check("1.8", "codes are drawn with the probability that is returned", tolerance=0.02)
def _(m, d):
    model, cond = transformer(m, d, vocab_size=3), d.codes(3, 1)
    tokens, logp = m.generate(model, cond, samples_per_prompt=DRAWS, cfg_scale=1.5,
                              generator=d.generator())
    learner, _ = m.token_logp(model, tokens[:50], cond.expand(50), cfg_scale=1.5)
    return frequencies(tokens[:, :2], 3), frequencies(tokens[:, 2:], 3), logp[:50] - learner


@check("1.8", "the given prefix stands, with its log-probabilities")
def _(m, d):
    model, P = transformer(m, d), d.size(1, 3)
    prefix = d.codes(5, 2 * P, 2)
    return m.generate(model, d.codes(3, P), samples_per_prompt=2, prefix=prefix, greedy=True)


@check("1.8", "uniform, a number for each token that is drawn, takes the generator's place")
def _(m, d):
    model, P = transformer(m, d, vocab_size=50), d.size(2, 3)
    prefix, uniform = d.codes(5, 2 * P, 2), d.uniform(2 * P, 2)
    drawn = [m.generate(model, torch.arange(P), samples_per_prompt=2, prefix=prefix, uniform=u)[0]
             for u in (uniform, uniform, 1 - uniform)]
    return torch.equal(drawn[0], drawn[1]), torch.equal(drawn[0], drawn[2])


@check("1.8", "the generator decides what is drawn, and nothing has a gradient")
def _(m, d):
    model, seed = transformer(m, d), d.random.getrandbits(60)
    cond = torch.arange(3).repeat(4)
    drawn = [m.generate(model, cond, generator=torch.Generator().manual_seed(s))
             for s in (seed, seed, seed + 1)]
    return (torch.equal(drawn[0][0], drawn[1][0]), torch.equal(drawn[0][0], drawn[2][0]),
            drawn[0][1].requires_grad)
