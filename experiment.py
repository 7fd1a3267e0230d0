"""What surrounds the method in a run: options, evaluation, checkpoints, pictures.

A training script chooses models, prompts and rewards, and calls `run` here, which

    evaluates the model -> trains it with `argrpo.train` -> evaluates it again

and leaves in the run's folder: config.json, metrics.jsonl, summary.json, before_after.png,
curves.png, last.pt (for --resume) and model.pt (the result, in LlamaGen's format).
"""

import argparse
import dataclasses
import difflib
import inspect
import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import time
import typing
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

import torch

import argrpo
import captions
import pretrained
import reward
import toy
from rehearsal import Rehearsal


# ---------------------------------------------------------------------------------------------
# Options: a dataclass with one comment per field
# ---------------------------------------------------------------------------------------------

@dataclass
class Settings(argrpo.GRPOConfig):
    """The options of a training script: the loop's, and these."""
    preset: str = ""                     # models and settings to start from, see the list below
    reward: str = ""                     # "name:weight,..." or "my_file.py:function": what to maximise
    out: str = ""                        # folder of the run; default runs/<script>-<preset>
    resume: str = ""                     # folder of a run to continue
    device: str = ""                     # "cpu" or "cuda"; default: the GPU if there is one
    gpt_ckpt: str = ""                   # transformer weights of your own: a file, a folder, or a Hugging Face repo or repo:file
    vq_ckpt: str = ""                    # tokenizer weights, likewise
    from_scratch: bool = False           # toy: pretrain the models first (minutes) instead of using weights/
    rehearsal: float = 0.0               # weight of the likelihood of what the pretrained model gets right (rehearsal.py)
    rehearsal_groups: int = 1            # groups of images that the pretrained model draws for that, once for each prompt
    recipe: str = "paper"                # "paper", or "diverse", which keeps the pictures of a prompt varied
    bonus_distance: str = "pixels"       # what the diversity bonus compares: "pixels", "codes", or "clip" features
    eval_images: int = 540               # images of the evaluation before and after; whole prompts
    eval_cfg_scales: str = ""            # guidance scales, such as 1,7.5, to evaluate at besides the rollout's
    save_every: int = 20                 # steps between two checkpoints

    def __post_init__(self):
        super().__post_init__()
        if self.save_every < 1 or self.eval_images < 4 or self.rehearsal_groups < 1:
            raise ValueError(f"save_every and rehearsal_groups must be at least 1 and eval_images at least 4, "
                             f"not {self.save_every}, {self.rehearsal_groups} and {self.eval_images}")
        if not 0 <= self.rehearsal < float("inf"):
            raise ValueError(f"rehearsal must be a finite number of at least 0, not {self.rehearsal}")
        if self.bonus_distance not in ("pixels", "codes", "clip"):
            raise ValueError(f"bonus_distance must be pixels, codes or clip, not {self.bonus_distance!r}")
        self.other_cfg_scales()

    def other_cfg_scales(self):
        """The guidance scales of eval_cfg_scales but the rollout's.  Raises ValueError for what is no number >= 0."""
        try:
            scales = [float(text) for text in self.eval_cfg_scales.split(",") if text.strip()]
        except ValueError:
            scales = [-1.0]
        if not all(0 <= scale < float("inf") for scale in scales):
            raise ValueError(f"eval_cfg_scales must be numbers of at least 0 such as 1,7.5, not {self.eval_cfg_scales!r}")
        return [scale for scale in scales if scale != self.cfg_scale]


def field_comments(cls):
    """{field: the comment behind it}, for a dataclass and those it extends."""
    comments = {}
    for base in reversed(cls.__mro__):
        if dataclasses.is_dataclass(base):
            comments |= dict(re.findall(r"^    (\w+): .*?  # (.*)$", inspect.getsource(base), re.MULTILINE))
    return comments


def read_options(cls, argv, prog, description, epilog=""):
    """The options given on the command line, {field: value}, for the fields of the dataclass `cls`."""
    parser = argparse.ArgumentParser(prog=prog, description=description, epilog=epilog, allow_abbrev=False,
                                     argument_default=argparse.SUPPRESS, formatter_class=argparse.RawDescriptionHelpFormatter)
    comments = field_comments(cls)
    for field in dataclasses.fields(cls):
        kind = field.type if isinstance(field.type, type) else typing.get_args(field.type)[0]      # float | None -> float
        how = dict(action=argparse.BooleanOptionalAction) if kind is bool else dict(type=kind, metavar=kind.__name__)
        default = "" if field.default in ("", None) else f" (default: {field.default})"
        parser.add_argument("--" + field.name.replace("_", "-"), **how,
                            help=(comments[field.name] + default).replace("%", "%%"))
    return vars(parser.parse_args(argv))


