"""The building blocks of the transformer, one idea a test: argrpo.py, section 1.

A failure names the concept.  The numbers are worked out by hand or by a loop that is slow and
plain.  Shapes: B rows, T condition positions, N tokens, C channels, H heads.
"""

import math

import pytest
import torch
import torch.nn.functional as F
from conftest import same, tiny_condition, tiny_model

import argrpo
from argrpo import GPTConfig, RMSNorm, apply_rope, rope_table

BOTH = pytest.mark.parametrize("model_type", ["c2i", "t2i"])


# --- RMSNorm -----------------------------------------------------------------------------------

def test_rmsnorm_divides_by_the_root_of_the_mean_square():
    """(3, 4, 0, 0): the mean square is 25 / 4, its root 2.5.  See RMSNorm."""
    ours = RMSNorm(4, eps=0.0)(torch.tensor([[3.0, 4.0, 0.0, 0.0]]))
    same(ours, [[1.2, 1.6, 0.0, 0.0]], "RMSNorm is x / sqrt(mean(x^2)): a mean, not a sum")


def test_rmsnorm_does_not_centre():
    """Unlike LayerNorm: a constant vector stays constant."""
    ours = RMSNorm(4, eps=0.0)(torch.full((1, 4), 7.0))
    same(ours, [[1.0] * 4], "RMSNorm subtracts no mean")


def test_rmsnorm_treats_each_position_alone():
    x = torch.randn(2, 3, 4)
    together, norm = RMSNorm(4, 1e-5)(x), RMSNorm(4, 1e-5)
    alone = torch.cat([torch.cat([norm(x[i:i + 1, j:j + 1]) for j in range(3)], dim=1)
                       for i in range(2)])
    same(together, alone, "RMSNorm's mean is over the channels of one position, the last axis")


def test_rmsnorms_eps_is_added_to_the_mean_square():
    """x = 0.001 everywhere: 0.001 / sqrt(1e-6 + 3e-6) = 0.5."""
    ours = RMSNorm(2, eps=3e-6)(torch.full((1, 2), 1e-3))
    same(ours, [[0.5, 0.5]], "eps stands inside the root: x / sqrt(mean(x^2) + eps)")


def test_rmsnorm_multiplies_by_its_weight():
    norm = RMSNorm(2, eps=0.0)
    with torch.no_grad():
        norm.weight.copy_(torch.tensor([2.0, -3.0]))
    same(norm(torch.ones(1, 2)), [[2.0, -3.0]], "the learned weight scales each channel")


def test_rmsnorm_computes_in_float32():
    """300^2 is beyond float16's 65504."""
    norm = RMSNorm(4, eps=1e-5)
    ours = norm(torch.full((1, 4), 300.0, dtype=torch.float16))
    same(ours.float(), [[1.0] * 4], "squares overflow in half precision: go to float32 first")
    x = torch.randn(1, 64).bfloat16()
    with torch.no_grad():
        norm = RMSNorm(64, eps=1e-5)
        norm.weight.uniform_(0.5, 1.5)
        h = x.float()
        rounded = (h / (h.square().mean(-1, keepdim=True) + 1e-5).sqrt()).bfloat16()
        assert torch.equal(norm(x), rounded * norm.weight), (
            "RMSNorm casts back to x's type before it multiplies by its weight, as LlamaGen's")


# --- the rotary table --------------------------------------------------------------------------

ROPE = dict(dim=16, n_layer=1, n_head=2, block_size=9, rope_base=100.0)   # 3 x 3 tokens, 8 channels


def test_half_the_pairs_turn_with_the_row_and_half_with_the_column():
    """A head of 8 channels has 4 pairs: speeds 1 and 100^(-1/2) = 0.1 for the row, and the same two
    for the column.  See rope_table."""
    table = rope_table(GPTConfig(**ROPE))[1:]
    for i in range(9):
        row, column = i // 3, i % 3
        angle = torch.tensor([row, 0.1 * row, column, 0.1 * column])
        idea = f"token {i} is in row {row}, column {column}: angles row, row/10, column, column/10"
        same(table[i], torch.stack([angle.cos(), angle.sin()], dim=-1), idea)


def test_the_table_is_zero_at_the_condition_positions():
    """Cosine and sine both: that is no rotation."""
    t2i = GPTConfig(**ROPE, model_type="t2i", cls_token_num=4, caption_dim=6)
    table = rope_table(t2i)
    assert table.shape == (4 + 9, 4, 2), "one row for each of T + N positions"
    assert (table[:4] == 0).all(), "LlamaGen's table is zero at the T condition positions"
    assert (table[4:].square().sum(-1) - 1).abs().max() < 1e-6, "every token's pair is a rotation"


