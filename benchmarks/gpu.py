"""All that is to be checked and measured on a GPU, in one command, planned for under ten minutes:

    python benchmarks/bench.py --suite gpu --out DIR
    python benchmarks/bench.py --suite gpu --out DIR --device cpu --size toy     # a rehearsal

It has not run on a GPU yet.  All on random weights:

    parity        a rollout of the GPU, in float32 and in bfloat16, against the CPU's
    mismatch      sampler against learner in bfloat16, at four scales of guidance
    kernels       decoding with and without cuDNN's attention: it plans anew for each length
    step-SIZE     a step of `argrpo.train` by its parts, with the sizes that `choose_sizes` takes:
                  its seconds, its memory against the estimate, its rollout's bytes against a copy's
    optimizer     a step of AdamW, plain and fused
    compile       the decoding step, plain and compiled

Each part is a process of its own: whatever happens to one, the others go on.  After each,
DIR/gpu.md and DIR/gpu.json hold what is known so far; DIR/PART.log holds what a part has printed.
"""

import copy
import json
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import torch

import argrpo
import reward
import toy
from benchmarks import measuring
from harness.checkpoints import write_json
from harness.device import (
    Sampler,
    allowed_mismatch,
    cache_memory,
    checkpoint_layers,
    choose_sizes,
    frozen_copy,
    memory_estimate,
    optimizer_of_device,
)
from harness.options import RunSettings
from vqgan import VQConfig, VQModel

SIZES = ("GPT-B", "GPT-L", "GPT-XL", "GPT-XXL")


def config_of(size, tokens=256, model_type="c2i"):
    if size == "toy":
        return toy.CONFIGS[model_type]
    shape = dict(argrpo.GPT_SIZES[size], block_size=tokens, model_type=model_type)
    return argrpo.GPTConfig(**shape, cls_token_num=120 if model_type == "t2i" else 1)


def condition(config, rows):
    """Labels, or captions of random features: the condition and its mask, on the CPU."""
    if config.model_type == "c2i":
        return torch.arange(rows) % config.num_classes, None
    T = config.cls_token_num
    mask = torch.arange(T) >= T - 1 - torch.arange(rows)[:, None]            # 1, 2, ... words
    return torch.randn(rows, T, config.caption_dim) * mask[..., None], mask


def plain_model(config, device="cpu"):
    """Random weights whose logits have a standard deviation of about 1."""
    return measuring.random_model(config, device, std=config.dim ** -0.5)


def in_bfloat16(device, dtype=torch.bfloat16):
    """As `argrpo.autocast` on a GPU, but on any device, and for float32 nothing."""
    return torch.autocast(device.type, torch.bfloat16, dtype == torch.bfloat16, cache_enabled=False)


def verdict(apart, dtype, scale):
    """Columns about differences of log-probabilities, and whether rounding explains their mean."""
    as_on = torch.device("cuda" if dtype == torch.bfloat16 else "cpu")
    mean, allowed = apart.mean().item(), allowed_mismatch(as_on, scale)
    return {"mean, nats": mean, "largest": apart.max().item(), "allowed mean": allowed,
            "ok": mean <= allowed}


# ---------------------------------------------------------------------------------------------
# The parts: each returns {title: rows}, a row {column: value}; the column "ok" is a verdict
# ---------------------------------------------------------------------------------------------

def parity(size, device, scale=2.0):
    """The log-probabilities, on this device, of tokens that the CPU drew, through the cache."""
    rows = []
    for task in ("c2i", "t2i"):
        config = config_of(size, 64, task)
        model, (cond, mask) = plain_model(config), condition(config, 3)
        how = dict(samples_per_prompt=2, cfg_scale=scale)
        tokens, right = argrpo.generate(model, cond, mask, **how)
        for dtype in (torch.float32, torch.bfloat16):
            drawer = frozen_copy(copy.deepcopy(model).to(device), dtype)
            there = None if mask is None else mask.to(device)
            with in_bfloat16(device, dtype):
                _, logp = argrpo.generate(drawer, cond.to(device), there, **how,
                                          prefix=tokens.to(device))
            apart = (logp.cpu() - right).abs()
            rows.append({"task": task, "precision": str(dtype)[6:], **verdict(apart, dtype, scale)})
    return {"rollout against the CPU's": rows}


class Float32Output(torch.nn.Linear):
    """A last layer that autocast leaves in float32."""

    def forward(self, x):
        with torch.autocast(x.device.type, enabled=False):
            return super().forward(x.float())


