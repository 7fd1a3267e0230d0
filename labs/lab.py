"""What the labs share: options, seeds, the toy, a model small enough to enumerate, figures, tables.

`import lab` comes first in every lab: it also makes the repository's own files importable.
"""

import argparse
import base64
import itertools
import json
import subprocess
import sys
import time
import zlib
from collections import namedtuple
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
NOTEBOOK = "ipykernel" in sys.modules

import matplotlib  # noqa: E402 (the paths come first)

if not NOTEBOOK:
    matplotlib.use("Agg")                        # figures go to files and need no display

import matplotlib.pyplot as plt  # noqa: E402
import torch  # noqa: E402
from einops import rearrange  # noqa: E402

import argrpo  # noqa: E402
import toy  # noqa: E402
from harness.before_after import diversity_kept  # noqa: E402
from reward import build_rewards, to_uint8  # noqa: E402

# ---------------------------------------------------------------------------------------------
# One lab: its options, its seeds, and what it leaves behind
# ---------------------------------------------------------------------------------------------

STORED = ROOT / "docs" / "labs"


def read_options(arguments):
    """The options in a list of command line arguments."""
    parser = argparse.ArgumentParser(description="a lab: read its text beside what it prints")
    parser.add_argument("--quick", action="store_true", help="see that it works; no conclusions")
    parser.add_argument("--seeds", type=int, default=1, help="how many training seeds, from 0 on")
    parser.add_argument("--out", type=Path, default=ROOT / "runs" / "labs",
                        help="folder for figures, tables and numbers")
    parser.add_argument("--stored", action="store_true",
                        help="draw what docs/labs holds, and measure nothing")
    options = parser.parse_args(arguments)
    if options.seeds < 1:
        parser.error(f"--seeds must be at least 1, not {options.seeds}")
    return options


class Experiment:
    """One lab at work.  A lab makes it first, with its own name, and calls `finish` last.

    It reads the command line, except in a notebook.  options are the lab's, and measured (from
    docs/labs with --stored) holds by name what its measuring functions returned."""

    def __init__(self, name):
        self.name, self.began, self.commit = name, time.perf_counter(), commit()
        self.options = read_options([] if NOTEBOOK else sys.argv[1:])
        self.measured, self.stored_note = {}, None
        if self.options.stored:
            path = STORED / f"{name}.json"
            if not path.exists():
                sys.exit(f"error: --stored: there is no {path}, for this lab has not been run for "
                         "docs/labs yet; run it without --stored")
            stored = json.loads(path.read_text("utf-8"))
            self.measured, self.stored_note = stored["measured"], stored["runs"]

    def seconds(self):
        return f"{time.perf_counter() - self.began:.0f} s"

    def quick(self, small, full):
        """A size of the experiment: `small` with --quick, else `full`."""
        return small if self.options.quick else full

    def over_seeds(self, measure, seeds=None):
        """[measure(seed), ...] of all training seeds, or of those given, with a line for each.

        What measure returns goes into the lab's .json file: numbers, strings, lists and dicts with
        strings as keys."""
        name = measure.__name__
        if self.options.stored:
            return self.measured[name]
        found = self.measured[name] = []
        for seed in range(self.options.seeds) if seeds is None else seeds:
            found.append(measure(seed))
            print(f"  {name}, seed {seed}: {self.seconds()}", flush=True)
        return found

    def finish(self, fig, rows, runs):
        """Saves the lab's figure, table and numbers as .png, .md and .json, and shows them.

        rows are the table's, the first of them its heading; runs says in words what was run."""
        seeds, trial = "seed 0", ""
        if self.options.seeds > 1:
            seeds = f"seeds 0 to {self.options.seeds - 1}"
        if self.options.quick:
            trial = "; --quick: a trial, no conclusions"
        note = self.stored_note or f"{runs}; {seeds}{trial}; commit {self.commit}"
        fig.supxlabel(note, fontsize=7, color="#777777")
        self.options.out.mkdir(parents=True, exist_ok=True)
        path = self.options.out / self.name
        fig.savefig(path.with_suffix(".png"), dpi=110)
        lines = ["| " + " | ".join(map(str, row)) + " |" for row in rows]
        text = "\n".join([lines[0], "|" + "---|" * len(rows[0]), *lines[1:]])
        path.with_suffix(".md").write_text(f"{text}\n\n{note}\n", "utf-8")
        if not self.options.stored:
            numbers = json.dumps({"runs": note, "measured": self.measured}, indent=1)
            path.with_suffix(".json").write_text(numbers + "\n", "utf-8")
        print(f"\n{text}\n\n{path}.png and .md; {self.seconds()}")
        if not NOTEBOOK:
            plt.close(fig)