def parse_settings(cls, presets, default_preset, argv, script, description, recipe_weights):
    """The settings from the command line, over those of recipe and preset, over the defaults of `cls`.

    With --resume the run's own config.json takes the preset's place.  Raises ValueError, naming the
    option and its value, when one is unknown or out of range."""
    given = read_options(cls, argv, f"{script}.py", description, epilog="presets: " + ", ".join(presets))
    if "resume" in given:
        config = read_config(given["resume"], script)
        other = [name for name, value in given.items() if value != config[name]
                 and name not in ("resume", "steps", "save_every", "micro_batch", "checkpointing", "compile", "device")]
        if other:
            raise ValueError(f"--resume continues a run as it was configured: {other[0]} was {config[other[0]]!r} "
                             f"and cannot become {given[other[0]]!r}")
        settings = cls(**(config | {"out": given["resume"]} | given))
        check_processes(settings)
        check_writable(Path(settings.out))
        return settings
    name = given.get("preset") or default_preset
    if name not in presets:
        raise ValueError(f"unknown preset {name!r}: there are {', '.join(presets)}")
    recipe = given.get("recipe", "paper")
    if recipe not in ("paper", "diverse"):
        raise ValueError(f"unknown recipe {recipe!r}: there are paper and diverse")
    out = f"runs/{script}-{name}" + (f"-{recipe}" if recipe != "paper" else "")
    preset = {"out": out} | presets[name] | (diverse(cls(**presets[name]), **recipe_weights) if recipe == "diverse" else {})
    settings = cls(**(preset | given | {"preset": name}))
    check_processes(settings)
    check_writable(Path(settings.out))
    if (Path(settings.out) / "config.json").exists():
        raise FileExistsError(f"{settings.out} already holds a run: continue it with --resume {settings.out}, "
                              "or give the new one a folder of its own with --out NAME")
    return settings


def diverse(preset, rehearsal, diversity_bonus, longer):
    """The recipe that keeps the pictures of a prompt varied, on top of a preset's settings: rehearsal in the place of the
    KL penalty, the diversity bonus, and twice the prompts in a step, for noise in the update narrows the policy, too.
    It is slower to learn, hence larger steps, and `longer` times as many."""
    return dict(rehearsal=rehearsal, kl_beta=0.0, diversity_bonus=diversity_bonus, lr=1.25 * preset.lr,
                steps=round(longer * preset.steps), prompts_per_step=2 * preset.prompts_per_step)


def check_processes(settings):
    """Raises ValueError if torchrun's processes cannot share the prompts of a step equally."""
    size = int(os.environ.get("WORLD_SIZE", 1))
    if settings.prompts_per_step % size:
        raise ValueError(f"prompts_per_step {settings.prompts_per_step} cannot be shared equally by {size} processes: "
                         f"choose a multiple of {size}")


def check_writable(folder):
    """Raises PermissionError if a run cannot leave its files in the folder, which need not exist yet."""
    existing = next(path for path in [folder, *folder.absolute().parents] if path.exists())
    if not existing.is_dir() or not os.access(existing, os.W_OK | os.X_OK):
        raise PermissionError(f"cannot write into {existing}: choose another folder with --out NAME")


def read_config(folder, script):
    """The settings of an earlier run of the same script."""
    path = Path(folder) / "config.json"
    if not path.exists():
        raise FileNotFoundError(f"nothing to resume: there is no {path}")
    config = json.loads(path.read_text())
    if config["script"] != script:
        raise ValueError(f"{folder} holds a run of {config['script']}.py: resume it with that script")
    return config["settings"]


@contextmanager
def one_line_errors():
    """What goes wrong while a run is set up is for the user to read: one line, and exit status 2."""
    try:
        yield
    except (ValueError, OSError, ImportError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)