def mismatch(size, device):
    """The metric `mismatch` as training computes it on a GPU, and with a float32 last layer."""
    model = plain_model(config_of(size, 64), device)
    lean, labels = frozen_copy(model, torch.bfloat16), condition(model.config, 4)[0].to(device)
    float32 = copy.deepcopy(lean)
    float32.output, float32.output.__class__ = model.output, Float32Output
    rows = []
    for scale in (1.0, 2.0, 4.0, 7.5):
        for name, drawer in (("bfloat16", lean), ("float32", float32)):
            with torch.no_grad(), in_bfloat16(device):
                tokens, drawn = argrpo.generate(drawer, labels, cfg_scale=scale)
                logp, _ = argrpo.token_logp(drawer, tokens, labels, cfg_scale=scale)
            found = verdict((logp - drawn).abs(), torch.bfloat16, scale)
            rows.append({"guidance": scale, "last layer": name, **found})
    return {"sampler against learner": rows}


def rollouts(drawer, device, prompts=4, samples=8):
    """Seconds of three rollouts with guidance in bfloat16, and the last one's greedy tokens."""
    labels = condition(drawer.config, prompts)[0].to(device)
    how, seconds = dict(samples_per_prompt=samples, cfg_scale=2.0, greedy=True), {}
    with in_bfloat16(device):
        for name in ("first, s", "second, s", "third, s"):
            (tokens, _), seconds[name], _ = measuring.measured(
                device, lambda: argrpo.generate(drawer, labels, **how))
    return seconds, tokens


def kernels(size, device):
    """Ours comes first, so that it pays for what the first rollout of a process has to do."""
    ours = frozen_copy(plain_model(config_of(size), device), torch.bfloat16)
    torchs = copy.deepcopy(ours)
    torchs.__class__ = argrpo.Transformer
    return {"attention kernels of decoding": [
        {"kernels": name, **rollouts(drawer, device)[0]}
        for name, drawer in (("without cuDNN", ours), ("torch's choice", torchs))]}


def compiled(size, device):
    lean, rows = frozen_copy(plain_model(config_of(size), device), torch.bfloat16), []
    for name, compile in (("plain", False), ("compiled", True)):
        seconds, tokens = rollouts(Sampler(compile)(lean), device)
        if not compile:
            right = tokens
        same = (right == tokens).all(dim=1).float().mean().item()
        rows.append({"decoding step": name, **seconds, "images with the same tokens": same})
    return {"--compile": rows}


def optimizer(size, device):
    rows = []
    for name, make in (("plain", argrpo.make_optimizer), ("fused on a GPU", optimizer_of_device)):
        model = plain_model(config_of(size), device)
        adamw = make(model, argrpo.GRPOConfig())
        for p in model.parameters():
            p.grad = torch.ones_like(p)
        seconds = [measuring.measured(device, adamw.step)[1] for _ in range(6)]
        rows.append({"AdamW": name, "first, s": seconds[0], "best, s": min(seconds[1:])})
        del model, adamw
    return {"a step of the optimizer": rows}


