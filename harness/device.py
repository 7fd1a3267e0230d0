"""What makes a run fast and fit into the memory, and changes no more than rounding.

A rollout reads all weights of the model once for each token.  So its speed is that of reading them:
in bfloat16 on a GPU, and in the order that oneDNN reads them in on a CPU.  A GPU is here whatever
torch calls an accelerator.  Nothing that is for a GPU has been measured on one.
"""

import copy
import dataclasses
import gc
import platform
import sys
import time
from contextlib import contextmanager
from math import ceil

import torch
import torch.nn as nn
from torch.utils.checkpoint import checkpoint

import argrpo
from harness.processes import gather, rank_and_size

# ---------------------------------------------------------------------------------------------
# What a device computes in
# ---------------------------------------------------------------------------------------------

def on_gpu(model):
    return next(model.parameters()).device.type != "cpu"


def matrix_dtype(device):
    """What the transformer's matrices are multiplied in, as `argrpo.autocast` decides."""
    with argrpo.autocast(device):
        if torch.is_autocast_enabled(device.type):
            return torch.get_autocast_dtype(device.type)
    return torch.float32


def describe_dtype(device):
    """The line of a run's start that says what it computes in, and why."""
    line = f"matrix products in {str(matrix_dtype(device)).removeprefix('torch.')}"
    if device.type == "cuda" and matrix_dtype(device) == torch.float32:
        line += ": this GPU only emulates bfloat16, slowly, and float16 needs the loss scaled"
    return line


# ---------------------------------------------------------------------------------------------
# Copies that draw the rollouts
# ---------------------------------------------------------------------------------------------

def frozen_copy(model, dtype=None):
    """A copy for reading only: the reference pi_ref, and what draws the rollouts on a GPU.

    Its matrices are in dtype, by default `matrix_dtype`.  Autocast would round them to that for
    every product anyway: under it the copy computes the very same numbers, in half the memory."""
    frozen = copy.deepcopy(model).requires_grad_(False)
    dtype = dtype or matrix_dtype(model.output.weight.device)
    for module in frozen.modules():
        if isinstance(module, nn.Linear):
            module.weight = nn.Parameter(module.weight.to(dtype), requires_grad=False)
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
    on a GPU that computes in bfloat16 with a copy of the model with such matrices; with
    compile=True, on any device, with a copy whose decoding step is compiled; else with
    `packed(model)`."""

    def __init__(self, compile=False):
        self.compile = compile
        self.model = self.copy = None

    def __call__(self, model):
        if model is self.model:
            refresh(self.copy, model)
        elif self.compile or matrix_dtype(model.output.weight.device) != torch.float32:
            self.model, self.copy = model, frozen_copy(model)
            if self.compile:
                self.copy.decode_step = torch.compile(self.copy.decode_step, dynamic=True)
        else:
            self.model, self.copy = model, packed(model)
        return self.copy


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
    """The loop's AdamW, on a GPU with its fused kernel: one pass over the weights, and no further
    memory.  A run that is resumed keeps its checkpoint's kernel: every device has both."""
    optimizer = argrpo.make_optimizer(model, settings)
    for group in optimizer.param_groups:
        group["fused"] = on_gpu(model) or None
    return optimizer


# ---------------------------------------------------------------------------------------------
# How long it takes, and how much memory
# ---------------------------------------------------------------------------------------------

def clock(device):
    """Seconds, after the current device of this kind has finished its work."""
    torch.get_device_module(device).synchronize()
    return time.perf_counter()


def measured(device, run):
    """What run() returns, its seconds, and bytes: the most that were allocated on the GPU during
    it, else, on the CPU and where torch does not count them, the most this process has held so far,
    NaN where the system does not tell (Windows)."""
    module, start = torch.get_device_module(device), clock(device)
    counted = hasattr(module, "reset_peak_memory_stats")
    if counted:
        module.reset_peak_memory_stats(device)
    result = run()
    seconds = clock(device) - start
    if counted:
        return result, seconds, module.max_memory_allocated(device)
    try:
        import resource
    except ImportError:
        return result, seconds, float("nan")
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return result, seconds, peak if sys.platform == "darwin" else 1024 * peak


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


# ---------------------------------------------------------------------------------------------
# What fits into a GPU's memory
# ---------------------------------------------------------------------------------------------

SPARE = 2 ** 30              # bytes that a trial leaves free, for rewards and fragments
OUT_OF_MEMORY = "out of memory"      # of torch.OutOfMemoryError; Apple's is a plain RuntimeError


def choose_sizes(model, vq, prompts, settings):
    """Sets settings.rollout_prompts and settings.micro_batch where they are open, None.

    A CPU takes all prompts in one pass, and passes of the update of a thousand tokens, for larger
    are no faster.  A GPU tries a step, from all prompts and micro-batches of 16 on, and what runs
    out of memory is halved until it fits.  (A pass of the sampler reads all weights at every token,
    for few rows as for many; micro-batches above 16 are hardly faster.)  The model stays as it is.

    All processes take the smallest number that one of them has found, for what is drawn depends on
    it.  Raises torch.OutOfMemoryError if nothing is left to halve."""
    own = settings.prompts_per_step // rank_and_size()[1]
    sizes = {"rollout_prompts": own, "micro_batch": max(1, 1024 // model.config.block_size)}
    if on_gpu(model):
        sizes["micro_batch"] = 16
    sizes = {name: size for name, size in sizes.items() if getattr(settings, name) is None}
    one = dataclasses.replace(settings, steps=1, prompts_per_step=own, lr=0.0)
    while sizes and on_gpu(model):
        name, error = too_large(model, vq, prompts, dataclasses.replace(one, **sizes))
        gc.collect()                             # what has failed is let go of
        if name is None:
            break
        if sizes.get(name, 1) == 1:
            name = "micro_batch"                 # making the images goes by it, too
        if sizes.get(name, 1) == 1:
            raise torch.OutOfMemoryError(error)
        sizes[name] = ceil(sizes[name] / 2)
    for name, size in sizes.items():
        setattr(settings, name, min(gather(size)))


def too_large(model, vq, prompts, settings):
    """Tries a step with a learning rate of 0: (None, ""), or the setting by which the part goes
    that has run out of memory, and the error's text."""
    asked = []

    def reward_fn(images, texts):
        asked.append(len(texts))
        return torch.zeros(len(texts), device=images.device), {}

    try:
        spare = torch.empty(SPARE, dtype=torch.uint8, device=model.output.weight.device)
        optimizer = optimizer_of_device(model, settings)
        for p in model.parameters():             # the optimizer's state is there from step 2 on
            p.grad = torch.zeros_like(p)
        optimizer.step()
        next(argrpo.train(model, frozen_copy(model), vq, prompts, reward_fn, settings, optimizer,
                          sampler=Sampler()))
        del spare
        return None, ""
    except RuntimeError as error:
        if OUT_OF_MEMORY not in str(error):
            raise
        model.zero_grad()
        return "micro_batch" if asked else "rollout_prompts", str(error)


@contextmanager
def out_of_memory_advice(settings):
    """Turns the GPU's out-of-memory error into one that says which setting to lower."""
    try:
        yield
    except RuntimeError as error:
        if OUT_OF_MEMORY not in str(error):
            raise
        prompts = settings.rollout_prompts or settings.prompts_per_step
        raise SystemExit(
            f"out of GPU memory: {str(error).splitlines()[0]}\n"
            f"lower --micro-batch (now {settings.micro_batch}) or add --checkpointing (the result "
            "stays the same); if it is the rollout that does not fit, lower --rollout-prompts "
            f"(now {prompts}), then --group-size (now {settings.group_size})") from error