def pick_device(name):
    """The torch device of that name, or by default the GPU if there is one, else the CPU.

    Under torchrun it also joins the other processes, and gives each of them a GPU of its own."""
    gpu = torch.cuda.is_available()
    if name.startswith("cuda") and not gpu:
        raise ValueError(f"--device {name}: torch sees no GPU here; leave the option out to use the CPU")
    try:
        device = torch.device(name or ("cuda" if gpu else "cpu"))
    except RuntimeError:
        device = None
    if device is None or device.type not in ("cpu", "cuda"):
        raise ValueError(f"--device {name}: no such device; there are cpu and cuda")
    if "LOCAL_RANK" in os.environ and not torch.distributed.is_initialized():
        if device.type == "cuda":
            device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
            torch.cuda.set_device(device)
        torch.distributed.init_process_group("nccl" if device.type == "cuda" else "gloo", timeout=timedelta(hours=1))
    return device


def choose_classes(text, names):
    """Class indices from "all", numbers or names, separated by commas.  Raises ValueError for what is no class."""
    if text == "all":
        return list(range(len(names)))
    index = {name.lower(): k for k, name in reversed(list(enumerate(names)))}        # of two equal names the first counts
    chosen = []
    for item in (item.strip() for item in text.split(",")):
        if re.fullmatch(r"-?[0-9]+", item):
            if not 0 <= int(item) < len(names):
                raise ValueError(f"class {item} does not exist: they are numbered from 0 to {len(names) - 1}")
            chosen.append(int(item))
        elif item.lower() in index:
            chosen.append(index[item.lower()])
        else:
            close = difflib.get_close_matches(item.lower(), index, n=3)
            hint = f": did you mean {' or '.join(map(repr, close))}?" if close else ""
            raise ValueError(f"no class is named {item!r}{hint}")
    return chosen


def load_models(preset, task, gpt_ckpt="", vq_ckpt="", toy_folder=toy.WEIGHTS):
    """The transformer and the tokenizer of a preset for the task "c2i" or "t2i", on the CPU."""
    if preset == "toy":
        return toy.load(task, toy_folder, gpt_ckpt, vq_ckpt)
    if preset not in pretrained.MODELS:
        raise ValueError(f"unknown preset {preset!r}: there are toy, {', '.join(pretrained.MODELS)}")
    return pretrained.load(preset, gpt_ckpt, vq_ckpt)


def caption_encoder(preset, t5, device):
    """What turns captions into Prompts: for the toy its own features, else Flan-T5's.  Let go of it to unload T5."""
    if preset == "toy":
        return lambda texts: argrpo.Prompts(texts, *toy.encode_captions(texts))
    return captions.T5Captions(t5, device)


def toy_folder(settings, task):
    """Where the toy's weights are: with --from-scratch in the run's folder, pretrained now if they are not there."""
    if not settings.from_scratch:
        return toy.WEIGHTS
    if settings.preset != "toy":
        raise ValueError("--from-scratch is for the toy: a published model is not pretrained in minutes")
    folder = Path(settings.out) / "weights"
    if not (folder / f"toy_{task}.pt").exists():
        toy.main(["--out", str(folder), "--seed", str(settings.seed)])
    return folder


# ---------------------------------------------------------------------------------------------
# Evaluation: fixed prompts and seeds
# ---------------------------------------------------------------------------------------------