def step(size, device):
    """The second of two steps with the paper's c2i settings: 4 prompts x 8 images, guidance 2."""
    config = config_of(size, 256 if size == "GPT-B" else 576)
    model = measuring.random_model(config, device)
    vq = VQModel(toy.VQ_CONFIG if size == "toy" else VQConfig()).to(device).requires_grad_(False)
    s = RunSettings(steps=2, prompts_per_step=4, group_size=8, lr=1e-5, kl_beta=0.1, cfg_scale=2.0,
                 micro_batch=None, rollout_prompts=None, checkpointing=size == "GPT-XXL")
    choose_sizes(model, vq, s)
    estimate = sum(memory_estimate(model, vq, s).values())
    rows, _ = cache_memory(model, s)                          # of a pass of the sampler
    passes = -(-s.prompts_per_step // s.rollout_prompts)
    must_read = passes * measuring.rollout_bytes(model, rows, 2 if device.type == "cuda" else 4)
    if s.checkpointing:
        checkpoint_layers(model)
    times = measuring.step_seconds(model, vq, s, reward.build_rewards("brightness", device))
    seconds = {part: both[1] for part, both in times.items()}
    peak = torch.cuda.max_memory_allocated(device) if device.type == "cuda" else None
    used = {"size": size, "tokens": config.block_size, "prompts a pass": s.rollout_prompts,
            "micro-batch": s.micro_batch, "estimate, GiB": estimate / 2 ** 30,
            "measured, GiB": None, "ok": None}
    if peak:                             # a fifth of what was free is left for what is not counted
        used |= {"measured, GiB": peak / 2 ** 30, "ok": peak <= estimate / 0.8}
    del model, vq
    copied, read = measuring.copy_bandwidth(device), must_read / seconds["rollout"]
    return {"seconds of a step": [{"size": size, **seconds}],
            "memory of a step": [used],
            "bandwidth of the rollout": [{
                "size": size, "rows": rows, "must read, GB": must_read / 1e9, "GB/s": read / 1e9,
                "a copy's GB/s": copied / 1e9, "share": read / copied}]}


def parts_of(size):
    """{name: function of the device}, in the order in which they run."""
    small, large = ("toy", "toy") if size == "toy" else ("GPT-B", "GPT-XL")
    sizes = ("toy",) if size == "toy" else SIZES
    return {"parity": partial(parity, small), "mismatch": partial(mismatch, small),
            "kernels": partial(kernels, small),
            **{f"step-{name}": partial(step, name) for name in sizes},
            "optimizer": partial(optimizer, large), "compile": partial(compiled, small)}


# ---------------------------------------------------------------------------------------------
# The suite
# ---------------------------------------------------------------------------------------------

def run_part(options):
    """Runs options.part in this process, and writes its tables to DIR/PART.json."""
    torch.manual_seed(options.seed)
    tables = parts_of(options.size)[options.part](torch.device(options.device))
    Path(options.out).mkdir(parents=True, exist_ok=True)
    write_json(Path(options.out) / f"{options.part}.json", tables)
    for title, rows in tables.items():
        print(f"{title}\n\n{markdown(rows)}\n")
    return tables


def process_of_part(options, name, limit):
    """Runs a part in a process of its own, for `limit` seconds at most: (status, tables)."""
    out = Path(options.out)
    command = [sys.executable, str(Path(__file__).with_name("bench.py")), "--suite", "gpu",
               "--part", name, "--out", str(out), "--size", options.size,
               "--device", options.device, "--seed", str(options.seed)]
    with open(out / f"{name}.log", "w") as log:
        try:
            done = subprocess.run(command, stdout=log, stderr=log, timeout=limit)
        except subprocess.TimeoutExpired:
            return f"ended after {limit:.0f} s", {}
    if done.returncode:
        last = (out / f"{name}.log").read_text().strip().splitlines()[-1:] or ["no message"]
        return f"failed with status {done.returncode}: {last[0]}", {}
    tables = json.loads((out / f"{name}.json").read_text())
    wrong = any(row.get("ok") is False for rows in tables.values() for row in rows)
    return "NOT OK" if wrong else "ok", tables


def run_suite(options, names=None, run=process_of_part):
    """Runs the parts, one after another, and keeps the tables up to date: {part: its result}."""
    out, began = Path(options.out), time.perf_counter()
    out.mkdir(parents=True, exist_ok=True)
    machine, results = measuring.describe_machine(torch.device(options.device)), {}
    for name in names or parts_of(options.size):
        start = time.perf_counter()
        left = 60 * options.minutes - (start - began)
        status, tables = "left out: no time left", {}
        if left > 0:
            status, tables = run(options, name, left)
        seconds = time.perf_counter() - start
        print(f"{name}: {status}, {seconds:.0f} s", flush=True)
        results[name] = {"status": status, "seconds": seconds, "tables": tables}
        write_json(out / "gpu.json", {"machine": machine, "parts": results})
        (out / "gpu.md").write_text(report(machine, results))
    print(f"look at {out}/gpu.md")
    return results


def report(machine, results):
    """The page in markdown: what became of the parts, and all tables, those of one title as one."""
    summary = [{"part": name, "status": r["status"], "seconds": r["seconds"]}
               for name, r in results.items()]
    tables = {}
    for result in results.values():
        for title, rows in result["tables"].items():
            tables.setdefault(title, []).extend(rows)
    head = ", ".join(f"{name} {value}" for name, value in machine.items())
    sections = [f"{title}\n\n{markdown(rows)}" for title, rows in tables.items()]
    return "\n\n".join([head, markdown(summary), *sections]) + "\n"


def markdown(rows):
    """A table of rows {column: value}, all with the same columns."""
    lines = [list(rows[0]), ["---"] * len(rows[0])]
    lines += [[cell(value) for value in row.values()] for row in rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def cell(value):
    if value is None or isinstance(value, bool):
        return {None: "", True: "yes", False: "NO"}[value]
    return f"{value:.4g}" if isinstance(value, float) else str(value)
