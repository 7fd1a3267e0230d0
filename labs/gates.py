"""Lab 7's only new part: attention that looks at words, or can be taught to.

LlamaGen's rotary table is zero at the condition, cosine and sine.  `still` puts cosine 1 there, a
rotation by nothing: words have queries and keys like everything else.  `add_gates` gives each layer
and head a gate in the place of that cosine.  At 0 the model is the published one, bit for bit; at 1
it is `still`'s.
"""

import lab  # noqa: F401 (makes the repository importable)
import torch
import torch.nn as nn

import argrpo

# AdamW moves every parameter by about lr, and a gate, from 0 to 1, has a longer way than a weight:
SPEED = 20                                       # a gate is this many times its parameter


class GatedAttention(argrpo.Attention):
    def __init__(self, config):
        super().__init__(config)
        self.gate = nn.Parameter(torch.zeros(config.n_head))

    def qkv(self, x, rope):
        cos, sin = rope.unbind(-1)                                   # (positions, C/H/2)
        word = ((cos == 0) & (sin == 0)).all(-1, keepdim=True)       # zero: no place in the grid
        cos = cos + SPEED * self.gate[:, None, None] * word          # (H, positions, C/H/2)
        return super().qkv(x, torch.stack([cos, sin.expand_as(cos)], dim=-1))


def still(model):
    """Puts cosine 1 at the condition of a Transformer's rotary table.  Returns the model.

    The table is in no checkpoint: loading weights, before or after, leaves it as it is."""
    model.rope[:model.config.cls_token_num, :, 0] = 1                # (T + N, C/H/2, 2)
    return model


def add_gates(model):
    """Gives each layer and head of a published t2i Transformer its gate, closed.  Returns it."""
    for layer in model.layers:
        weights = layer.attention.state_dict()
        layer.attention = GatedAttention(model.config)
        layer.attention.load_state_dict(weights, strict=False)       # all but the gate
    return model


def gates_of(model):
    """The gates, a list of each layer's heads."""
    return [(SPEED * layer.attention.gate).tolist() for layer in model.layers]