def test_rope_turns_neighbouring_channels():
    """A quarter turn takes (1, 2) to (-2, 1) and (3, 4) to (-4, 3).  See apply_rope."""
    quarter = torch.tensor([[[0.0, 1.0], [0.0, 1.0]]])               # cos, sin of two pairs
    x = torch.tensor([1.0, 2.0, 3.0, 4.0]).view(1, 1, 1, 4)
    same(apply_rope(x, quarter).flatten(), [-2.0, 1.0, -4.0, 3.0],
         "channels 0 and 1 are a pair, 2 and 3 the next; the turn is counterclockwise")


def test_turned_queries_and_keys_only_know_their_distance():
    """What rotary embedding is for: <R_i q, R_j k> depends on differences of rows and columns."""
    table = rope_table(GPTConfig(**ROPE))[1:]
    q, k = torch.randn(2, 1, 1, 1, 8)

    def product(i, j):
        return (apply_rope(q, table[i:i + 1]) * apply_rope(k, table[j:j + 1])).sum()
    same(product(4, 0), product(8, 4), "one row and one column apart, at two places")
    same(product(2, 1), product(8, 7), "one column apart, at two places")
    assert abs(product(4, 1) - product(2, 1)) > 1e-3, "a row apart is not a column apart"


def test_rope_keeps_the_type():
    x = torch.randn(1, 1, 9, 8).bfloat16()
    assert apply_rope(x, rope_table(GPTConfig(**ROPE))[1:]).dtype == torch.bfloat16


def test_queries_and_keys_are_turned_and_values_are_not():
    """See Attention.qkv.  wqkv gives queries, keys, values; each has H heads of C/H channels."""
    attention = argrpo.Attention(GPTConfig(**ROPE))
    x, rope = torch.randn(2, 9, 16), rope_table(GPTConfig(**ROPE))[1:]
    given = attention.wqkv(x).view(2, 9, 3, 2, 8).permute(2, 0, 3, 1, 4)     # q/k/v, B, H, N, C/H
    for ours, plain, name in zip(attention.qkv(x, rope), given, ("queries", "keys", "values")):
        right = plain if name == "values" else apply_rope(plain, rope)
        verb = "not turned" if name == "values" else "turned by the rotary table"
        same(ours, right, f"{name} are {verb}")


# --- attention ---------------------------------------------------------------------------------

def attention_by_hand(attention, x, rope, sees):
    """sees[b][i] is the list of positions that position i of row b looks at."""
    q, k, v = attention.qkv(x, rope)                                 # (B, H, positions, C/H)
    out = torch.zeros_like(q)
    for b in range(len(x)):
        for h in range(q.shape[1]):
            for i in range(x.shape[1]):
                j = sees[b][i]
                p = (q[b, h, i] @ k[b, h, j].T / math.sqrt(q.shape[-1])).softmax(-1)
                out[b, h, i] = p @ v[b, h, j]
    return attention.wo(torch.cat(list(out.unbind(1)), dim=-1))      # heads side by side


def test_attention_by_hand():
    """Where everybody sees everybody: softmax(q k / sqrt(C/H)) v, head by head, then wo."""
    attention = argrpo.Attention(GPTConfig(**ROPE))
    x, rope = 2 * torch.randn(2, 9, 16), rope_table(GPTConfig(**ROPE))[1:]
    ours, _ = attention(x, rope, torch.ones(2, 1, 9, 9, dtype=torch.bool))
    same(ours, attention_by_hand(attention, x, rope, [[list(range(9))] * 9] * 2),
         "attention is wo( softmax(q k / sqrt(C/H)) v ), head by head")


def test_attention_looks_back_and_at_itself():
    """Without a mask, over the positions up to one's own."""
    attention = argrpo.Attention(GPTConfig(**ROPE))
    x, rope = torch.randn(2, 9, 16), rope_table(GPTConfig(**ROPE))[:9]
    ours, _ = attention(x, rope)
    same(ours, attention_by_hand(attention, x, rope, [[list(range(i + 1)) for i in range(9)]] * 2),
         "without a mask attention is causal: position i sees 0 .. i")


def test_attention_obeys_its_mask():
    attention = argrpo.Attention(GPTConfig(**ROPE))
    x, rope = torch.randn(2, 9, 16), rope_table(GPTConfig(**ROPE))[:9]
    mask = torch.eye(9, dtype=torch.bool) | (torch.rand(2, 9, 9) < 0.5).tril()
    ours, _ = attention(x, rope, mask[:, None])
    sees = [[row.nonzero()[:, 0].tolist() for row in square] for square in mask]
    same(ours, attention_by_hand(attention, x, rope, sees),
         "position i sees exactly the j where mask[i, j] is True")


