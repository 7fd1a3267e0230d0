"""How fast is a rollout, where does a GRPO step spend its time, and how much memory does it need?

    python benchmarks/bench.py --device cpu --size toy --tokens 36       # seconds
    python benchmarks/bench.py --device cpu --out bench.json             # GPT-B, 16 images of 256 tokens
    python benchmarks/bench.py --device cuda --size GPT-XL --tokens 576 --prompts 8 --cfg-scale 2 --out xl.json

On random weights, in one run and in turns, so that whatever else slows the machine down slows all of them:

    generate    argrpo.py's sampler, which also returns the log-probabilities that GRPO needs; in bfloat16 as the loop runs
                it on a GPU, on a `frozen_copy` under autocast
    compiled    the same with its decoding step compiled, as --compile does; left out unless asked for
    full_mask   a plain eager sampler as LlamaGen has it: a prefill for every row, every step attends to all T + N - 1
                slots of the cache through a mask, guidance doubles the batch, torch.multinomial; tokens only
    uncached    no cache: a pass over the whole prefix for every token.  Timed at a few evenly spread positions (the
                middles of equal parts of the image); their mean times N estimates the whole

They must draw the same tokens, greedily, before anything is timed.  Then a few steps of `argrpo.train` itself.
Round 0 of everything warms up and does not count.
"""

import copy
import os
import platform
import resource
import statistics
import sys
from dataclasses import asdict, dataclass, replace
from math import isqrt
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
os.environ.setdefault("TQDM_DISABLE", "1")       # the loop's bar would run through the tables

import torch  # noqa: E402
import torch.nn.functional as F  # noqa: E402

import argrpo  # noqa: E402
import experiment  # noqa: E402
import reward  # noqa: E402
import toy  # noqa: E402
from vqgan import VQConfig, VQModel  # noqa: E402


@dataclass
class Options:
    device: str = ""                     # "cpu" or "cuda"; default: the GPU if there is one
    dtype: str = ""                      # of the samplers' weights, float32 or bfloat16; default: bfloat16 on a GPU
    size: str = "GPT-B"                  # GPT-B, GPT-L, GPT-XL, GPT-XXL, GPT-3B, or toy
    tokens: int = 256                    # N, tokens per image: a square number
    prompts: int = 2                     # P, prompts per rollout
    group: int = 8                       # G, images per prompt
    cfg_scale: float = 1.0               # classifier-free guidance: 1 is none, all else doubles the rows
    micro_batch: int = 4                 # images per pass of the update and of painting
    reward: str = "brightness"           # reward of the step, as in the training scripts
    repeats: int = 3                     # timed rounds; their median and minimum are reported
    compile: bool = False                # time the compiled decoding step, too, and use it in the GRPO step
    checkpointing: bool = False          # of the GRPO step: compute the layers' insides again in the backward pass
    uncached_positions: int = 8          # positions at which sampling without a cache is timed
    skip_uncached: bool = False          # leave out sampling without a cache
    skip_step: bool = False              # leave out the GRPO step
    seed: int = 0                        # of weights and rollouts
    out: str = ""                        # JSON file for the figures

    def __post_init__(self):
        if self.size not in [*argrpo.GPT_SIZES, "toy"]:
            raise ValueError(f"unknown --size {self.size!r}: there are {', '.join(argrpo.GPT_SIZES)} and toy")
        if self.dtype not in ("", "float32", "bfloat16"):
            raise ValueError(f"--dtype must be float32 or bfloat16, not {self.dtype!r}")
        for name in ("tokens", "prompts", "group", "micro_batch", "repeats", "uncached_positions"):
            if getattr(self, name) < 1:
                raise ValueError(f"--{name.replace('_', '-')} must be at least 1, not {getattr(self, name)}")
        if isqrt(self.tokens) ** 2 != self.tokens:
            raise ValueError(f"--tokens must be a square number such as 256 or 576, not {self.tokens}")
        if self.group < 2 and not self.skip_step:
            raise ValueError(f"a step compares the images of a group: --group must be at least 2, not {self.group}")
        self.uncached_positions = min(self.uncached_positions, self.tokens)


# ---------------------------------------------------------------------------------------------
# The yardsticks.  Only the weights are argrpo.py's: when its code gets faster, these must not.
# ---------------------------------------------------------------------------------------------

