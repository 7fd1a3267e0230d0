"""How much memory a run needs, and what saves some."""

import dataclasses
from contextlib import contextmanager

import torch
from torch.utils.checkpoint import checkpoint

import argrpo
from harness.processes import rank_and_size
from harness.speed import is_large


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


def memory_estimate(model, vq, settings):
    """Bytes that training will need, by part.

    The rollout's cache and the update's activations are never there at the same time: the smaller
    of them is left out."""
    c = model.config
    gpu = next(model.parameters()).is_cuda
    branches = 1 if settings.cfg_scale == 1 else 2
    half = 2 if gpu else 4                       # bytes of a number in the copies and in the cache
    parameters = sum(p.numel() for p in model.parameters())
    copied = parameters                          # in the sampler's copy: all, or the packed ones
    if not (gpu or settings.compile):
        copied = sum(m.weight.numel() for m in model.modules() if is_large(m))
    length = c.cls_token_num + c.block_size - 1
    prompts = settings.rollout_prompts or settings.prompts_per_step // rank_and_size()[1]
    rollout = prompts * settings.group_size * branches                                  # rows
    cache = rollout * length * 2 * c.n_layer * c.dim * half
    update = settings.micro_batch                                                       # rows
    if settings.logprob_cfg == "guided":
        update *= branches
    activations = update_memory(c, update, length, gpu, settings.checkpointing)
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


def update_memory(config, rows, length, gpu, checkpointing):
    """Bytes that the forward pass of the update keeps for the backward pass.

    Counted on this code in float32: 100 bytes per layer, token and channel, of which autocast
    halves about four fifths.  With checkpointing, all of that for one layer, and the inputs of the
    others.  Each logit is there in float32, with its log-softmax, its softmax and their gradients;
    of these there is a chunk at most."""
    inside = 60 if gpu else 100
    layers = inside * config.n_layer
    if checkpointing:
        layers = inside + 4 * config.n_layer
    logits = min(argrpo.CHUNK, rows * length * config.vocab_size)
    return rows * length * config.dim * layers + 24 * logits


def choose_micro_batch(model, vq, settings):
    """How many images the update takes at a time, where settings.micro_batch leaves it open.

    On a GPU as many as fit into its free memory.  On a CPU larger passes are no faster: there about
    a thousand tokens."""
    device = next(model.parameters()).device
    if device.type == "cpu":
        return max(1, 1024 // model.config.block_size)
    torch.cuda.empty_cache()                     # what T5 has left behind is free, too
    return fitting_micro_batch(model, vq, settings, torch.cuda.mem_get_info(device)[0])


def fitting_micro_batch(model, vq, settings, free):
    """The largest power of two, from 1 to 16, that leaves a fifth of the free bytes free.

    A larger micro-batch is hardly faster, and making the images needs memory as well."""
    for size in (16, 8, 4, 2):
        parts = memory_estimate(model, vq, dataclasses.replace(settings, micro_batch=size))
        needed = sum(parts.values()) - parts["weights"] - parts["tokenizer"]     # these are there
        if needed < 0.8 * free:
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