def test_a_decoded_position_is_the_last_of_all_at_once():
    """decode_step writes its key and value at its position, and attends to what is filled."""
    attention = argrpo.Attention(GPTConfig(**ROPE))
    x, rope = torch.randn(2, 9, 16), rope_table(GPTConfig(**ROPE))[1:]
    whole, (keys, values) = attention(x, rope)
    cache = [torch.full_like(keys, 1e3), torch.full_like(values, 1e3)]       # junk where not filled
    cache[0][:, :, :5], cache[1][:, :, :5] = keys[:, :, :5], values[:, :, :5]
    ours = attention.decode_step(x[:, 5:6], rope[5:6], cache, 5)
    same(cache[0][:, :, 5], keys[:, :, 5], "the new key goes to its own place in the cache")
    same(cache[1][:, :, 5], values[:, :, 5], "the new value goes to its own place in the cache")
    assert (cache[0][:, :, 6:] == 1e3).all(), "no other place of the cache is written"
    same(ours[:, 0], whole[:, 5], "it attends to places 0 .. 5, and to none that is not filled")


# --- the feed-forward and the block ------------------------------------------------------------

def test_swiglu_gates_with_silu():
    """w2( silu(w1 x) * w3 x ): w1 is the gate.  See FeedForward."""
    ffn = argrpo.FeedForward(GPTConfig(dim=16, n_layer=1, n_head=2, multiple_of=8))
    x = torch.randn(3, 16)
    gate = x @ ffn.w1.weight.T
    right = (gate * gate.sigmoid() * (x @ ffn.w3.weight.T)) @ ffn.w2.weight.T
    same(ffn(x), right, "SwiGLU is w2(silu(w1 x) * w3 x)")


@pytest.mark.parametrize("dim, multiple_of, width", [
    (16, 8, 48),                                 # 8/3 of 16 is 42.7: 42, and 48 is the next of 8
    (768, 256, 2048),                            # exactly 2048: not one more
    (3200, 256, 8704)])                          # 8533, and 34 * 256
def test_the_feed_forward_width_is_8_thirds_rounded_up(dim, multiple_of, width):
    with torch.device("meta"):
        ffn = argrpo.FeedForward(GPTConfig(dim=dim, n_layer=1, n_head=2, multiple_of=multiple_of))
    assert ffn.w1.out_features == ffn.w3.out_features == ffn.w2.in_features == width, (
        "int(8/3 of C), rounded up to the next multiple of multiple_of")


def test_a_block_adds_to_the_residual_stream():
    """h = x + attention(norm(x)), then h + ffn(norm(h)): pre-norm, with the second norm's own
    weight.  See Block."""
    config = GPTConfig(**ROPE)
    block, rope, x = argrpo.Block(config), rope_table(config)[1:], torch.randn(2, 9, 16)
    with torch.no_grad():
        block.attention_norm.weight.uniform_(0.5, 1.5)
        block.ffn_norm.weight.uniform_(0.5, 1.5)
        h = x + block.attention(block.attention_norm(x), rope)[0]
        right = h + block.feed_forward(block.ffn_norm(h))
        ours, (keys, values) = block(x, rope)
        same(ours, right, "x + attention(attention_norm(x)), then + feed_forward(ffn_norm(h))")
        cache = [F.pad(part[:, :, :8], (0, 0, 0, 1)) for part in (keys, values)]
        step = block.decode_step(x[:, 8:], rope[8:], cache, 8)
        same(step[:, 0], right[:, 8], "decoding adds the same two to the residual stream")


# --- the table in use -------------------------------------------------------------------------

@BOTH
def test_every_position_gets_its_own_row_of_the_table(model_type, monkeypatch):
    """The condition's come first, then token i's is T + i: in forward, in prefill and in decoding.
    See Transformer.hidden, prefill and decode_step."""
    model, (cond, mask) = tiny_model(model_type), tiny_condition(model_type)
    T, given, honest = model.config.cls_token_num, [], argrpo.Attention.qkv

    def qkv(self, x, rope):
        given.append(rope)
        return honest(self, x, rope)
    monkeypatch.setattr(argrpo.Attention, "qkv", qkv)
    model(torch.zeros(3, 16, dtype=torch.long), cond, mask)
    assert torch.equal(given[0], model.rope[:T + 15]), "forward: positions 0 .. T + N - 2"
    given.clear()
    _, cache = model.prefill(cond, mask)
    assert torch.equal(given[0], model.rope[:T]), "prefill: the T condition positions"
    for i in range(15):
        given.clear()
        model.decode_step(torch.zeros(3, dtype=torch.long), i, cache, mask)
        assert torch.equal(given[0], model.rope[T + i:T + i + 1]), f"token {i} is at place T + {i}"
