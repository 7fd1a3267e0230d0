"""How fast is a rollout, where does a GRPO step spend its time, and how much memory does it need?

    python benchmarks/bench.py --device cpu --size toy --tokens 36   # seconds
    python benchmarks/bench.py --device cpu --out bench.json         # GPT-B, 16 images, 256 tokens
    python benchmarks/bench.py --device cuda --size GPT-XL --tokens 576 --prompts 8 --cfg-scale 2
    python benchmarks/bench.py --suite gpu --out DIR                 # all of a GPU, see gpu.py

On random weights, in one run and in turns, so that whatever else slows the machine down slows all
of them:

    generate    argrpo.py's sampler, which also returns the log-probabilities that GRPO needs, as
                the loop runs it: with packed weights on a CPU, and on a GPU in bfloat16, on a
                `frozen_copy` under autocast
    compiled    the same with its decoding step compiled, as --compile does; left out unless asked
                for
    full_mask   a plain eager sampler as LlamaGen has it: a prefill for every row, every step
                attends to all T + N - 1 slots of the cache through a mask, guidance doubles the
                batch, torch.multinomial; tokens only
    uncached    no cache: a pass over the whole prefix for every token.  Timed at a few evenly
                spread positions (the middles of equal parts of the image); their mean times N
                estimates the whole

They must draw the same tokens, greedily, before anything is timed.  Then a few steps of
`argrpo.train` itself.  Round 0 of everything warms up and does not count.
"""

import copy
import sys
from dataclasses import asdict, dataclass, replace
from math import isqrt
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch  # noqa: E402

import argrpo  # noqa: E402
import reward  # noqa: E402
import toy  # noqa: E402
from benchmarks import gpu, measuring, yardsticks  # noqa: E402
from harness.checkpoints import write_json  # noqa: E402
from harness.device import checkpoint_layers, frozen_copy, packed  # noqa: E402
from harness.options import one_line_errors, read_options  # noqa: E402
from harness.processes import pick_device  # noqa: E402
from vqgan import VQConfig, VQModel  # noqa: E402


@dataclass
class Options:
    device: str = ""                     # "cpu" or "cuda"; default: the GPU if there is one
    dtype: str = ""                      # of the samplers' weights, float32 or bfloat16; default:
                                         # bfloat16 on a GPU
    size: str = "GPT-B"                  # GPT-B, GPT-L, GPT-XL, GPT-XXL, GPT-3B, or toy
    tokens: int = 256                    # N, tokens per image: a square number
    prompts: int = 2                     # P, prompts per rollout
    group: int = 8                       # G, images per prompt
    cfg_scale: float = 1.0               # classifier-free guidance: 1 is none, all else doubles the
                                         # rows
    micro_batch: int = 4                 # images per pass of the update and of the tokenizer
    reward: str = "brightness"           # reward of the step, as in the training scripts
    repeats: int = 3                     # timed rounds; their median and minimum are reported
    compile: bool = False                # time the compiled decoding step, too, and use it in the
                                         # GRPO step
    checkpointing: bool = False          # of the GRPO step: compute the layers again in the
                                         # backward pass
    uncached_positions: int = 8          # positions at which sampling without a cache is timed
    skip_uncached: bool = False          # leave out sampling without a cache
    skip_step: bool = False              # leave out the GRPO step
    seed: int = 0                        # of weights and rollouts
    out: str = ""                        # JSON file for the figures; the suite's folder
    suite: str = ""                      # "gpu": all that is to be checked and measured on a GPU;
                                         # of the other options it takes --device and --size toy
    part: str = ""                       # of the suite: this part alone, in this process
    minutes: float = 10.0                # that the suite may take

    def __post_init__(self):
        if self.size not in [*argrpo.GPT_SIZES, "toy"]:
            raise ValueError(f"unknown --size {self.size!r}: "
                             f"there are {', '.join(argrpo.GPT_SIZES)} and toy")
        if self.suite not in ("", "gpu"):
            raise ValueError(f"unknown --suite {self.suite!r}: there is gpu")
        if self.suite and not self.out:
            raise ValueError("--suite gpu needs --out DIR, the folder of its table")
        if self.part and self.part not in gpu.parts_of(self.size):
            raise ValueError(f"unknown --part {self.part!r}: "
                             f"there are {', '.join(gpu.parts_of(self.size))}")
        if self.dtype not in ("", "float32", "bfloat16"):
            raise ValueError(f"--dtype must be float32 or bfloat16, not {self.dtype!r}")
        for name in ("tokens", "prompts", "group", "micro_batch", "repeats", "uncached_positions"):
            if (value := getattr(self, name)) < 1:
                raise ValueError(f"--{name.replace('_', '-')} must be at least 1, not {value}")
        if isqrt(self.tokens) ** 2 != self.tokens:
            raise ValueError("--tokens must be a square number such as 256 or 576, "
                             f"not {self.tokens}")
        if self.group < 2 and not self.skip_step:
            raise ValueError("a step compares the images of a group: --group must be at least 2, "
                             f"not {self.group}")
        self.uncached_positions = min(self.uncached_positions, self.tokens)