@torch.no_grad()
def evaluate(model, vq, prompts, reward_fn, settings, measure=None, cfg_scale=None, stop=None):
    """Draws about settings.eval_images images, equally many per prompt and at least four, with seeds and
    in random streams that training never uses, as many at a time as a rollout has, with the rollout's guidance
    unless cfg_scale says another.

    Returns (scores, gallery): scores {"reward", "reward/<name>", "entropy", "diversity", and what
    measure(images, texts) -> {name: (B,)} says}, each the mean over all images but those with NaN, where
    it does not apply, and None where it applies to none; gallery a list of (prompt, images, rewards),
    six images at most of each prompt, for the picture."""
    device = next(model.parameters()).device
    n = min(len(prompts.texts), settings.eval_images // 4)
    samples = settings.eval_images // n
    batch = (settings.rollout_prompts or settings.prompts_per_step) * settings.group_size
    index = torch.linspace(len(prompts.texts) - 1, 0, n).long()          # from the last prompt to the first, evenly
    policy = dict(cfg_scale=settings.cfg_scale if cfg_scale is None else cfg_scale, temperature=settings.temperature)
    columns, gallery = {}, []                            # columns: name -> scores (b,), batch by batch
    for chunk in index.split(max(1, batch // samples)):
        if stop is not None and stop.received:
            raise Interrupted
        texts, cond, mask = prompts.pick(chunk, device)
        rng = argrpo.rng_for(device, settings.seed, "evaluation", len(gallery))
        with argrpo.autocast(device):
            tokens, logp = argrpo.generate(model, cond, mask, samples_per_prompt=samples, generator=rng, **policy)
        images = argrpo.paint(vq, tokens, settings.micro_batch)
        repeated = [text for text in texts for _ in range(samples)]
        total, parts = reward_fn(images, repeated)
        scores = {"reward": total} | {f"reward/{name}": part for name, part in parts.items()}
        scores |= measure(images, repeated) if measure else {}
        scores["entropy"] = -logp.mean(dim=1)            # -log pi(x) of x ~ pi: its mean is the entropy
        scores["diversity"] = argrpo.group_diversity(images, samples).repeat_interleave(samples)
        for name, score in scores.items():
            columns.setdefault(name, []).append(score.cpu())
        for i, text in enumerate(texts):
            rows = slice(i * samples, i * samples + min(6, samples))
            gallery.append((text, images[rows].cpu(), total[rows].tolist()))
    means = {name: torch.cat(column).nanmean().item() for name, column in columns.items()}
    return {name: None if math.isnan(mean) else mean for name, mean in means.items()}, gallery


@torch.no_grad()
def evaluate_spread(model, vq, prompts, settings, spread):
    """What spread(images, texts) says of fixed-seed images of at most 27 prompts, evenly chosen: 32 of each for the default
    eval_images, and accordingly more or less."""
    device = next(model.parameters()).device
    images, repeated = [], []
    n, samples = min(27, len(prompts.texts), settings.eval_images // 4), max(8, 32 * settings.eval_images // 540)
    for k, index in enumerate(torch.linspace(0, len(prompts.texts) - 1, n).long().split(4)):
        texts, cond, mask = prompts.pick(index, device)
        rng = argrpo.rng_for(device, settings.seed, "spread", k)
        with argrpo.autocast(device):
            tokens, _ = argrpo.generate(model, cond, mask, samples_per_prompt=samples, cfg_scale=settings.cfg_scale,
                                        temperature=settings.temperature, generator=rng)
        images.append(argrpo.paint(vq, tokens, settings.micro_batch))
        repeated += [text for text in texts for _ in range(samples)]
    return spread(torch.cat(images), repeated)


def diversity_kept(before, after):
    """D and its parts: how much of the spread before training is left after it, as ratios, and their mean.

    None where there were too few right pictures to tell."""
    ratios = {name: after[name] / before[name] if before[name] and after[name] is not None else None for name in before}
    mean = None if None in ratios.values() else sum(ratios.values()) / len(ratios)
    return {"diversity_kept": mean} | {f"diversity_kept/{name}": ratio for name, ratio in ratios.items()}


def evaluate_all(model, vq, prompts, reward_fn, settings, measure, stop):
    """`evaluate` with the rollout's guidance, and in scores["guidance"] what the other scales give."""
    scores, gallery = evaluate(model, vq, prompts, reward_fn, settings, measure, stop=stop)
    others = {f"{scale:g}": evaluate(model, vq, prompts, reward_fn, settings, measure, scale, stop)[0]
              for scale in settings.other_cfg_scales()}
    return scores | ({"guidance": others} if others else {}), gallery


# ---------------------------------------------------------------------------------------------
# Files
# ---------------------------------------------------------------------------------------------

def write_atomically(path, write):
    """write(file) into a temporary file beside `path`, which it replaces when all of it is on the disk.

    Raises OSError, with what `path` held before still there, if that fails, as on a full disk."""
    temporary = path.with_name(path.name + ".tmp")
    try:
        with open(temporary, "wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except (OSError, RuntimeError) as error:         # torch.save has errors of its own for a full disk
        temporary.unlink(missing_ok=True)
        before = "what it held before is still there" if path.exists() else "and there was none before"
        raise OSError(f"cannot write {path} ({str(error).splitlines()[0]}); {before}") from error


def write_json(path, value):
    write_atomically(path, lambda file: file.write((json.dumps(value, indent=2) + "\n").encode()))


def version():
    """This repository's commit, or "unknown" outside a checkout."""
    if shutil.which("git") is None:
        return "unknown"
    answer = subprocess.run(["git", "describe", "--always", "--dirty"], cwd=Path(__file__).parent,
                            capture_output=True, text=True)
    return answer.stdout.strip() or "unknown"


def save_checkpoint(path, step, model, optimizer, remembered=()):
    """Everything that --resume needs: the next step's number, weights, the optimizer's state, and rehearsal's memory.

    The checkpoint before this one stays beside it, as previous.pt."""
    state = {"step": step, "model": model.state_dict(), "optimizer": optimizer.state_dict(),
             "remembered": dict(remembered)}
    new = path.with_name("new.pt")
    write_atomically(new, lambda file: torch.save(state, file))
    if path.exists():
        os.replace(path, path.with_name("previous.pt"))
    os.replace(new, path)


def load_checkpoint(path, model, optimizer, remembered=None):
    """Restores model and optimizer, and the dict that rehearsal remembers; returns the next step's number.

    Raises OSError, naming the last good checkpoint, for a file that is damaged or another model's."""
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        if remembered is not None:
            remembered.update(state["remembered"])
        return state["step"]
    except PermissionError:
        raise
    except Exception as error:                       # a damaged file can fail anywhere, and in many ways
        previous = path.with_name("previous.pt")
        good = (f"the one before it is {previous}: rename it to {path.name}, and resume again" if previous.exists()
                else "and there is no earlier one: start again without --resume, in another folder")
        raise OSError(f"the checkpoint {path} is damaged or not this run's ({type(error).__name__}); {good}") from error


class Interrupted(Exception):
    """A signal asked for the end, and what was under way could be left."""


class StopRequest:
    """`with StopRequest() as stop`: Ctrl-C and SIGTERM only set stop.received, so that the current step can finish.

    A second Ctrl-C ends the program at once."""
    received = None

    def __enter__(self):
        self.previous = {number: signal.signal(number, self.note) for number in (signal.SIGINT, signal.SIGTERM)}
        return self

    def note(self, number, frame):
        self.received = signal.Signals(number)
        signal.signal(signal.SIGINT, signal.default_int_handler)
        print(f"\n{self.received.name}: finishing what is under way, then saving", file=sys.stderr, flush=True)

    def everywhere(self):
        """Whether any process was asked to stop: all of them must agree on the last step."""
        if argrpo.rank_and_size()[1] == 1:
            return self.received is not None
        number = argrpo.average_over_processes({"signal": int(self.received or 0)}, maximum=("signal",))["signal"]
        self.received = signal.Signals(number) if number else None
        return number > 0

    def __exit__(self, *error):
        for number, handler in self.previous.items():
            signal.signal(number, handler)


# ---------------------------------------------------------------------------------------------
# Pictures
# ---------------------------------------------------------------------------------------------

def figure(*size):
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    fig = Figure(figsize=size, layout="constrained")
    FigureCanvasAgg(fig)
    return fig


def draw_before_after(path, before, after, rows=8):
    """Two blocks of pictures, before and after: a row per prompt, the same seeds, each with its reward."""
    rows = min(rows, len(before))
    shown = [(before[i], after[i]) for i in torch.linspace(0, len(before) - 1, rows).long().tolist()]
    columns = len(shown[0][0][1])
    fig = figure(2 * columns * 0.85 + 1, len(shown) * 1.05 + 0.5)
    for block, title, which in zip(fig.subfigures(1, 2, wspace=0.02), ("before", "after"), (0, 1)):
        block.suptitle(title)
        axes = block.subplots(len(shown), columns, squeeze=False)
        for row, pair in zip(axes, shown):
            text, images, rewards = pair[which]
            row[0].set_title(text, fontsize=7, loc="left", pad=9)
            for ax, image, score in zip(row, images, rewards):
                ax.imshow(image.permute(1, 2, 0).numpy(), interpolation="nearest")
                ax.set_xlabel(f"{score:.2f}", fontsize=6, labelpad=1)
                ax.set_xticks([])
                ax.set_yticks([])
    fig.savefig(path, dpi=110)


def draw_curves(path, metrics):
    """Reward by component, KL, entropy, diversity and, where it was measured, D over the steps."""
    rewards = [name for name in metrics[0] if name.startswith("reward/")]
    panels = [rewards if len(rewards) == 1 else ["reward", *rewards], ["kl"], ["entropy"], ["diversity"]]
    if any(m.get("diversity_kept") is not None for m in metrics):
        panels.append(["diversity_kept"])
    fig = figure(2.8 * len(panels), 2.8)
    for ax, names in zip(fig.subplots(1, len(panels)), panels):
        for name in names:
            label = name.removeprefix("reward/")
            known = [(m["step"], m[name]) for m in metrics if m.get(name) is not None]
            ax.plot(*zip(*known), linewidth=1, label=label)
        ax.set_title("reward" if ax is fig.axes[0] else names[0], fontsize=9)
        ax.set_xlabel("step", fontsize=8)
        ax.tick_params(labelsize=7)
    fig.axes[0].legend(fontsize=7)
    fig.savefig(path, dpi=110)


# ---------------------------------------------------------------------------------------------
# Memory
# ---------------------------------------------------------------------------------------------

def memory_estimate(model, vq, settings):
    """Bytes that training will need, by part.  The rollout's cache and the update's activations never meet: the smaller of
    them is left out."""
    c, gpu = model.config, next(model.parameters()).is_cuda
    half = 2 if gpu else 4                       # bytes of a number in the copies and in the cache
    P = sum(p.numel() for p in model.parameters())
    length = c.cls_token_num + c.block_size - 1
    prompts = settings.rollout_prompts or settings.prompts_per_step // argrpo.rank_and_size()[1]
    rollout = prompts * settings.group_size * (1 if settings.cfg_scale == 1 else 2)
    update = settings.micro_batch * (1 if settings.cfg_scale == 1 or settings.logprob_cfg == "none" else 2)
    # Saved for the backward pass, counted on this code in float32: 100 bytes per layer, token and channel, of
    # which autocast halves about four fifths.  With checkpointing, all of that for one layer, and the inputs of the others.
    inside = 60 if gpu else 100
    layers = inside + 4 * c.n_layer if settings.checkpointing else inside * c.n_layer
    # Per logit, float32: itself, log-softmax, softmax, and their gradients; of these there is a chunk at most.
    logits = 24 * min(argrpo.CHUNK, update * length * c.vocab_size)
    copied = gpu or settings.compile
    cache = rollout * length * 2 * c.n_layer * c.dim * half
    activations = update * length * c.dim * layers + logits
    return {
        "weights": 4 * P, "gradients": 4 * P, "optimizer": 8 * P, "reference": half * P,
        "tokenizer": 4 * sum(p.numel() for p in vq.parameters()),
        "sampler's copy": half * P if copied else 0,
        "autocast's copy": 2 * P if gpu else 0,
        **({f"KV cache, {rollout} rows": cache} if cache > activations else {f"activations, {update} rows": activations}),
    }


def choose_micro_batch(model, vq, settings):
    """How many images the update takes at a time if settings.micro_batch leaves it open: as many as will fit into the
    GPU's free memory.  On a CPU larger passes are no faster: there about a thousand tokens."""
    device = next(model.parameters()).device
    if device.type == "cpu":
        return max(1, 1024 // model.config.block_size)
    torch.cuda.empty_cache()                     # what T5 has left behind is free, too
    return fitting_micro_batch(model, vq, settings, torch.cuda.mem_get_info(device)[0])


def fitting_micro_batch(model, vq, settings, free):
    """The largest power of two, from 1 to 16, that by the estimate leaves a fifth of the free bytes free."""
    for size in (16, 8, 4, 2):                   # more is hardly faster, and painting needs memory as well
        parts = memory_estimate(model, vq, dataclasses.replace(settings, micro_batch=size))
        if sum(parts.values()) - parts["weights"] - parts["tokenizer"] < 0.8 * free:         # these two are there already
            return size
    return 1


def print_memory(parts):
    total = sum(parts.values())
    unit, name = (2**30, "GiB") if total > 2**30 else (2**20, "MiB")
    text = ", ".join(f"{part} {size / unit:.1f}" for part, size in parts.items())
    print(f"memory, estimated: {total / unit:.1f} {name} ({text})", flush=True)


@contextmanager
def out_of_memory_advice(settings):
    """Turns the GPU's out-of-memory error into one that says which setting to lower."""
    try:
        yield
    except torch.cuda.OutOfMemoryError as error:
        prompts = settings.rollout_prompts or settings.prompts_per_step
        raise SystemExit(f"out of GPU memory: {str(error).splitlines()[0]}\nlower --micro-batch (now "
                         f"{settings.micro_batch}) or add --checkpointing (the result stays the same); if it is the rollout "
                         "that does not fit, lower --rollout-prompts "
                         f"(now {prompts}), then --group-size (now {settings.group_size})") from error


# ---------------------------------------------------------------------------------------------
# A run
# ---------------------------------------------------------------------------------------------

def checkpoint_of(settings):
    """The file to continue from, or None to start at the first step.

    Between two renames of `save_checkpoint` there is a moment with no last.pt: new.pt, which is whole, is then the one."""
    out = Path(settings.out)
    found = [path for path in (out / "last.pt", out / "new.pt") if settings.resume and path.exists()]
    return found[0] if found else None


def write_count(model, optimizer):
    """A number that grows whenever weights or optimizer state are written to: torch counts writes to a tensor."""
    states = [value for state in optimizer.state.values() for value in state.values() if isinstance(value, torch.Tensor)]
    return sum(tensor._version for tensor in [*model.parameters(), *states])


def train_and_save(model, reference, vq, prompts, reward_fn, settings, optimizer, script, stop, watch=None):
    """The loop of `argrpo.train`, logged and saved: returns the metrics of all steps done so far.

    Continues from the last checkpoint if settings.resume asks for it, and ends early when a signal asks for that.
    An error in a step is raised after the steps before it are saved."""
    out = Path(settings.out)
    log, writer = out / "metrics.jsonl", argrpo.rank_and_size()[0] == 0
    start = checkpoint_of(settings)
    rehearsal = Rehearsal(reference, vq, prompts, reward_fn, settings, settings.rehearsal, settings.rehearsal_groups)
    remembered = rehearsal.remembered
    first_step = load_checkpoint(start, model, optimizer, remembered) if start else 0
    metrics = [json.loads(line) for line in log.read_text().splitlines()[:first_step]] if first_step else []
    if writer:                                                           # steps not saved run again
        write_atomically(log, lambda file: file.write("".join(json.dumps(m) + "\n" for m in metrics).encode()))
    done, saved, written = first_step, first_step, write_count(model, optimizer)
    embed = embedding(settings.bonus_distance, vq, next(model.parameters()).device)
    steps = argrpo.train(model, reference, vq, prompts, reward_fn, settings, optimizer, first_step, embed,
                         rehearsal if settings.rehearsal else None, watch)
    try:
        while not stop.everywhere() and (m := next(steps, None)) is not None:
            metrics.append(m)
            done, written = m["step"] + 1, write_count(model, optimizer)
            if writer:
                with open(log, "a") as file:
                    file.write(json.dumps(m) + "\n")
                if done % settings.save_every == 0 or done == settings.steps:
                    save_checkpoint(out / "last.pt", done, model, optimizer, remembered)
                    saved = done
    finally:
        steps.close()
        # Stopped, or failed: a step that failed before its update has changed nothing, and what it had can be saved.
        if writer and done > saved and write_count(model, optimizer) == written:
            save_checkpoint(out / "last.pt", done, model, optimizer, remembered)
            saved = done
        if writer and done < settings.steps:
            upto = "saved up to there" if saved == done else f"saved up to step {saved}"
            print(f"stopped in step {done} of {settings.steps}, {upto if done else 'before anything was trained'}; "
                  f"continue with: python {script}.py --resume {out}", file=sys.stderr, flush=True)
    return metrics


def embedding(name, vq, device):
    """embed(images, tokens) for the diversity bonus, or None for the pixels themselves."""
    if name == "codes":
        return lambda images, tokens: vq.quantize.codes()[tokens]                                  # (B, N, D)
    if name == "clip":
        tower = reward.clip_tower(device)
        return lambda images, tokens: tower.image_features(images)                                 # (B, D)
    return None


def check_models(model, vq):
    """Raises ValueError if the transformer writes tokens that the tokenizer cannot paint."""
    if model.config.vocab_size != vq.config.codebook_size:
        raise ValueError(f"transformer and tokenizer do not go together: {model.config.vocab_size} codes in one, "
                         f"{vq.config.codebook_size} in the other")


def run(model, vq, prompts, eval_prompts, reward_fn, settings, script, measure=None, spread=None):
    """Trains `model` on `prompts`, and shows in the folder settings.out what that did to pictures of `eval_prompts`.

    reward_fn is a RewardSet; what measure(images, texts) gives, and how much of spread(images, texts) is
    kept, is reported but never trained on.  Returns the summary.  After Ctrl-C it exits with status 130 (143
    after SIGTERM), after a bad reward, a number that is not finite or a full disk with status 1: with
    everything saved, and a line that says how to go on."""
    with StopRequest() as stop, out_of_memory_advice(settings):
        try:
            return before_training_and_after(model, vq, prompts, eval_prompts, reward_fn, settings, script, measure, spread,
                                             stop)
        except Interrupted:
            sys.exit(128 + stop.received)
        except (reward.BadReward, FloatingPointError, OSError) as error:
            print(f"error: {error}", file=sys.stderr)
            sys.exit(1)


def before_training_and_after(model, vq, prompts, eval_prompts, reward_fn, settings, script, measure, spread, stop):
    """What `run` does, without its answers to errors."""
    started = time.perf_counter()
    rank, size = argrpo.rank_and_size()
    settings.micro_batch = settings.micro_batch or choose_micro_batch(model, vq, settings)
    N, B = model.config.block_size, settings.prompts_per_step * settings.group_size
    if rank == 0:
        print(f"{sum(p.numel() for p in model.parameters()) / 1e6:.1f}M parameters, {N} tokens per image, "
              f"{settings.prompts_per_step} prompts x {settings.group_size} samples = {B} images per step, "
              f"{settings.micro_batch} at a time in the update, {settings.steps} steps, "
              f"on {next(model.parameters()).device}{f' and {size - 1} more' if size > 1 else ''}, "
              f"into {settings.out}/", flush=True)
        print_memory(memory_estimate(model, vq, settings))
    check_models(model, vq)
    reference = argrpo.frozen_copy(model)
    optimizer = argrpo.make_optimizer(model, settings)
    out = Path(settings.out)
    before = gallery_before = None
    if rank == 0:                                # one process evaluates and writes, the others wait for it
        before, gallery_before = evaluate_all(model, vq, eval_prompts, reward_fn, settings, measure, stop)
        spread_before = evaluate_spread(model, vq, eval_prompts, settings, spread) if spread else {}
        print("before: " + describe(before), flush=True)
        # Only now, when model and rewards have shown that they work, the folder becomes a run's.
        out.mkdir(parents=True, exist_ok=True)
        config = {"script": script, "settings": dataclasses.asdict(settings) | {"resume": ""}}
        write_json(out / "config.json", config | {"torch": torch.__version__, "argrpo": version()})
    wait_for_all()
    evaluated = time.perf_counter()

    def watch(step, images, texts):              # D as it falls: rough, from the step's few images of a prompt
        return diversity_kept(spread_before, spread(images, texts)) if step % 5 == 0 else {}

    metrics = train_and_save(model, reference, vq, prompts, reward_fn, settings, optimizer, script, stop,
                             watch if spread and size == 1 else None)
    if stop.everywhere():
        raise Interrupted
    trained = time.perf_counter()
    if rank > 0:
        return None
    write_atomically(out / "model.pt", lambda file: torch.save({"model": model.state_dict()}, file))
    after, gallery_after = evaluate_all(model, vq, eval_prompts, reward_fn, settings, measure, stop)
    if spread:
        after |= diversity_kept(spread_before, evaluate_spread(model, vq, eval_prompts, settings, spread))
    draw_before_after(out / "before_after.png", gallery_before, gallery_after)
    draw_curves(out / "curves.png", metrics)
    seconds = {"evaluation": evaluated - started + time.perf_counter() - trained,
               "training": sum(m["seconds"] for m in metrics)}
    summary = {"before": before, "after": after, "seconds": seconds}
    write_json(out / "summary.json", summary)
    print("before: " + describe(before) + "\nafter:  " + describe(after))
    print(f"look at {out}/before_after.png and {out}/curves.png")
    return summary


def wait_for_all():
    if torch.distributed.is_initialized():
        torch.distributed.barrier()


def describe(scores):
    known = {name: value for name, value in scores.items() if name != "guidance" and value is not None}
    lines = [", ".join(f"{name} {value:.3f}" for name, value in known.items())]
    others = scores.get("guidance", {})
    return "\n".join(lines + [f"    with guidance {scale}: {describe(other)}" for scale, other in others.items()])
