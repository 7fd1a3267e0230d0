"""What makes a rollout fast, and changes no more than rounding.

A rollout reads all weights of the model once for each token.  So its speed is that of reading them:
in bfloat16 on a GPU, and in the order that oneDNN reads them in on a CPU.
"""

import copy
import platform

import torch
import torch.nn as nn


def frozen_copy(model, dtype=None):
    """A copy for reading only: the reference pi_ref, and what draws the rollouts on a GPU.

    Its matrices are in dtype, by default bfloat16 on a GPU.  Autocast would round them to that for
    every product anyway: under it the copy computes the very same numbers, in half the memory."""
    frozen = copy.deepcopy(model).requires_grad_(False)
    if dtype is None:
        on_gpu = next(model.parameters()).is_cuda
        dtype = torch.bfloat16 if on_gpu else torch.float32
    for module in frozen.modules():
        if isinstance(module, nn.Linear):
            module.to(dtype)
    return frozen


@torch.no_grad()
def refresh(frozen, model):
    """Gives the copy the model's present weights."""
    for ours, theirs in zip(frozen.parameters(), model.parameters(), strict=True):
        ours.copy_(theirs)


class Sampler:
    """The `sampler` seam of `argrpo.train`: sampler(model) draws what the model draws, faster.

    Call it anew whenever the model's weights have changed.  It always answers with the same object:
    on a GPU with a copy of the model with bfloat16 matrices; with compile=True, on any device, with
    a copy whose decoding step is compiled; else with `packed(model)`."""

    def __init__(self, compile=False):
        self.compile = compile
        self.model = self.copy = None

    def __call__(self, model):
        if model is not self.model:
            self.model, self.copy = model, self.copy_of(model)
        elif self.copy is not model:
            self.bring_up_to_date()
        return self.copy

    def copy_of(self, model):
        if not (self.compile or next(model.parameters()).is_cuda):
            return packed(model)
        copied = frozen_copy(model)
        if self.compile:
            copied.decode_step = torch.compile(copied.decode_step, dynamic=True)
        return copied

    def bring_up_to_date(self):
        layers = [module for module in self.copy.modules() if isinstance(module, PackedLinear)]
        for layer in layers:                     # a packed twin shares all other weights
            layer.pack()
        if not layers:
            refresh(self.copy, self.model)


LARGE = 2 ** 18              # weights of a layer; fewer fit into a processor's cache in any order
ROWS = 32                    # for how many rows oneDNN packs: those of a typical decoding step


class PackedLinear(nn.Module):
    """A Linear layer for reading only, its weights in the order in which oneDNN reads them."""

    def __init__(self, linear):
        super().__init__()
        self.linear = linear
        self.pack()

    def pack(self):
        """Reads the layer's present weights."""
        self.packed = None                       # first, to make room
        weight = self.linear.weight.detach()
        self.packed = torch.ops.mkldnn._reorder_linear_weight(weight, ROWS)

    def forward(self, x):
        bias = self.linear.bias
        return torch.ops.mkldnn._linear_pointwise(x, self.packed, bias, "none", [], "")


def is_large(module):
    """Whether packing makes this layer faster: one of many float32 weights on an x86 CPU."""
    x86 = platform.machine() in ("x86_64", "AMD64") and torch.backends.mkldnn.is_available()
    if not x86 or not isinstance(module, nn.Linear) or module.weight.numel() < LARGE:
        return False
    return module.weight.device.type == "cpu" and module.weight.dtype == torch.float32


def packed(model):
    """A twin of the model that shares its parameters, but reads packed copies of the large ones.

    On an x86 CPU that makes products up to twice as fast, for as few rows as a decoding step has.
    The sums are the same but for rounding.  A model without large layers is its own twin."""
    if not any(is_large(module) for module in model.modules()):
        return model
    # For deepcopy, what the memo holds is copied already: the parameters and buffers themselves.
    shared = [*model.parameters(), *model.buffers()]
    twin = copy.deepcopy(model, {id(tensor): tensor for tensor in shared})
    for module in list(twin.modules()):
        for name, child in list(module.named_children()):
            if is_large(child):
                setattr(module, name, PackedLinear(child))
    return twin
