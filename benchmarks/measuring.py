"""What the benchmarks measure with: random models, clocks, steps of the loop, bytes."""

import os
import platform
import resource
import statistics
import sys

import torch

import argrpo
from harness.device import Sampler, Stopwatch, clock, frozen_copy, optimizer_of_device


def random_model(config, device="cpu", std=0.02):
    with torch.device(device):
        model = argrpo.Transformer(config)
    for weight in model.parameters():
        if weight.ndim > 1:              # the output layer, too, which a new Transformer has at 0
            torch.nn.init.normal_(weight, std=std)
    return model


def measured(device, run):
    """What run() returns, its seconds, and the peak memory in GB.

    The peak is, on a GPU, the most that was allocated meanwhile, beyond what was allocated before;
    on the CPU the most that this process has held so far."""
    gpu = device.type == "cuda"
    if gpu:
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
    start = clock(device)
    result = run()
    seconds = clock(device) - start
    if gpu:
        peak = torch.cuda.max_memory_allocated(device) - before
    else:
        unit = 1 if sys.platform == "darwin" else 1024
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
    return result, seconds, peak / 1e9


def timed(function, device, seconds):
    """The function, which now also appends the seconds of every call to the list."""
    def wrapper(*args):
        start = clock(device)
        result = function(*args)
        seconds.append(clock(device) - start)
        return result
    return wrapper


def summary(times):
    """Median and minimum of the seconds of all rounds but the first, which warms up."""
    return {"seconds": statistics.median(times[1:]), "seconds_min": min(times[1:])}


def step_seconds(model, vq, settings, reward_fn, compile=False):
    """{part: seconds, step by step} of settings.steps steps of `argrpo.train`.

    The tokenizer's part of a rollout is "decode", and "step" is the whole."""
    device = next(model.parameters()).device
    labels = torch.arange(settings.prompts_per_step) % model.config.num_classes
    prompts = argrpo.Prompts([f"class {k}" for k in labels.tolist()], labels)
    decoding = []                                # seconds, micro-batch by micro-batch
    vq.decode = timed(vq.decode, device, decoding)
    times = {part: [] for part in ("rollout", "decode", "reward", "reference", "update", "step")}
    stopwatch = Stopwatch(model)
    steps = argrpo.train(
        model, frozen_copy(model), vq, prompts, stopwatch.timed(reward_fn), settings,
        optimizer_of_device(model, settings), sampler=Sampler(compile))
    for _ in range(settings.steps):
        decoding.clear()
        stopwatch.start()
        next(steps)
        seconds = stopwatch.seconds()
        for part in ("rollout", "reward", "reference", "update"):
            times[part].append(seconds[f"seconds_{part}"])
        times["rollout"][-1] -= sum(decoding)
        times["decode"].append(sum(decoding))
        times["step"].append(seconds["seconds"])
    return times


def rollout_bytes(model, rows, size=None):
    """What a rollout has to read: all weights N times, but for the embedding tables, of which a
    step reads a few lines, and in each of the N - 1 decoding steps what is filled of the keys and
    values.  A number has `size` bytes, by default those of the model's weights."""
    c, size = model.config, size or model.output.weight.element_size()
    weights = sum(p.numel() for name, p in model.named_parameters() if "embedding" not in name)
    filled = sum(c.cls_token_num + i for i in range(1, c.block_size))    # positions, all steps
    return size * (c.block_size * weights + filled * rows * 2 * c.n_layer * c.dim)


def copy_bandwidth(device):
    """Bytes per second that copying a quarter of a GiB reads and writes, the best of five times:
    ten copies each on a GPU, one on a CPU."""
    copies = 10 if device.type == "cuda" else 1
    a = torch.zeros(2 ** 28, dtype=torch.uint8, device=device)
    b = torch.zeros_like(a)
    seconds = []
    for _ in range(5):
        seconds.append(measured(device, lambda: [b.copy_(a) for _ in range(copies)])[1])
    return 2 * copies * len(a) / min(seconds)


def describe_machine(device):
    name = f"{platform.machine()} CPU"
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
    return {"torch": torch.__version__, "threads": torch.get_num_threads(), "cpus": os.cpu_count(),
            "device": name}