def plain_forward(model, h, rope, attend):
    """The transformer, one plain operation after another: h (R, L, D) -> logits (R, V) behind the last position.

    attend(layer, q, k, v) does the attention; rope (L, D/H/2, 2) float32."""
    c, (cos, sin) = model.config, rope[:, None].unbind(-1)                          # (L, 1, D/H/2)

    def norm(x, weight):
        y = x.float()
        return (y * torch.rsqrt(y.pow(2).mean(-1, keepdim=True) + c.norm_eps)).type_as(x) * weight

    def rotate(x):                                                                  # (R, L, H, D/H)
        a, b = x.float().unflatten(-1, (-1, 2)).unbind(-1)
        return torch.stack([a * cos - b * sin, a * sin + b * cos], dim=-1).flatten(-2).type_as(x)

    for i, layer in enumerate(model.layers):
        attention, ffn = layer.attention, layer.feed_forward
        qkv = attention.wqkv(norm(h, layer.attention_norm.weight))                  # (R, L, 3 D)
        q, k, v = qkv.unflatten(-1, (3, c.n_head, -1)).unbind(2)                    # (R, L, H, D/H)
        y = attend(i, *(x.transpose(1, 2) for x in (rotate(q), rotate(k), v)))      # (R, H, L, D/H)
        h = h + attention.wo(y.transpose(1, 2).flatten(2))
        x = norm(h, layer.ffn_norm.weight)
        h = h + ffn.w2(F.silu(ffn.w1(x)) * ffn.w3(x))
    return model.output(norm(h[:, -1], model.norm.weight)).float()


def every_row(model, labels, samples, cfg_scale):
    """Labels (P,), `samples` times each, with the unconditional ones below them if there is guidance: (R,)."""
    labels = labels.repeat_interleave(samples)
    return labels if cfg_scale == 1 else torch.cat([labels, model.null_cond(labels)])


def choose(logits, cfg_scale, greedy):
    """Logits (R, V) -> one code per image (B,)."""
    if cfg_scale != 1:
        cond, null = logits.chunk(2)
        logits = null + cfg_scale * (cond - null)
    return logits.argmax(dim=-1) if greedy else torch.multinomial(logits.softmax(dim=-1), 1)[:, 0]


