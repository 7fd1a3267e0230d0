"""What makes a run fast and fit into the memory, and changes no more than rounding.

A rollout reads all weights of the model once for each token.  So its speed is that of reading them:
in bfloat16 on a GPU, and in the order that oneDNN reads them in on a CPU.
Nothing here that is for a GPU has been measured on one.
"""

import copy
import dataclasses
import platform
import time
from contextlib import contextmanager
from math import ceil, hypot

import torch
import torch.nn as nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.checkpoint import checkpoint

import argrpo
from harness.processes import gather, rank_and_size

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


# ---------------------------------------------------------------------------------------------
# How much memory it needs
# ---------------------------------------------------------------------------------------------

CPU_CACHE = 2 ** 32          # bytes that keys and values may take on a CPU


def memory_estimate(model, vq, settings):
    """Bytes that training will need, by part.

    The rollout's cache and the update's activations are never there at the same time: the smaller
    of them is left out.  What the update's forward pass keeps was counted on this code in float32:
    100 bytes per layer, token and channel, of which autocast halves about four fifths.  With
    checkpointing, all of that for one layer, and the inputs of the others.  Each logit is there in
    float32, with its log-softmax, softmax and their gradients."""
    c, gpu = model.config, on_gpu(model)
    half = 2 if gpu else 4                       # bytes of a number in the copies
    parameters = sum(p.numel() for p in model.parameters())
    copied = parameters                          # in the sampler's copy: all, or the packed ones
    if not (gpu or settings.compile):
        copied = sum(m.weight.numel() for m in model.modules() if is_large(m))
    parts = {
        "weights": 4 * parameters,
        "gradients": 4 * parameters,
        "optimizer": 8 * parameters,
        "reference": half * parameters,
        "tokenizer": 4 * sum(p.numel() for p in vq.parameters()),
        "sampler's copy": half * copied,
        "autocast's copy": 2 * parameters if gpu else 0,
    }
    update = settings.micro_batch                                                       # rows
    if settings.cfg_scale != 1 and settings.logprob_cfg == "guided":
        update *= 2
    inside = 60 if gpu else 100
    layers = inside + 4 * c.n_layer if settings.checkpointing else inside * c.n_layer
    length = c.cls_token_num + c.block_size - 1
    activations = update * length * (c.dim * layers + 24 * c.vocab_size)
    rollout, cache = cache_memory(model, settings)
    if cache > activations:
        parts[f"KV cache, {rollout} rows"] = cache
    else:
        parts[f"activations, {update} rows"] = activations
    return parts


def prompts_of_process(settings):
    return settings.prompts_per_step // rank_and_size()[1]


def cache_memory(model, settings):
    """Rows of a pass of the sampler, and bytes of their keys and values."""
    c = model.config
    branches = 1 if settings.cfg_scale == 1 else 2
    prompts = settings.rollout_prompts or prompts_of_process(settings)
    rows = prompts * settings.group_size * branches
    positions = c.cls_token_num + c.block_size - 1
    return rows, rows * positions * 2 * c.n_layer * c.dim * (2 if on_gpu(model) else 4)


def choose_sizes(model, vq, settings):
    """Sets settings.rollout_prompts and settings.micro_batch where they are open, None, to the
    largest that fit: into a GPU's free memory, but for a fifth, which making the images needs; on a
    CPU into CPU_CACHE, and passes of the update of a thousand tokens, for larger are no faster.

    A pass of the sampler reads all weights at every token, whether for few rows or for many.  So
    the step's prompts are shared by as few passes as can be, and as equally.  A micro-batch is a
    power of two, and at most 16: a larger one is hardly faster.  All processes take the smallest
    number that one of them has chosen, for what is drawn depends on it."""
    gpu, free, own = on_gpu(model), None, prompts_of_process(settings)
    if gpu:
        torch.cuda.empty_cache()                 # what T5 has left behind is free, too
        free, _ = torch.cuda.mem_get_info(next(model.parameters()).device)
    if settings.rollout_prompts is None:
        sizes = [dict(rollout_prompts=ceil(own / passes), micro_batch=1)
                 for passes in range(1, own + 1)]
        chosen = first_that_fits(model, vq, settings, sizes, free)["rollout_prompts"]
        settings.rollout_prompts = min(gather(chosen))
    if settings.micro_batch is None:
        chosen = max(1, 1024 // model.config.block_size)
        if gpu:
            sizes = [dict(micro_batch=size) for size in (16, 8, 4, 2, 1)]
            chosen = first_that_fits(model, vq, settings, sizes, free)["micro_batch"]
        settings.micro_batch = min(gather(chosen))


def first_that_fits(model, vq, settings, sizes, free=None):
    """The first of the sizes, each {setting: number}, that fits into the free bytes, None on a CPU,
    or the last if none does."""
    for size in sizes:
        some = dataclasses.replace(settings, **size)
        if free is None:
            enough = cache_memory(model, some)[1] <= CPU_CACHE
        else:
            parts = memory_estimate(model, vq, some)
            there = parts["weights"] + parts["tokenizer"]
            enough = sum(parts.values()) - there < 0.8 * free
        if enough:
            break
    return size


def print_memory(parts):
    total = sum(parts.values())
    unit, name = (2 ** 30, "GiB") if total > 2 ** 30 else (2 ** 20, "MiB")
    text = ", ".join(f"{part} {size / unit:.1f}" for part, size in parts.items())
    print(f"memory, estimated: {total / unit:.1f} {name} ({text})", flush=True)


@contextmanager
def out_of_memory_advice(settings):
    """Turns the GPU's out-of-memory error into one that says which setting to lower."""
    try:
        yield
    except torch.cuda.OutOfMemoryError as error:
        prompts = settings.rollout_prompts or settings.prompts_per_step
        raise SystemExit(
            f"out of GPU memory: {str(error).splitlines()[0]}\n"
            f"lower --micro-batch (now {settings.micro_batch}) or add --checkpointing (the result "
            "stays the same); if it is the rollout that does not fit, lower --rollout-prompts "
            f"(now {prompts}), then --group-size (now {settings.group_size})") from error