def commit():
    """This repository's commit, for the figures."""
    answer = subprocess.run(["git", "describe", "--always"], cwd=ROOT, capture_output=True,
                            text=True)
    return answer.stdout.strip() or "unknown"


# ---------------------------------------------------------------------------------------------
# The toy
# ---------------------------------------------------------------------------------------------

Drawn = namedtuple("Drawn", "texts tokens logp images right")


def prompts_of(task, texts=None, plain=False):
    """The toy's Prompts for these texts, by default for all that the task trains on.

    Plain, a caption's words have one feature for which word it is and another for where it stands,
    and none for both together, nor for the relation in which the caption puts things."""
    if texts is None:
        texts = toy.CLASSES if task == "c2i" else [*toy.SEEN_CLASSES, *toy.SEEN_PAIRS]
    prompts = toy.as_prompts(task, texts)
    if plain:
        each = rearrange(prompts.cond, "b t (context place word) -> b t context place word",
                         place=toy.CAPTION_LENGTH, word=len(toy.WORDS)).sum(2)
        separate = torch.cat([each.sum(2), each.sum(3)], dim=2)      # words, places
        missing = toy.CAPTION_DIM - separate.shape[2]
        prompts.cond = torch.nn.functional.pad(separate, (0, missing))
    return prompts


def every(step, pairs):
    """Every step-th of the toy's captions of pairs.  In their list four relations take turns, so
    that an even step would miss some of them: it raises ValueError."""
    if step % 2 == 0:
        raise ValueError(f"every {step}th pair misses some of the four relations: take an odd step")
    return pairs[::step]


def train(model, config, reward="shapes", task="c2i", prompts=None, reference=None, **seams):
    """`argrpo.train` on the toy: improves model in place, and yields its Steps.

    reward is a reward's name, or a function(images, texts) -> (total, parts)."""
    shipped, vq = toy.load(task)
    reward_fn = build_rewards(reward, "cpu") if isinstance(reward, str) else reward
    return argrpo.train(model, reference or shipped, vq, prompts or prompts_of(task), reward_fn,
                        config, argrpo.make_optimizer(model, config), **seams)


