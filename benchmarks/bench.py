"""How fast is a rollout, where does a GRPO step spend its time, and how much memory does it need?

    python benchmarks/bench.py --device cpu --size toy --tokens 36   # seconds
    python benchmarks/bench.py --device cpu --out bench.json         # GPT-B, 16 images, 256 tokens
    python benchmarks/bench.py --device cuda --size GPT-XL --tokens 576 --prompts 8 --cfg-scale 2
    python benchmarks/gpu.py --out DIR                               # all of a GPU

On random weights.  The part "rollout" times in turns, so that whatever else slows the machine down
slows all of them:

    generate    argrpo.py's sampler, which also returns the log-probabilities that GRPO needs, as
                the loop runs it: with packed weights on a CPU, and on a GPU in bfloat16, on a
                `frozen_copy` under autocast, without cuDNN's attention
    kernels     the same with cuDNN's attention, if torch prefers it; on a GPU alone
    compiled    the same with its decoding step compiled, as --compile does; left out unless asked
                for
    full_mask   a plain eager sampler as LlamaGen has it: a prefill for every row, every step
                attends to all T + N - 1 slots of the cache through a mask, guidance doubles the
                batch, torch.multinomial; tokens only

Greedily they all draw the same tokens (tests/test_bench.py).  The part "step" times a few
steps of `argrpo.train` itself.  Round 0 of everything warms up: it is "first", seconds is the
median of the others and seconds_min their minimum.  For a GPU there are the parts "parity"
and "mismatch" as well; the column "ok" is a verdict.  The part "counts" counts on the CPU what
takes time on a GPU: kernels of a token, waits for the GPU, passes of the transformer in a step, and
graphs of --compile.
"""

import copy
import json
import os
import platform
import sys
from dataclasses import asdict, dataclass, replace
from functools import partial
from math import isqrt
from pathlib import Path
from statistics import median
from unittest.mock import patch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch  # noqa: E402
from torch.overrides import TorchFunctionMode  # noqa: E402
from torch.utils._python_dispatch import TorchDispatchMode  # noqa: E402

import argrpo  # noqa: E402
import toy  # noqa: E402
from benchmarks.yardsticks import plain_sampler  # noqa: E402
from harness import device as speed  # noqa: E402
from harness.device import Stopwatch, measured  # noqa: E402
from harness.doctor import allowed_mismatch  # noqa: E402
from harness.logs import one_line_errors  # noqa: E402
from harness.options import RunSettings, read_options  # noqa: E402
from harness.processes import pick_device  # noqa: E402
from reward import build_rewards  # noqa: E402
from vqgan import VQConfig, VQModel  # noqa: E402


@dataclass
class Options:
    device: str = ""                     # cpu, cuda, mps, xpu, ..; default: cuda if there, else cpu
    size: str = "GPT-B"                  # GPT-B, GPT-L, GPT-XL, GPT-XXL, GPT-3B, or toy
    tokens: int = 256                    # N, tokens per image: a square number
    prompts: int = 2                     # P, prompts per rollout
    group: int = 8                       # G, images per prompt, at least 2
    cfg_scale: float = 1.0               # classifier-free guidance: 1 is none, all else doubles the
                                         # rows
    micro_batch: int = 4                 # images per pass of the update and of the tokenizer; 0 is
                                         # what training takes on this device
    repeats: int = 3                     # timed rounds; their median and minimum are reported
    compile: bool = False                # time the compiled decoding step, too, and use it in the
                                         # GRPO step
    parts: str = "rollout,step"          # what is measured
    out: str = ""                        # JSON file for the figures

    def __post_init__(self):
        if self.size not in [*argrpo.GPT_SIZES, "toy"]:
            raise ValueError(f"unknown --size {self.size!r}: "
                             f"there are {', '.join(argrpo.GPT_SIZES)} and toy")
        for part in self.parts.split(","):
            if part not in PARTS:
                raise ValueError(f"unknown part {part!r}: there are {', '.join(PARTS)}")
        least = dict(tokens=1, prompts=1, group=2, micro_batch=0, repeats=1)
        for name, smallest in least.items():
            if (value := getattr(self, name)) < smallest:
                raise ValueError(f"--{name.replace('_', '-')} must be at least {smallest}, "
                                 f"not {value}")
        if isqrt(self.tokens) ** 2 != self.tokens:
            raise ValueError("--tokens must be a square number such as 256 or 576, "
                             f"not {self.tokens}")


