"""How much memory a run needs, and what saves some."""

import dataclasses
from contextlib import contextmanager
from math import ceil

import torch

from harness import processes
from harness.device import is_large, on_gpu

CPU_CACHE = 2 ** 32          # bytes that keys and values may take on a CPU


def memory_estimate(model, vq, settings):
    """Bytes that training will need, by part.

    The rollout's cache and the update's activations are never there at the same time: the smaller
    of them is left out."""
    c, gpu = model.config, on_gpu(model)
    half = 2 if gpu else 4                       # bytes of a number in the copies
    parameters = sum(p.numel() for p in model.parameters())
    copied = parameters                          # in the sampler's copy: all, or the packed ones
    if not (gpu or settings.compile):
        copied = sum(m.weight.numel() for m in model.modules() if is_large(m))
    update = settings.micro_batch                                                       # rows
    if settings.cfg_scale != 1 and settings.logprob_cfg == "guided":
        update *= 2
    length = c.cls_token_num + c.block_size - 1
    activations = update_memory(c, update, length, gpu, settings.checkpointing)
    rollout, cache = cache_memory(model, settings)
    parts = {
        "weights": 4 * parameters,
        "gradients": 4 * parameters,
        "optimizer": 8 * parameters,
        "reference": half * parameters,
        "tokenizer": 4 * sum(p.numel() for p in vq.parameters()),
        "sampler's copy": half * copied,
        "autocast's copy": 2 * parameters if gpu else 0,
    }
    if cache > activations:
        parts[f"KV cache, {rollout} rows"] = cache
    else:
        parts[f"activations, {update} rows"] = activations
    return parts


def prompts_of_process(settings):
    return settings.prompts_per_step // processes.rank_and_size()[1]


def cache_memory(model, settings):
    """Rows of a pass of the sampler, and bytes of their keys and values."""
    c = model.config
    branches = 1 if settings.cfg_scale == 1 else 2
    prompts = settings.rollout_prompts or prompts_of_process(settings)
    rows = prompts * settings.group_size * branches
    positions = c.cls_token_num + c.block_size - 1
    return rows, rows * positions * 2 * c.n_layer * c.dim * (2 if on_gpu(model) else 4)


def update_memory(config, rows, length, gpu, checkpointing):
    """Bytes that the forward pass of the update keeps for the backward pass.

    Counted on this code in float32: 100 bytes per layer, token and channel, of which autocast
    halves about four fifths.  With checkpointing, all of that for one layer, and the inputs of the
    others.  Each logit is there in float32, with its log-softmax, softmax and their gradients."""
    inside, n = 60 if gpu else 100, config.n_layer
    layers = inside + 4 * n if checkpointing else inside * n
    return rows * length * (config.dim * layers + 24 * config.vocab_size)


def choose_sizes(model, vq, settings):
    """Sets settings.micro_batch and settings.rollout_prompts where they are open, None: on a GPU
    to what fits into its free memory.

    On a CPU larger passes of the update are no faster than about a thousand tokens, and a pass of
    the sampler is as large as CPU_CACHE allows.  All processes take the smallest number that one
    of them has chosen, for what is drawn depends on it."""
    gpu, free = on_gpu(model), None
    if gpu:
        torch.cuda.empty_cache()                 # what T5 has left behind is free, too
        free, _ = torch.cuda.mem_get_info(next(model.parameters()).device)
    if settings.rollout_prompts is None:
        prompts = fitting_rollout_prompts(model, vq, settings, free)
        settings.rollout_prompts = min(processes.gather(prompts))
    if settings.micro_batch is None:
        size = max(1, 1024 // model.config.block_size)
        if gpu:
            size = fitting_micro_batch(model, vq, settings, free)
        settings.micro_batch = min(processes.gather(size))


def fits(model, vq, settings, free):
    """Whether a run leaves a fifth of the free bytes free: making the images needs some."""
    parts = memory_estimate(model, vq, settings)
    return sum(parts.values()) - parts["weights"] - parts["tokenizer"] < 0.8 * free  # 2 are there


def fitting_rollout_prompts(model, vq, settings, free=None):
    """The most prompts of a pass of the sampler that fit, of passes as equal as can be.

    A pass reads all weights at every token, whether for few rows or for many.  free is in bytes,
    None on a CPU."""
    own = prompts_of_process(settings)
    for passes in range(1, own + 1):
        prompts = ceil(own / passes)
        some = dataclasses.replace(settings, rollout_prompts=prompts, micro_batch=1)
        enough = cache_memory(model, some)[1] <= CPU_CACHE
        if free is not None:
            enough = fits(model, vq, some, free)
        if enough:
            return prompts
    return 1


def fitting_micro_batch(model, vq, settings, free):
    """The largest power of two, from 1 to 16, that fits into the free bytes.

    A larger micro-batch is hardly faster."""
    for size in (16, 8, 4, 2):
        if fits(model, vq, dataclasses.replace(settings, micro_batch=size), free):
            return size
    return 1


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