def draw(model, samples, task="c2i", texts=None, seed=0, plain=False, **policy):
    """`samples` pictures of each text, with random numbers that training never uses.

    Drawn has, for all pictures in a row, texts, tokens (B, N), logp (B, N), images (B, 3, 24, 24)
    and right (B,), the strict verifier's verdicts."""
    _, vq = toy.load(task)
    prompts, columns = prompts_of(task, texts, plain), []
    for k, some in enumerate(torch.arange(len(prompts.texts)).split(max(1, 256 // samples))):
        rng = argrpo.rng_for("cpu", seed, "lab", k)
        columns.append(argrpo.draw_images(model, vq, prompts, some, rng, micro_batch=64,
                                          samples_per_prompt=samples, **policy))
    tokens, logp, images = (torch.cat(column) for column in zip(*columns))
    texts = [text for text in prompts.texts for _ in range(samples)]
    return Drawn(texts, tokens, logp, images, toy.verify(images, texts))


def as_text(images):
    """Pictures (n, 3, 24, 24) as text, for the lab's .json file."""
    pixels = to_uint8(images).movedim(-1, 1).numpy().tobytes()
    return base64.b64encode(zlib.compress(pixels)).decode()


def as_sheet(text):
    """The pictures of such a text, as a sheet of four columns: (height, width, 3), for imshow."""
    pixels = bytearray(zlib.decompress(base64.b64decode(text)))
    images = torch.frombuffer(pixels, dtype=torch.uint8).view(-1, 3, toy.SIZE, toy.SIZE)
    framed = torch.nn.functional.pad(images, (1, 1, 1, 1), value=255)
    return rearrange(framed, "(row column) c h w -> (row h) (column w) c", column=4)


def diversity(drawn, base):
    """D: how much of the spread among base's right pictures there is among those of drawn."""
    before, after = (toy.spread(some.images, some.texts) for some in (base, drawn))
    return diversity_kept(before, after)["diversity_kept"]


# ---------------------------------------------------------------------------------------------
# A model small enough to enumerate
# ---------------------------------------------------------------------------------------------


class Tiny:
    """A Transformer of four tokens of three codes, and all its 81 sequences.

    It has learnt two classes, each a random distribution over the sequences, and for guidance
    the null branch, which is their mixture.  right (81,) says which sequences are right: a random
    half of them.  All expectations are sums over the sequences: nothing is sampled."""

    def __init__(self, seed):
        rng = torch.Generator().manual_seed(seed)
        torch.manual_seed(seed)
        self.model = argrpo.Transformer(argrpo.GPTConfig(
            dim=16, n_layer=1, n_head=2, vocab_size=3, block_size=4, num_classes=2, multiple_of=8))
        self.sequences = torch.tensor(list(itertools.product(range(3), repeat=4)))   # (81, 4)
        data = (2 * torch.randn(2, 81, generator=rng)).softmax(-1)
        optimizer = torch.optim.Adam(self.model.parameters(), lr=1e-2)
        for _ in range(200):
            loss = -(data[0] * self.logp(0)).sum() - (data[1] * self.logp(1)).sum()
            loss = loss - (data.mean(0) * self.logp(2)).sum()        # class 2 is the null branch
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        self.right = torch.zeros(81)
        self.right[torch.randperm(81, generator=rng)[:40]] = 1.0

    def logp(self, label=0, cfg_scale=1.0):
        """Log-probability of each sequence, (81,), with gradient."""
        cond = torch.full((len(self.sequences),), label)
        logp, _ = argrpo.token_logp(self.model, self.sequences, cond, cfg_scale=cfg_scale)
        return logp.sum(1)

    def scores(self, cfg_scale=1.0):
        """Probabilities (81,), and the gradient of each sequence's log-probability, (81, n)."""
        logp, weights = self.logp(cfg_scale=cfg_scale), list(self.model.parameters())
        rows = []
        for value in logp:
            gradients = torch.autograd.grad(value, weights, retain_graph=True)
            rows.append(torch.cat([gradient.flatten() for gradient in gradients]))
        return logp.detach().exp().double(), torch.stack(rows).double()


# ---------------------------------------------------------------------------------------------
# Figures and tables
# ---------------------------------------------------------------------------------------------

# The same recipe has the same colour in all labs (Okabe and Ito's, which the colour-blind can
# tell apart).
COLOURS = {"base": "#777777", "paper": "#D55E00", "diverse": "#0072B2"}
OTHERS = ["#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#8C6BB1", "#444444"]


def across(values):
    """Over seeds: "mean (smallest .. largest)", or the value alone."""
    if len(values) == 1:
        return f"{values[0]:.3f}"
    return f"{sum(values) / len(values):.3f} ({min(values):.3f} .. {max(values):.3f})"


def plot_band(ax, x, rows, **style):
    """The mean of rows, one for each seed, over x, and a band from the smallest to the largest."""
    rows = torch.tensor(rows, dtype=torch.float64)                                   # (seeds, x)
    line, = ax.plot(x, rows.mean(0), **style)
    ax.fill_between(x, rows.amin(0), rows.amax(0), color=line.get_color(), alpha=0.2, linewidth=0)