# ---------------------------------------------------------------------------------------------
# Random models, clocks, bytes
# ---------------------------------------------------------------------------------------------

def config_of(options, task="c2i"):
    if options.size == "toy":
        return replace(toy.CONFIGS[task], block_size=options.tokens)
    return argrpo.GPTConfig(**argrpo.GPT_SIZES[options.size], block_size=options.tokens,
                            model_type=task, cls_token_num=120 if task == "t2i" else 1)


def random_model(config, device="cpu"):
    """Random weights whose logits have a standard deviation of about 1."""
    with torch.device(device):
        model = argrpo.Transformer(config)
    for weight in model.parameters():
        if weight.ndim > 1:              # the output layer, too, which a new Transformer has at 0
            torch.nn.init.normal_(weight, std=config.dim ** -0.5)
    return model


def summary(times):
    return {"first": times[0], "seconds": median(times[1:]), "seconds_min": min(times[1:])}


# ---------------------------------------------------------------------------------------------
# The parts: each returns its tables, {title: {row: {column: value}}}
# ---------------------------------------------------------------------------------------------

def rollout(options, device):
    N, G = options.tokens, options.group
    model = random_model(config_of(options), device)
    labels = torch.arange(options.prompts, device=device) % model.config.num_classes

    def generate(drawer, cudnn=False):
        torch.backends.cuda.enable_cudnn_sdp(cudnn)
        with argrpo.autocast(device):
            argrpo.generate(drawer, labels, samples_per_prompt=G, cfg_scale=options.cfg_scale)

    plain = copy.deepcopy(model).to(speed.matrix_dtype(device))
    samplers = {"generate": partial(generate, speed.Sampler()(model)),
                "full_mask": partial(plain_sampler, plain, labels, G, options.cfg_scale)}
    if device.type == "cuda":
        samplers["kernels"] = partial(generate, speed.frozen_copy(model), cudnn=True)
    if options.compile:
        samplers["compiled"] = partial(generate, speed.Sampler(compile=True)(model))
    times, figures = {name: [] for name in samplers}, {}
    for _ in range(1 + options.repeats):
        for name, sampler in samplers.items():
            _, seconds, peak = measured(device, sampler)
            times[name].append(seconds)
            figures[name] = {"peak_gb": peak / 1e9}
    for name, f in figures.items():
        f |= summary(times[name])
        f["tokens_per_s"] = options.prompts * G * N / f["seconds"]
        f["ratio"] = f["seconds"] / figures["generate"]["seconds"]
    return {"rollout": figures}


def step(options, device):
    figures, sizes = few_steps(options, device)
    return {"step": figures, "memory": {options.size: sizes}}


