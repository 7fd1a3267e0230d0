"""What a run shows of itself: the pictures, the curves and the page, from its files alone.

    report.html         the whole run on one page that needs nothing else; or several runs compared
    curves.png          reward by component, KL, entropy and diversity over the steps
    before_after.png    the same prompts and seeds, with their rewards
    progress.gif        the same prompts and seeds every few steps, as the policy changes

`show` makes all of them, of whatever is in the run's folder.  Torch, a model or a reward are never
loaded: so it can also be done while a run is going, or after it was killed.  matplotlib and jinja2
are loaded when something is drawn.

Texts are data: prompts, names of rewards and of runs may hold anything.  Values that are missing or
infinite are left out of the curves, and shown as a dash in tables.
"""

import base64
import io
import json
from collections import namedtuple
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from harness import doctor

RunData = namedtuple("RunData", "name folder config settings metrics summary arrays")
SMALL = 72                                       # pixels: smaller images are shown as they are
GAP, LINE, HEAD = 4, 20, 30                      # pixels: between pictures, of texts, of titles
ROWS, SAMPLES, PICKED = 32, 3, 6                 # prompts on the page, pairs of each; best, worst
TRIVIAL = {"ratio_max": {1.0}, "clip_frac": {0.0}, "missing": {0.0}}    # these need no chart
STYLE = {                                        # of a chart: small, and the same every time
    "svg.fonttype": "none", "svg.hashsalt": "curves", "savefig.transparent": True,
    "text.parse_math": False, "font.size": 8, "font.sans-serif": "DejaVu Sans",
    "xtick.color": "#6b7280", "ytick.color": "#6b7280", "axes.grid": True,
    "axes.grid.axis": "y", "grid.color": "#e5e7eb", "axes.edgecolor": "none",
}
NAMELESS = dict.fromkeys(("Creator", "Date", "Format", "Type"))      # no date, so equal to the byte


# ---------------------------------------------------------------------------------------------
# Files and texts
# ---------------------------------------------------------------------------------------------

def read_run(folder):
    """What is in a run's folder.  Raises FileNotFoundError if it holds no run, and ValueError for
    a damaged file."""
    folder = Path(folder)
    config = read(folder / "config.json", json.load) or {}
    if "settings" not in config:                 # a model of Hugging Face has such a file, too
        raise FileNotFoundError(f"{folder} holds no run: there is no {folder / 'config.json'} with "
                                "a run's settings")
    settings = config["settings"] | {"device": config.get("device", "")}
    return RunData(folder.resolve().name, folder, config, settings,
                   read(folder / "metrics.jsonl", read_log) or [],
                   read(folder / "summary.json", json.load) or {},
                   read(folder / "report.npz", lambda file: dict(np.load(file))) or {})


def read(path, parse):
    """What parse(file) makes of a file, or None if there is none."""
    if not path.exists():
        return None
    with open(path, "rb") as file:
        try:
            return parse(file)
        except Exception as error:                   # a damaged file can fail anywhere
            raise ValueError(f"{path} is damaged: {error}") from error


def read_log(file):
    """The metrics of all steps in the log.  A last line that was being written is left out."""
    metrics = []
    for line in file.read().decode(errors="replace").split("\n"):
        try:
            metrics.append(json.loads(line))
        except json.JSONDecodeError:
            break
    return metrics


def content_of(save, **how):
    """The bytes that save(file, ...) writes, such as a PIL picture's."""
    file = io.BytesIO()
    save(file, **how)
    return file.getvalue()


def write(path, content):
    """Bytes, into a temporary file, which then takes the name: returns the path."""
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_bytes(content)
    return temporary.replace(path)


def plain(text):
    """The text in one line that can be drawn and printed: a space for each line end, control
    character or half of a character."""
    return "".join(c if c.isprintable() else " " for c in str(text))


def names_apart(runs):
    """The same runs, those of equal names renamed to their whole paths."""
    names = [run.name for run in runs]
    return [run._replace(name=str(run.folder)) if names.count(run.name) > 1 else run
            for run in runs]


# ---------------------------------------------------------------------------------------------
# Pictures
# ---------------------------------------------------------------------------------------------

