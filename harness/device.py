"""What makes a run fast and fit into the memory, and changes no more than rounding.

A rollout reads all weights of the model once for each token.  So its speed is that of reading them:
in bfloat16 on a GPU, and in the order that oneDNN reads them in on a CPU.
Nothing here that is for a GPU has been measured on one.
"""

import copy
import platform
import time
from math import hypot

import torch
import torch.nn as nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.checkpoint import checkpoint

import argrpo

# For decoding steps on a GPU.  Recent versions of torch prefer cuDNN's attention on H100 and H200,
# and it makes a new plan for every number of keys: decoding has one more at each step.
DECODING_KERNELS = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]


# ---------------------------------------------------------------------------------------------
# Copies that draw the rollouts
# ---------------------------------------------------------------------------------------------

def on_gpu(model):
    return next(model.parameters()).is_cuda


class DecodesWithoutCudnn(argrpo.Transformer):
    """A transformer whose decoding steps leave out cuDNN's attention.  All else may use it."""

    def decode_step(self, *args):
        with sdpa_kernel(DECODING_KERNELS):
            return super().decode_step(*args)


def frozen_copy(model, dtype=None):
    """A copy for reading only: the reference pi_ref, and what draws the rollouts on a GPU.

    Its matrices are in dtype, by default bfloat16 on a GPU.  Autocast would round them to that for
    every product anyway: under it the copy computes the very same numbers, in half the memory.
    On a GPU its decoding steps choose among DECODING_KERNELS."""
    frozen = copy.deepcopy(model).requires_grad_(False)
    dtype = dtype or (torch.bfloat16 if on_gpu(model) else torch.float32)
    for module in frozen.modules():
        if isinstance(module, nn.Linear):
            module.to(dtype)
    if on_gpu(model):
        frozen.__class__ = DecodesWithoutCudnn   # not a method: a copy would call this one's layers
    return frozen


@torch.no_grad()
def refresh(copied, model):
    """Gives the copy the model's present weights, as far as they do not share them."""
    for ours, theirs in zip(copied.parameters(), model.parameters(), strict=True):
        if ours is not theirs:
            ours.copy_(theirs)
    for module in copied.modules():
        if isinstance(module, PackedLinear):
            module.pack()


class Sampler:
    """The `sampler` seam of `argrpo.train`: sampler(model) draws what the model draws, faster.

    Call it anew whenever the model's weights have changed.  It always answers with the same object:
    on a GPU with a copy of the model with bfloat16 matrices; with compile=True, on any device, with
    a copy whose decoding step is compiled; else with `packed(model)`."""

    def __init__(self, compile=False):
        self.compile = compile
        self.model = self.copy = None

    def __call__(self, model):
        if model is self.model:
            refresh(self.copy, model)
        elif self.compile or on_gpu(model):
            self.model, self.copy = model, frozen_copy(model)
            if self.compile:
                self.copy.decode_step = torch.compile(self.copy.decode_step, dynamic=True)
        else:
            self.model, self.copy = model, packed(model)
        return self.copy


def allowed_mismatch(device, cfg_scale):
    """Nats a token, on average, by which sampler and learner may differ from rounding alone.

    Both branches of guidance round on their own, so the error of s * cond - (s - 1) * null is
    sqrt(s^2 + (s - 1)^2) times that of one.  docs/speed.md has what was measured."""
    return (0.05 if device.type == "cuda" else 1e-3) * hypot(cfg_scale, cfg_scale - 1)


# ---------------------------------------------------------------------------------------------
# The order in which a CPU reads weights
# ---------------------------------------------------------------------------------------------

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
        self.packed = torch.ops.mkldnn._reorder_linear_weight(self.linear.weight.detach(), ROWS)

    def forward(self, x):
        return torch.ops.mkldnn._linear_pointwise(
            x, self.packed, self.linear.bias, "none", [], "")


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


# ---------------------------------------------------------------------------------------------
# The update: layers that are computed again, the optimizer
# ---------------------------------------------------------------------------------------------

class CheckpointedBlock(argrpo.Block):
    """A layer that keeps nothing but its input for the backward pass, which computes it again."""

    def forward(self, *args):
        if not torch.is_grad_enabled():          # there is no backward pass, as in a rollout
            return super().forward(*args)
        return checkpoint(super().forward, *args, use_reentrant=False)


def checkpoint_layers(model):
    """Saves memory in the backward pass of the model, for about a third more time.

    A layer gets another class, not another method: so a copy of the model calls its own layers."""
    for layer in model.layers:
        layer.__class__ = CheckpointedBlock


def optimizer_of_device(model, settings):
    """The loop's AdamW, on a GPU with its fused kernel: one pass over the weights.

    A checkpoint holds which kernel wrote it.  Here the device decides, whatever a checkpoint says:
    a run may change its device when it is resumed."""
    optimizer, fused = argrpo.make_optimizer(model, settings), on_gpu(model) or None

    def keep_kernel(optimizer, state):
        groups = [group | {"fused": fused} for group in state["param_groups"]]
        return state | {"param_groups": groups}

    for group in optimizer.param_groups:
        group["fused"] = fused
    optimizer.register_load_state_dict_pre_hook(keep_kernel)
    return optimizer


# ---------------------------------------------------------------------------------------------
# How long it takes
# ---------------------------------------------------------------------------------------------

def clock(device):
    """Seconds, after the GPU has finished its work."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


class Stopwatch:
    """Seconds of every step.

    Pass stopwatch.timed(reward_fn) to `argrpo.train`, and wrap the making of each step:

        stopwatch.start()
        step = next(steps)
        step.metrics | stopwatch.seconds()

    The rollout lasts until the reward is asked, and includes making the images.  The update begins
    with the model's first pass that has a gradient.  Between reward and update stands the
    reference."""

    def __init__(self, model):
        self.device = next(model.parameters()).device
        self.times = {}                          # when each part of the step began
        model.layers[0].register_forward_pre_hook(self.note_pass)

    def begin(self, part):
        self.times[part] = clock(self.device)

    def note_pass(self, layer, given):
        if torch.is_grad_enabled() and "update" not in self.times:
            self.begin("update")

    def timed(self, reward_fn):
        """The reward function, which also tells the stopwatch when it is asked and answers."""
        def ask(images, texts):
            self.begin("reward")
            answer = reward_fn(images, texts)
            self.begin("reference")
            return answer
        return ask

    def start(self):
        self.times = {}
        self.begin("rollout")

    def seconds(self):
        """{"seconds": of the step that now ends, "seconds_rollout": ..., and of its other parts}"""
        self.begin("end")
        order, t = ("rollout", "reward", "reference", "update", "end"), self.times
        parts = {f"seconds_{a}": t[b] - t[a] for a, b in zip(order, order[1:])}
        return {"seconds": t["end"] - t["rollout"]} | parts