def few_steps(options, device, model=None):
    """{part: figures} of steps of `argrpo.train`, and the sizes of its passes.

    "decode", making the images from the tokens, is measured once more and taken from "rollout"."""
    model = model or random_model(config_of(options), device)
    vq = VQModel(toy.VQ_CONFIG if options.size == "toy" else VQConfig())
    vq.to(device).requires_grad_(False)
    s = RunSettings(steps=1 + options.repeats, prompts_per_step=options.prompts, lr=1e-5,
                    kl_beta=0.1, group_size=options.group, micro_batch=options.micro_batch or None,
                    cfg_scale=options.cfg_scale, rollout_prompts=None, compile=options.compile)
    labels = torch.arange(options.prompts) % model.config.num_classes
    prompts = argrpo.Prompts([f"class {k}" for k in labels.tolist()], labels)
    speed.choose_sizes(model, vq, prompts, s)
    sizes = {"prompts a pass": s.rollout_prompts, "micro-batch": s.micro_batch}
    stopwatch = Stopwatch(model)
    steps = argrpo.train(
        model, speed.frozen_copy(model), vq, prompts,
        stopwatch.timed(build_rewards("brightness", device)), s,
        speed.optimizer_of_device(model, s), sampler=speed.Sampler(s.compile))
    times = {part: [] for part in ("rollout", "decode", "reward", "reference", "update", "step")}
    for _ in range(s.steps):
        stopwatch.start()
        made, _, peak = measured(device, partial(next, steps))
        seconds = stopwatch.seconds()
        again = partial(argrpo.to_images, vq, made.tokens, s.micro_batch)
        _, decode, _ = measured(device, again)
        seconds |= {"seconds_rollout": seconds["seconds_rollout"] - decode,
                    "seconds_decode": decode, "seconds_step": seconds["seconds"]}
        for part in times:
            times[part].append(seconds[f"seconds_{part}"])
    figures = {part: summary(t) for part, t in times.items()}
    for f in figures.values():
        f["share"] = f["seconds"] / figures["step"]["seconds"]
    return figures, sizes | {"peak_gb": peak / 1e9}                      # of the last step


def in_bfloat16(device, dtype=torch.bfloat16):
    """As `argrpo.autocast` on a GPU, but on any device, and for float32 nothing."""
    return torch.autocast(device.type, torch.bfloat16, dtype == torch.bfloat16, cache_enabled=False)


def verdict(apart, dtype, scale):
    """Columns about differences of log-probabilities, and whether rounding explains their mean."""
    mean, allowed = apart.mean().item(), allowed_mismatch(dtype != torch.float32, scale)
    return {"mean, nats": mean, "largest": apart.max().item(), "allowed mean": allowed,
            "ok": mean <= allowed}


def parity(options, device, scale=2.0):
    """The log-probabilities, on this device, of tokens that the CPU drew, through the cache."""
    rows, how = {}, dict(samples_per_prompt=2, cfg_scale=scale)
    for task in ("c2i", "t2i"):
        model, cond, mask = random_model(config_of(options, task)), torch.arange(3), None
        if task == "t2i":                        # random features of captions of 1, 2 and 3 words
            T = model.config.cls_token_num
            mask = torch.arange(T) >= T - 1 - cond[:, None]
            cond = torch.randn(3, T, model.config.caption_dim) * mask[..., None]
        tokens, right = argrpo.generate(model, cond, mask, **how)
        there = None if mask is None else mask.to(device)
        for dtype in (torch.float32, torch.bfloat16):
            drawer = speed.frozen_copy(copy.deepcopy(model).to(device), dtype)
            with in_bfloat16(device, dtype):
                _, logp = argrpo.generate(drawer, cond.to(device), there, **how,
                                          prefix=tokens.to(device))
            rows[f"{task}, {dtype}"] = verdict((logp.cpu() - right).abs(), dtype, scale)
    return {"rollout against the CPU's": rows}


def mismatch(options, device):
    """The metric `mismatch` as training computes it on a GPU."""
    drawer = speed.frozen_copy(random_model(config_of(options), device), torch.bfloat16)
    labels, rows = torch.arange(4, device=device), {}
    for scale in (1.0, 2.0, 4.0, 7.5):
        with torch.no_grad(), in_bfloat16(device):
            tokens, drawn = argrpo.generate(drawer, labels, cfg_scale=scale)
            logp, _ = argrpo.token_logp(drawer, tokens, labels, cfg_scale=scale)
        rows[f"guidance {scale}"] = verdict((logp - drawn).abs(), torch.bfloat16, scale)
    return {"sampler against learner": rows}