# ---------------------------------------------------------------------------------------------
# Measuring
# ---------------------------------------------------------------------------------------------

def check_samplers():
    """All must draw the same tokens, greedily: on the CPU, from weights large enough to tell."""
    model = measuring.random_model(replace(toy.CONFIGS["c2i"], block_size=36), std=0.2)
    labels = torch.arange(3)
    for cfg_scale in (1.0, 2.0):
        expected, _ = argrpo.generate(model, labels, samples_per_prompt=2, cfg_scale=cfg_scale,
                                      greedy=True)
        for sampler in (yardsticks.full_mask_sampler, yardsticks.uncached_sampler):
            tokens = sampler(model, labels, 2, cfg_scale, greedy=True)
            wrong = (tokens != expected).sum().item()
            if wrong:
                raise RuntimeError(
                    f"{sampler.__name__} and argrpo.generate must agree, but at guidance "
                    f"{cfg_scale:g} {wrong} of {expected.numel()} greedy tokens differ: "
                    "no figure would mean anything")


def bench_rollout(model, options, device):
    """{sampler: figures}, the rollout, from float32 weights.

    The yardsticks' weights are all in options.dtype."""
    dtype = getattr(torch, options.dtype)
    N, G, K = options.tokens, options.group, options.uncached_positions
    plain, frozen = copy.deepcopy(model).to(dtype), frozen_copy(model, dtype)
    labels = torch.arange(options.prompts, device=device) % model.config.num_classes
    middles = [(2 * j + 1) * N // (2 * K) for j in range(K)]             # of K equal parts

    def generate(model):
        with torch.autocast(device.type, torch.bfloat16, enabled=dtype != torch.float32):
            argrpo.generate(model, labels, samples_per_prompt=G, cfg_scale=options.cfg_scale)

    samplers = {"generate": lambda: generate(packed(frozen))}
    if options.compile:
        compiled = frozen_copy(model, dtype)
        compiled.decode_step = torch.compile(compiled.decode_step, dynamic=True)
        samplers["compiled"] = lambda: generate(compiled)
    samplers["full_mask"] = lambda: yardsticks.full_mask_sampler(
        plain, labels, G, options.cfg_scale)
    if not options.skip_uncached:
        samplers["uncached"] = lambda: yardsticks.uncached_sampler(
            plain, labels, G, options.cfg_scale, positions=middles)

    times, peak = {name: [] for name in samplers}, {}
    for _ in range(1 + options.repeats):
        for name, sampler in samplers.items():
            _, seconds, peak[name] = measuring.measured(device, sampler)
            if name == "uncached":
                seconds *= N / K
            times[name].append(seconds)
    figures = {name: measuring.summary(t) for name, t in times.items()}
    for name, f in figures.items():
        per_second = options.prompts * G / f["seconds"]
        f["tokens_per_s"] = per_second * N
        f["images_per_s"] = per_second
        f["peak_gb"] = peak[name]
    return figures


def bench_step(options, config, device, reward_fn):
    """{part: figures} of steps of `argrpo.train`, each with its share of the whole."""
    vq = VQModel(toy.VQ_CONFIG if options.size == "toy" else VQConfig())
    model = measuring.random_model(config, device)
    if options.checkpointing:
        checkpoint_layers(model)
    settings = argrpo.GRPOConfig(
        steps=1 + options.repeats, prompts_per_step=options.prompts, group_size=options.group,
        micro_batch=options.micro_batch, lr=1e-5, kl_beta=0.1, cfg_scale=options.cfg_scale)
    times = measuring.step_seconds(model, vq.to(device).requires_grad_(False), settings, reward_fn,
                         options.compile)
    figures = {part: measuring.summary(t) for part, t in times.items()}
    for f in figures.values():
        f["share"] = f["seconds"] / figures["step"]["seconds"]
    return figures


# ---------------------------------------------------------------------------------------------
# Telling
# ---------------------------------------------------------------------------------------------

def print_table(title, figures):
    """figures: {row: {column: number}}, all rows with the same columns."""
    columns = next(iter(figures.values()))
    print(f"\n{title:<12}" + "".join(f"{name:>14}" for name in columns))
    for row, numbers in figures.items():
        print(f"{row:<12}" + "".join(f"{value:>14.4g}" for value in numbers.values()), flush=True)


def read_command_line(argv):
    """The options, complete, their device, and the reward."""
    with one_line_errors():
        options = Options(**read_options(Options, argv, "bench.py", __doc__))
        device = pick_device(options.device)
        options.device = device.type
        options.dtype = options.dtype or ("bfloat16" if device.type == "cuda" else "float32")
        if options.suite and device.type == "cpu" and options.size != "toy" and not options.part:
            raise ValueError("--suite gpu: torch sees no GPU here, but --device cpu --size toy "
                             "rehearses it")
        reward_fn = reward.build_rewards(options.reward, device)
        if options.out and not options.suite:    # now, not when all is measured
            Path(options.out).parent.mkdir(parents=True, exist_ok=True)
    return options, device, reward_fn


def compare(rollout):
    """How much faster generate is than the others: {sampler: ratios}."""
    ratio = {}
    for name, f in rollout.items():
        if name != "generate":
            ratio[name] = {key: f[key] / rollout["generate"][key]
                           for key in ("seconds", "seconds_min")}
            print(f"generate is {ratio[name]['seconds']:.2f}x {name} "
                  f"({ratio[name]['seconds_min']:.2f}x by the fastest rounds)")
    return ratio


def main(argv=None):
    options, device, reward_fn = read_command_line(argv)
    if options.suite:
        return gpu.run_part(options) if options.part else gpu.run_suite(options)
    torch.manual_seed(options.seed)
    config = toy.CONFIGS["c2i"]
    if options.size != "toy":
        config = argrpo.GPTConfig(**argrpo.GPT_SIZES[options.size])
    config = replace(config, block_size=options.tokens)
    model = measuring.random_model(config, device)
    images, parameters = options.prompts * options.group, sum(p.numel() for p in model.parameters())
    rows = images if options.cfg_scale == 1 else 2 * images
    machine = measuring.describe_machine(device)
    print(f"{options.size}, {parameters / 1e6:.1f}M parameters in {options.dtype}, "
          f"{options.tokens} tokens per image, {options.prompts} prompts x {options.group} samples "
          f"= {images} images, {rows} rows with guidance {options.cfg_scale:g}")
    print(", ".join(f"{name} {value}" for name, value in machine.items()), flush=True)

    check_samplers()
    rollout = bench_rollout(model, options, device)
    print_table("rollout", rollout)
    result = {"options": asdict(options), "machine": machine, "parameters": parameters,
              "rollout": rollout, "ratio": compare(rollout)}
    if "uncached" in rollout:
        print(f"uncached is an estimate: the mean of {options.uncached_positions} evenly spread "
              f"positions, times {options.tokens}", flush=True)
    must_read = measuring.rollout_bytes(frozen_copy(model, getattr(torch, options.dtype)), rows)
    del model                                    # the step's memory is to be its own
    if not options.skip_step:
        result["step"], _, peak = measuring.measured(
            device, lambda: bench_step(options, config, device, reward_fn))
        result["step_peak_gb"] = peak
        print_table("step", result["step"])
        note = "" if device.type == "cuda" else ", of the whole benchmark"
        print(f"peak memory {peak:.2f} GB{note}", flush=True)

    copied = measuring.copy_bandwidth(device)                                    # bytes a second
    read = must_read / rollout["generate"]["seconds"]
    result["bandwidth"] = {"rollout_gb": must_read / 1e9, "copy_gb_per_s": copied / 1e9,
                           "share": read / copied}
    print(f"\ngenerate must read {must_read / 1e9:.1f} GB of weights and filled cache: "
          f"{read / 1e9:.1f} GB/s, {read / copied:.1%} of the {copied / 1e9:.0f} GB/s that a copy "
          "reads and writes")
    if options.out:
        write_json(Path(options.out), result)
    return result


if __name__ == "__main__":
    main()