def sheet(blocks, columns, cell, titles):
    """Blocks of pictures as one picture, `columns` of them side by side, and the titles on top.

    A block is (text, pictures (n, H, W, 3) uint8, notes): its text stands above its pictures, which
    are `cell` pixels wide, and a note below each, if there are notes."""
    font, large = ImageFont.load_default(13), ImageFont.load_default(17)
    columns = min(columns, len(blocks))
    _, pictures, notes = blocks[0]
    width, height = len(pictures) * (cell + GAP) + 2 * GAP, LINE + cell + 2 * GAP
    if notes:
        height += LINE
    resampling = Image.Resampling.NEAREST
    if pictures.shape[-2] > cell:
        resampling = Image.Resampling.LANCZOS
    size = columns * width + GAP, -(-len(blocks) // columns) * height + HEAD
    canvas = Image.new("RGB", size, "white")
    draw = ImageDraw.Draw(canvas)
    for column, title in enumerate(titles):
        draw.text((column * width + 2 * GAP, 5), plain(title), "black", large)
    for k, (text, pictures, notes) in enumerate(blocks):
        left, top = k % columns * width + 2 * GAP, k // columns * height + HEAD
        draw.text((left, top), plain(text)[:width // 6], "black", font)
        for i, pixels in enumerate(pictures):
            x = left + i * (cell + GAP)
            canvas.paste(Image.fromarray(pixels).resize((cell, cell), resampling), (x, top + LINE))
            if notes:
                draw.text((x + cell // 2, top + LINE + cell), notes[i], "black", font, anchor="ma")
    return canvas


def sheet_of_pairs(arrays, rows=8):
    """Pictures before and after side by side: a row a prompt, the same seeds, with the rewards."""
    blocks, count = [], len(arrays["texts"])
    for i in np.linspace(0, count - 1, min(rows, count)).astype(int):
        for when in ("before", "after"):
            notes = [f"{score:.2f}" for score in arrays[f"scores_{when}"][0, i]]
            blocks.append((arrays["texts"][i], arrays[when][i], notes))
    return sheet(blocks, 2, 96, ["before", "after"])


def frames_of(folder):
    """The files of progress, in order.  Hidden ones, as of macOS, are none."""
    return sorted((Path(folder) / "progress").glob("[!.]*.*g"))


def animation(files):
    """The pictures in the files as one GIF, which stands still at its end, for 3 seconds."""
    frames = [Image.open(file).convert("P", palette=Image.Palette.ADAPTIVE) for file in files]
    times = [400] * (len(frames) - 1) + [3000]                               # milliseconds
    return content_of(frames[0].save, format="GIF", save_all=True, append_images=frames[1:],
                      duration=times, loop=0)


def file_uri(content, kind):
    """A file's bytes as an address inside the page."""
    return f"data:image/{kind};base64,{base64.b64encode(content).decode()}"


def is_small(pixels):
    """Whether pictures (..., H, W, 3) are to be shown pixel by pixel."""
    return min(pixels.shape[-3:-1]) <= SMALL


def data_uri(pixels, sharp=None):
    """Pixels (H, W, 3), uint8, as the address of a picture.  It loses nothing if it is to be sharp,
    which small ones are unless that says otherwise."""
    if sharp is None:
        sharp = is_small(pixels)
    kind = "png" if sharp else "jpeg"
    return file_uri(content_of(Image.fromarray(pixels).save, format=kind, quality=88), kind)


# ---------------------------------------------------------------------------------------------
# Curves
# ---------------------------------------------------------------------------------------------

def add_legend(owner, lines, labels, **how):
    """A legend of any labels.  matplotlib leaves out those that begin with an underscore, so they
    are put in last."""
    legend = owner.legend(lines, ["?"] * len(labels), **how)
    for text, label in zip(legend.get_texts(), labels):
        text.set_text(plain(label))


def smooth(points):
    """A running mean of up to a twentieth of the points to either side."""
    reach, (steps, values) = len(points) // 20, zip(*points)
    return [(step, doctor.mean(values[max(0, i - reach):i + reach + 1]))
            for i, step in enumerate(steps)]


def metrics_like(pattern, runs):
    """The metrics that a pattern means, in the order in which they first come up.  A star at its
    end stands for anything."""
    if not pattern.endswith("*"):
        return [pattern]
    known = dict.fromkeys(name for run in runs for m in run.metrics for name in m)
    names = [name for name in known if name.startswith(pattern[:-1])]
    if pattern == "reward/*" and len(names) == 1:
        return []                                # it is the reward itself
    return names


def charts(pattern, runs):
    """[(metric, SVG), ...] of the metrics that a pattern means and that have something to show."""
    shown = []
    for name in metrics_like(pattern, runs):
        lines = [(run.name, doctor.points(run.metrics, name)) for run in runs]
        lines = [(label, points) for label, points in lines if points]
        values = {value for _, points in lines for _, value in points}
        if lines and not (name in TRIVIAL and values <= TRIVIAL[name]):
            shown.append((name, chart(lines, len(runs) > 1)))
    return shown


def chart(lines, labelled):
    """An SVG of lines [(label, points), ...]: each as it is, pale, and smoothed."""
    from matplotlib import figure, rc_context
    with rc_context(STYLE):
        fig, strong = figure.Figure(figsize=(3.8, 1.9), layout="constrained"), []
        ax = fig.subplots()
        for i, (_, points) in enumerate(lines):
            ax.plot(*zip(*points), f"C{i}", alpha=0.3, linewidth=0.8)
            marker = "o" if len(points) == 1 else ""
            strong += ax.plot(*zip(*smooth(points)), f"C{i}", marker=marker)
        ax.tick_params(length=0)
        ax.locator_params(axis="x", nbins=5, integer=True)
        ax.locator_params(axis="y", nbins=5)
        if labelled:
            labels = [label for label, _ in lines]
            add_legend(fig, strong, labels, loc="outside lower left", frameon=False)
        return content_of(fig.savefig, format="svg", metadata=NAMELESS)


def curves(metrics):
    """Reward by component, KL, entropy, diversity and, where it was measured, D, as a PNG."""
    from matplotlib import figure, rc_context
    names = dict.fromkeys(name for m in metrics for name in m)
    rewards = [name for name in names if name.startswith("reward/")]
    if len(rewards) != 1:
        rewards = ["reward", *rewards]
    panels = {"reward": rewards, "kl": ["kl"], "entropy": ["entropy"], "diversity": ["diversity"]}
    if doctor.points(metrics, "diversity_kept"):
        panels["diversity_kept"] = ["diversity_kept"]
    with rc_context({"text.parse_math": False}):
        fig = figure.Figure(figsize=(2.8 * len(panels), 2.8), layout="constrained")
        for ax, (title, names) in zip(fig.subplots(1, len(panels)), panels.items()):
            known = [name for name in names if doctor.points(metrics, name)]
            lines = [line for name in known
                     for line in ax.plot(*zip(*doctor.points(metrics, name)), linewidth=1)]
            ax.set_title(title, fontsize=9)
            ax.set_xlabel("step", fontsize=8)
            ax.tick_params(labelsize=7)
            if title == "reward":
                add_legend(ax, lines, [name.removeprefix("reward/") for name in known], fontsize=7)
        return content_of(fig.savefig, dpi=110)


# ---------------------------------------------------------------------------------------------
# The sections
# ---------------------------------------------------------------------------------------------

def results(run):
    """{name: (before, after)}: of the evaluations, or else of the first and last steps."""
    if run.summary:
        before, after = run.summary["before"], run.summary["after"]
        return {name: (before.get(name), value) for name, value in after.items()
                if not isinstance(value, dict)}
    few, found = max(1, min(10, len(run.metrics) // 4)), {}
    for name in ("reward", "kl", "entropy", "diversity"):
        values = [value for _, value in doctor.points(run.metrics, name)]
        if values:
            found[name] = doctor.mean(values[:few]), doctor.mean(values[-few:])
    return found


def all_results(runs):
    """[(name, [before of the first run that has it, after of each]), ...]."""
    rows = {}
    for k, run in enumerate(runs, 1):
        for name, (before, after) in results(run).items():
            row = rows.setdefault(name, [before] + [None] * len(runs))
            row[k] = after
    return list(rows.items())


def shown_scores(arrays):
    """[(its number in the arrays, name), ...] of the scores that stand below a picture."""
    names = arrays["names"].tolist()
    column = dict(zip(names, arrays["scores_before"]))
    hidden = {"entropy", "diversity"}
    if sum(name.startswith("reward/") for name in names) == 1:
        hidden.add("reward")                     # it is that part's, but for a weight
    if "verified" in column and "reward/shapes" in column and np.array_equal(
            column["verified"], column["reward/shapes"], equal_nan=True):
        hidden.add("verified")                   # the reward says it
    return [(k, name.removeprefix("reward/")) for k, name in enumerate(names)
            if name not in hidden and not name.startswith("verified/")]


def choices(arrays):
    """{title: [(row, sample), ...]}: the best, worst and most changed pairs, by the reward, then
    those of all prompts evenly."""
    old, new = (np.nan_to_num(arrays[f"scores_{when}"][0]).astype(float)
                for when in ("before", "after"))
    moved = np.abs(arrays["after"].astype(int) - arrays["before"]).mean(axis=(2, 3, 4))
    moved = moved / (1 + moved.max())            # below 1: it only orders what is otherwise equal
    tiny = 1e-6 * (1 + np.abs(new).max())
    orders = {"Best": -new - tiny * moved, "Worst": new - tiny * moved,
              "Most changed": -np.abs(new - old) - tiny * moved}
    shown = {}
    for title, order in orders.items():
        best = order.argmin(axis=1)              # of each prompt, so that prompts differ
        rows = order.min(axis=1).argsort(kind="stable")[:PICKED]
        shown[title] = [(row, best[row]) for row in rows]
    count, samples = new.shape
    rows = np.linspace(0, count - 1, min(ROWS, count)).astype(int)
    shown["All prompts"] = [(row, i) for row in rows for i in range(min(SAMPLES, samples))]
    return shown


def rounded(values):
    return values.astype(float).round(4).tolist()


def sprite(patches):
    """Patches (K, h, w, 3) in one picture, and how many stand in a row of it."""
    K, h, w, _ = patches.shape
    columns = max(1, min(K, 2048 // w))
    rows = -(-K // columns)
    cells = np.zeros((rows * columns, h, w, 3), np.uint8)
    cells[:K] = patches
    cells = cells.reshape(rows, columns, h, w, 3).swapaxes(1, 2)
    return cells.reshape(rows * h, columns * w, 3), columns


def differing(runs):
    """[(setting, value in each run), ...] for the settings that are not the same in all runs."""
    names = dict.fromkeys(name for run in runs for name in run.settings)
    rows = [(name, [str(run.settings.get(name)) for run in runs]) for name in names
            if name not in ("out", "resume", "log")]
    return [(name, values) for name, values in rows if len(set(values)) > 1]


def common_prompts(runs):
    """[(text, its row in each run), ...]: of the prompts that every run evaluated."""
    texts = [run.arrays["texts"].tolist() for run in runs]
    common = [text for text in texts[0] if all(text in other for other in texts)]
    return [(text, [own.index(text) for own in texts]) for text in common[:ROWS // 2]]


# ---------------------------------------------------------------------------------------------
# The page
# ---------------------------------------------------------------------------------------------

def number(value):
    """A number for a table; what is not known is a dash."""
    if value is None or (isinstance(value, float) and np.isnan(value)):
        return "–"
    if isinstance(value, float):
        return f"{value:.3g}" if abs(value) < 0.01 and value else f"{value:.3f}"
    return str(value)


def page(runs):
    """The HTML of one run's page, or of several runs'."""
    import jinja2
    loader = jinja2.FileSystemLoader(Path(__file__).parent, encoding="utf-8")
    environment = jinja2.Environment(loader=loader, autoescape=True, trim_blocks=True,
                                     lstrip_blocks=True)
    environment.filters |= {"number": number, "short": "{:.2f}".format, "uri": data_uri,
                            "file_uri": file_uri, "exp": np.exp, "rounded": rounded}
    environment.globals |= {f.__name__: f for f in (
        all_results, charts, choices, common_prompts, differing, frames_of, is_small, shown_scores,
        sprite)}
    one = runs[0] if len(runs) == 1 else None
    return environment.get_template("report.html.j2").render(
        runs=names_apart(runs), one=one, most=ROWS, small=SMALL,
        diagnoses=[doctor.diagnose(run.metrics, run.settings, run.summary) for run in runs])


def write_page(folders, path):
    """The page of the runs in the folders."""
    return write(path, page([read_run(folder) for folder in folders]).encode(errors="replace"))


def show(folder, attempt=lambda what, make: make()):
    """Makes everything that a run shows, of whatever is in its folder; returns the paths.

    attempt(what, make) calls make, which returns a path."""
    run, frames = read_run(folder), frames_of(folder)
    makers = {"report.html": lambda: write_page([folder], folder / "report.html")}
    if run.metrics:
        makers["curves.png"] = lambda: write(folder / "curves.png", curves(run.metrics))
    if "after" in run.arrays:
        makers["before_after.png"] = lambda: write(
            folder / "before_after.png", content_of(sheet_of_pairs(run.arrays).save, format="png"))
    if frames:
        makers["progress.gif"] = lambda: write(folder / "progress.gif", animation(frames))
    paths = [attempt(what, make) for what, make in makers.items()]
    return [path for path in paths if path]