class Kernels(TorchDispatchMode):
    """Counts the operations that would each launch a kernel on a GPU: all but views."""
    count = 0

    def __torch_dispatch__(self, operation, types, args=(), how=None):
        self.count += not (operation.is_view or operation.name() == "aten::_unsafe_view")
        return operation(*args, **(how or {}))


class Waits(TorchFunctionMode):
    """Counts the numbers or lists of numbers that are asked of a tensor.  On a GPU each waits for
    it: for all but whole numbers, which are prompts' and stand in the CPU's memory."""
    count = 0

    def __torch_function__(self, function, types, args=(), how=None):
        if function in (torch.Tensor.item, torch.Tensor.tolist, torch.Tensor.__bool__):
            self.count += args[0].dtype != torch.int64
        return function(*args, **(how or {}))


def counts(options, device):
    """What holds on any machine.  The kernels are those of a sampler in bfloat16."""
    from torch._dynamo.utils import counters  # which takes seconds
    how = dict(samples_per_prompt=options.group, cfg_scale=options.cfg_scale)
    labels, kernels, passes = torch.arange(options.prompts), [], []
    for tokens in (9, 16):
        config = config_of(replace(options, tokens=tokens))
        narrow = replace(config, dim=4 * config.n_head, vocab_size=16)       # has as many kernels
        model = speed.frozen_copy(random_model(narrow), torch.bfloat16)
        with in_bfloat16(torch.device("cpu")), Kernels() as seen:
            argrpo.generate(model, labels, **how)
        kernels.append(seen.count)
    model = random_model(replace(toy.CONFIGS["c2i"], n_layer=1, block_size=options.tokens))
    hook = model.norm.register_forward_hook(lambda *given: passes.append(1))     # of copies, too
    with Waits() as waiting:
        few_steps(replace(options, size="toy", repeats=1), torch.device("cpu"), model)
    hook.remove()                                # a compiler would notice that the list grows
    counters.clear()
    with patch("torch.compile", partial(torch.compile, backend="eager")):
        argrpo.generate(speed.Sampler(compile=True)(model), labels, **how)
    figures = {"kernels a token": (kernels[1] - kernels[0]) // 7, "passes a step": len(passes) // 2,
               "waits a step": waiting.count // 2, "graphs": counters["stats"]["unique_graphs"]}
    return {"counts": {options.size: figures}}


PARTS = {"rollout": rollout, "step": step, "parity": parity, "mismatch": mismatch, "counts": counts}


def markdown(title, rows):
    """A table of {row: {column: value}}, all rows with the same columns."""
    cells = [[title, *next(iter(rows.values()))]]
    cells.append(["---"] * len(cells[0]))
    for name, row in rows.items():
        values = [f"{v:.4g}" if isinstance(v, float) else str(v) for v in row.values()]
        cells.append([name, *values])
    return "\n".join("| " + " | ".join(line) + " |" for line in cells)


def main(argv=None):
    with one_line_errors():
        options = Options(**read_options(Options, argv, "bench.py", __doc__))
        device = pick_device(options.device)
        if options.out:                          # now, not when all is measured
            Path(options.out).parent.mkdir(parents=True, exist_ok=True)
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.machine()
    result = {"options": asdict(options), "machine": {
        "torch": torch.__version__, "threads": torch.get_num_threads(), "cpus": os.cpu_count(),
        "device": name}}
    print(*(f"{key} {value}" for part in result.values() for key, value in part.items()), sep=", ")
    for part in options.parts.split(","):
        torch.manual_seed(0)
        tables = PARTS[part](options, device)
        result |= tables
        for title, rows in tables.items():
            print(f"\n{markdown(title, rows)}", flush=True)
    if options.out:
        Path(options.out).write_text(json.dumps(result, indent=2) + "\n", "utf-8")
    return result


if __name__ == "__main__":
    main()