@torch.no_grad()
def full_mask_sampler(model, labels, samples=1, cfg_scale=1.0, greedy=False):
    """Labels (P,) -> tokens (P * samples, N), through a static cache that is always attended to as a whole."""
    c, cond = model.config, every_row(model, labels, samples, cfg_scale)            # (R,)
    h, rope, slots = model.cls_embedding(cond), argrpo.rope_table(c).to(cond.device), c.cls_token_num + c.block_size - 1
    cache = h.new_zeros(c.n_layer, 2, len(cond), c.n_head, slots, c.dim // c.n_head)
    causal = torch.ones(slots, slots, dtype=torch.bool, device=h.device).tril()
    position, tokens = torch.arange(c.cls_token_num, device=h.device), []

    def attend(layer, q, k, v):
        keys, values = cache[layer]                                                 # (R, H, slots, D/H)
        keys[:, :, position], values[:, :, position] = k, v
        return F.scaled_dot_product_attention(q, keys, values, attn_mask=mask)

    for _ in range(c.block_size):
        mask = causal[position]                                                     # (L, slots), for all layers
        tokens.append(choose(plain_forward(model, h, rope[position], attend), cfg_scale, greedy))
        h = model.tok_embeddings(tokens[-1].repeat(1 if cfg_scale == 1 else 2))[:, None]            # (R, 1, D)
        position = position[-1:] + 1
    return torch.stack(tokens, dim=1)


@torch.no_grad()
def uncached_sampler(model, labels, samples=1, cfg_scale=1.0, greedy=False, positions=None):
    """The same without a cache.  Of given positions alone it draws nothing of use, but takes as long for each."""
    c, cond = model.config, every_row(model, labels, samples, cfg_scale)            # (R,)
    rope, branches = argrpo.rope_table(c).to(cond.device), 1 if cfg_scale == 1 else 2
    tokens = torch.zeros(len(cond) // branches, c.block_size, dtype=torch.long, device=cond.device)
    for i in range(c.block_size) if positions is None else positions:
        h = torch.cat([model.cls_embedding(cond), model.tok_embeddings(tokens[:, :i].repeat(branches, 1))], dim=1)
        logits = plain_forward(model, h, rope[:h.shape[1]],                         # h (R, T + i, D)
                               lambda _, q, k, v: F.scaled_dot_product_attention(q, k, v, is_causal=True))
        tokens[:, i] = choose(logits, cfg_scale, greedy)
    return tokens


def check_samplers():
    """All three must draw the same tokens, greedily: in float32 on the CPU, from weights large enough to tell."""
    model, labels = random_model(replace(toy.CONFIGS["c2i"], block_size=36), std=0.2), torch.arange(3)
    for cfg_scale in (1.0, 2.0):
        expected, _ = argrpo.generate(model, labels, samples_per_prompt=2, cfg_scale=cfg_scale, greedy=True)
        for sampler in (full_mask_sampler, uncached_sampler):
            wrong = (sampler(model, labels, 2, cfg_scale, greedy=True) != expected).sum().item()
            if wrong:
                raise RuntimeError(f"{sampler.__name__} and argrpo.generate must agree, but at guidance {cfg_scale:g} "
                                   f"{wrong} of {expected.numel()} greedy tokens differ: no figure would mean anything")


# ---------------------------------------------------------------------------------------------
# Measuring
# ---------------------------------------------------------------------------------------------

def random_model(config, device="cpu", std=0.02):
    with torch.device(device):
        model = argrpo.Transformer(config)
    for weight in model.parameters():
        if weight.ndim > 1:                      # the output layer, too, which a new Transformer has at zero
            torch.nn.init.normal_(weight, std=std)
    return model


def measured(device, run):
    """What run() returns, its seconds, and the peak memory in GB: on a GPU the most that was allocated meanwhile, beyond
    what was allocated before, on the CPU the most that this process has held so far."""
    gpu = device.type == "cuda"
    if gpu:
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
    start = argrpo.clock(device)                 # waits for the GPU
    result = run()
    seconds = argrpo.clock(device) - start
    kib = 1 if sys.platform == "darwin" else 1024
    peak = torch.cuda.max_memory_allocated(device) - before if gpu else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * kib
    return result, seconds, peak / 1e9


def summary(times):
    """Median and minimum of the seconds of all rounds but the first, which warms up."""
    return {"seconds": statistics.median(times[1:]), "seconds_min": min(times[1:])}


def bench_rollout(model, options, device):
    """{sampler: figures}, the rollout, from float32 weights.  The yardsticks' are all in options.dtype."""
    dtype = getattr(torch, options.dtype)
    plain, frozen = copy.deepcopy(model).to(dtype), argrpo.frozen_copy(model, dtype)
    compiled = argrpo.frozen_copy(model, dtype) if options.compile else None
    if options.compile:
        compiled.decode = torch.compile(compiled.decode, dynamic=True)

    def generate(model):
        with torch.autocast(device.type, torch.bfloat16, enabled=dtype != torch.float32):
            argrpo.generate(model, labels, samples_per_prompt=G, cfg_scale=options.cfg_scale)

    N, G, K = options.tokens, options.group, options.uncached_positions
    labels = torch.arange(options.prompts, device=device) % model.config.num_classes
    positions = [(2 * j + 1) * N // (2 * K) for j in range(K)]                      # the middles of K equal parts
    samplers = {
        "generate": lambda: generate(frozen),
        "compiled": lambda: generate(compiled),
        "full_mask": lambda: full_mask_sampler(plain, labels, G, options.cfg_scale),
        "uncached": lambda: uncached_sampler(plain, labels, G, options.cfg_scale, positions=positions),
    }
    if not options.compile:
        del samplers["compiled"]
    if options.skip_uncached:
        del samplers["uncached"]
    times, peak = {name: [] for name in samplers}, {}
    for _ in range(1 + options.repeats):
        for name, sampler in samplers.items():
            _, seconds, peak[name] = measured(device, sampler)
            times[name].append(seconds * (N / K if name == "uncached" else 1))
    figures = {name: summary(t) for name, t in times.items()}
    for name, f in figures.items():
        per_second = options.prompts * G / f["seconds"]
        f |= {"tokens_per_s": per_second * N, "images_per_s": per_second, "peak_gb": peak[name]}
    return figures


def bench_step(options, config, device, reward_fn):
    """{part: figures} of steps of `argrpo.train`: the seconds in its metrics, with the reward apart from the decoding."""
    vq = VQModel(toy.VQ_CONFIG if options.size == "toy" else VQConfig()).to(device).requires_grad_(False)
    model = random_model(config, device)
    settings = argrpo.GRPOConfig(steps=1 + options.repeats, prompts_per_step=options.prompts, group_size=options.group,
                                 micro_batch=options.micro_batch, checkpointing=options.checkpointing, lr=1e-5, kl_beta=0.1,
                                 compile=options.compile, cfg_scale=options.cfg_scale)
    labels = torch.arange(options.prompts) % config.num_classes
    prompts = argrpo.Prompts([f"class {k}" for k in labels.tolist()], labels)
    rewarding = []                               # seconds, step by step

    def timed_reward(*args):
        start = argrpo.clock(device)
        result = reward_fn(*args)
        rewarding.append(argrpo.clock(device) - start)
        return result

    times = {part: [] for part in ("rollout", "decode", "reward", "reference", "update", "step")}   # the last is all
    optimizer, reference = argrpo.make_optimizer(model, settings), argrpo.frozen_copy(model)
    for m in argrpo.train(model, reference, vq, prompts, timed_reward, settings, optimizer):
        seconds = {"rollout": m["seconds_rollout"], "decode": m["seconds_reward"] - rewarding[-1], "reward": rewarding[-1],
                   "reference": m["seconds_reference"], "update": m["seconds_update"], "step": m["seconds"]}
        for part, t in times.items():
            t.append(seconds[part])
    figures = {part: summary(t) for part, t in times.items()}
    return {part: f | {"share": f["seconds"] / figures["step"]["seconds"]} for part, f in figures.items()}


def rollout_bytes(model, rows):
    """What a rollout has to read: all weights N times, but for the embedding tables, of which a step reads a few
    lines, and in each of the N - 1 decoding steps what is filled of the keys and values."""
    c, size = model.config, model.output.weight.element_size()
    weights = sum(p.numel() for name, p in model.named_parameters() if "embedding" not in name)
    filled = sum(c.cls_token_num + i for i in range(1, c.block_size))               # positions, all steps together
    return size * (c.block_size * weights + filled * rows * 2 * c.n_layer * c.dim)


def copy_bandwidth(device):
    """Bytes per second that copying a quarter of a GiB reads and writes, the best of five times ten."""
    a = torch.zeros(2 ** 28, dtype=torch.uint8, device=device)
    b = torch.zeros_like(a)
    return 2 * 10 * len(a) / min(measured(device, lambda: [b.copy_(a) for _ in range(10)])[1] for _ in range(5))


# ---------------------------------------------------------------------------------------------
# Telling
# ---------------------------------------------------------------------------------------------

def print_table(title, figures):
    """figures: {row: {column: number}}, all rows with the same columns."""
    for row, columns in figures.items():
        if title:
            print(f"\n{title:<12}" + "".join(f"{name:>14}" for name in columns))
            title = None
        print(f"{row:<12}" + "".join(f"{value:>14.4g}" for value in columns.values()), flush=True)


def main(argv=None):
    with experiment.one_line_errors():
        options = Options(**experiment.read_options(Options, argv, "bench.py", __doc__))
        device = experiment.pick_device(options.device)
        gpu = device.type == "cuda"
        options.device, options.dtype = device.type, options.dtype or ("bfloat16" if gpu else "float32")
        reward_fn = reward.build_rewards(options.reward, device)
        if options.out:                          # now, not when all is measured
            Path(options.out).parent.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(options.seed)
    config = toy.CONFIGS["c2i"] if options.size == "toy" else argrpo.GPTConfig(**argrpo.GPT_SIZES[options.size])
    config = replace(config, block_size=options.tokens)
    model = random_model(config, device)
    images, parameters = options.prompts * options.group, sum(p.numel() for p in model.parameters())
    rows = images if options.cfg_scale == 1 else 2 * images
    machine = {"torch": torch.__version__, "threads": torch.get_num_threads(), "cpus": os.cpu_count(),
               "device": torch.cuda.get_device_name(device) if gpu else f"{platform.machine()} CPU"}
    print(f"{options.size}, {parameters / 1e6:.1f}M parameters in {options.dtype}, {options.tokens} tokens per image, "
          f"{options.prompts} prompts x {options.group} samples = {images} images, {rows} rows with guidance "
          f"{options.cfg_scale:g}")
    print(", ".join(f"{name} {value}" for name, value in machine.items()), flush=True)

    check_samplers()
    rollout = bench_rollout(model, options, device)
    print_table("rollout", rollout)
    result = {"options": asdict(options), "machine": machine, "parameters": parameters, "rollout": rollout, "ratio": {}}
    for name, f in rollout.items():
        if name != "generate":
            median, fastest = (f[key] / rollout["generate"][key] for key in ("seconds", "seconds_min"))
            result["ratio"][name] = {"seconds": median, "seconds_min": fastest}
            print(f"generate is {median:.2f}x {name} ({fastest:.2f}x by the fastest rounds)")
    if "uncached" in rollout:
        print(f"uncached is an estimate: the mean of {options.uncached_positions} evenly spread positions, "
              f"times {options.tokens}", flush=True)
    must_read = rollout_bytes(argrpo.frozen_copy(model, getattr(torch, options.dtype)), rows)
    del model                                    # the step's memory is to be its own
    if not options.skip_step:
        result["step"], _, peak = measured(device, lambda: bench_step(options, config, device, reward_fn))
        result["step_peak_gb"] = peak
        print_table("step", result["step"])
        print(f"peak memory {peak:.2f} GB" + ("" if gpu else ", of the whole benchmark"), flush=True)

    copied, read = copy_bandwidth(device), must_read / rollout["generate"]["seconds"]                # bytes per second
    result["bandwidth"] = {"rollout_gb": must_read / 1e9, "copy_gb_per_s": copied / 1e9, "share": read / copied}
    print(f"\ngenerate must read {must_read / 1e9:.1f} GB of weights and filled cache: {read / 1e9:.1f} GB/s, "
          f"{read / copied:.1%} of the {copied / 1e9:.0f} GB/s that a copy reads and writes")
    if options.out:
        experiment.write_json(Path(options.out), result)
    return result


if __name__ == "__main__":
    main()
