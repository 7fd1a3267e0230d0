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
import fnmatch
import io
import json
from collections import namedtuple
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from harness import doctor
from harness.logs import plain, read_log, write_bytes

RunData = namedtuple("RunData", "name folder config settings metrics summary arrays")
SMALL = 72                                       # pixels: smaller images are shown as they are
GAP, LINE, HEAD = 4, 20, 30                      # pixels: between pictures, of texts, of titles
ROWS, SAMPLES, PICKED = 32, 3, 6                 # prompts on the page, pairs of each; best, worst
TRIVIAL = {"ratio_max": 1, "clip_frac": 0, "missing": 0}     # always so: these need no chart
STYLE = {                                        # of curves: small, and the same every time
    "svg.fonttype": "none", "svg.hashsalt": "curves", "text.parse_math": False, "font.size": 8,
    "axes.titlesize": 9, "xtick.color": "#6b7280", "ytick.color": "#6b7280", "axes.grid": True,
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
    config = read(folder / "config.json", json.load)
    if "settings" not in config:                 # a model of Hugging Face has such a file, too
        raise FileNotFoundError(f"{folder} holds no run: there is no {folder / 'config.json'} with "
                                "a run's settings")
    settings = config["settings"] | {"device": config.get("device", "")}
    return RunData(folder.resolve().name, folder, config, settings,
                   read_log(folder / "metrics.jsonl"), read(folder / "summary.json", json.load),
                   read(folder / "report.npz", lambda file: dict(np.load(file))))


def read(path, parse):
    """The dict that parse(file) makes of a file, an empty one if there is none."""
    if not path.exists():
        return {}
    with open(path, "rb") as file:
        try:
            return parse(file)
        except Exception as error:               # a damaged file can fail anywhere
            raise ValueError(f"{path} is damaged: {error}") from error


def content_of(save, **how):
    """The bytes that save(file, ...) writes, such as a PIL picture's."""
    file = io.BytesIO()
    save(file, **how)
    return file.getvalue()


# ---------------------------------------------------------------------------------------------
# Pictures
# ---------------------------------------------------------------------------------------------

def sheet(blocks, columns, cell, titles):
    """Blocks of pictures as one picture, `columns` of them side by side, and the titles on top.

    A block is (text, pictures (n, H, W, 3) uint8, notes): its text stands above its pictures, which
    are `cell` pixels wide, and a note below each, if there are notes."""
    font, large = ImageFont.load_default(13), ImageFont.load_default(17)
    columns, (_, pictures, notes) = min(columns, len(blocks)), blocks[0]
    width, height = len(pictures) * (cell + GAP) + 2 * GAP, LINE + cell + 2 * GAP
    if notes:
        height += LINE
    size = columns * width + GAP, -(-len(blocks) // columns) * height + HEAD
    canvas = Image.new("RGB", size, "white")
    draw = ImageDraw.Draw(canvas)
    for column, title in enumerate(titles):
        draw.text((column * width + 2 * GAP, 5), plain(title), "black", large)
    for k, (text, pictures, notes) in enumerate(blocks):
        left, top = k % columns * width + 2 * GAP, k // columns * height + HEAD
        draw.text((left, top), plain(text)[:width // 6], "black", font)
        for i, pixels in enumerate(pictures):
            x, y = left + i * (cell + GAP), top + LINE
            # A box is the mean of what it covers: of a small image, one pixel.
            picture = Image.fromarray(pixels).resize((cell, cell), Image.Resampling.BOX)
            canvas.paste(picture, (x, y))
            if notes:
                draw.text((x + cell // 2, y + cell), notes[i], "black", font, anchor="ma")
    return canvas


def sheet_of_pairs(run, rows=8):
    """Pictures before and after side by side: a row a prompt, the same seeds, with the rewards."""
    blocks, a = [], run.arrays
    for i in np.linspace(0, len(a["texts"]) - 1, min(rows, len(a["texts"]))).astype(int):
        for when in ("before", "after"):
            notes = [short(score) for score in a[f"scores_{when}"][0, i]]
            blocks.append((a["texts"][i], a[when][i], notes))
    return content_of(sheet(blocks, 2, 96, ["before", "after"]).save, format="png")


def frames_of(folder):
    """The files of progress, in order.  Hidden ones, as of macOS, are none."""
    return sorted((Path(folder) / "progress").glob("[!.]*.*g"))


def animation(run):
    """The pictures of progress as one GIF, which stands still at its end, for 3 seconds."""
    first, *others = [Image.open(file).convert("P", palette=Image.Palette.ADAPTIVE)
                      for file in frames_of(run.folder)]
    times = [400] * len(others) + [3000]                                     # milliseconds
    return content_of(first.save, format="GIF", save_all=True, append_images=others,
                      duration=times, loop=0)


def file_uri(content, kind):
    """A file's bytes as an address inside the page."""
    return f"data:image/{kind};base64,{base64.b64encode(content).decode()}"


def is_small(pixels):
    """Whether pictures (..., H, W, 3) are to be shown pixel by pixel."""
    return min(pixels.shape[-3:-1]) <= SMALL


def data_uri(pixels, sharp=False):
    """Pixels (H, W, 3), uint8, as the address of a picture.  It loses nothing if it is to be sharp,
    as all small ones are."""
    kind = "png" if sharp or is_small(pixels) else "jpeg"
    return file_uri(content_of(Image.fromarray(pixels).save, format=kind, quality=88), kind)


# ---------------------------------------------------------------------------------------------
# Curves
# ---------------------------------------------------------------------------------------------

def smooth(points):
    """A running mean of up to a twentieth of the points to either side."""
    reach, (steps, values) = len(points) // 20, zip(*points)
    return [(step, doctor.mean(values[max(0, i - reach):i + reach + 1]))
            for i, step in enumerate(steps)]


def metrics_like(pattern, runs):
    """The metrics that a pattern means, in the order in which they first come up.  A star at its
    end stands for anything."""
    known = dict.fromkeys(name for run in runs for m in run.metrics for name in m)
    names = fnmatch.filter(known, pattern)
    return names if pattern != "reward/*" or len(names) > 1 else []      # it is the reward itself


def lines_of(named):
    """Lines [(label, points), ...] of [(label, metrics, metric), ...], where there are points."""
    lines = [(label, doctor.points(metrics, name)) for label, metrics, name in named]
    return [(label, points) for label, points in lines if points]


def charts(pattern, runs):
    """[(metric, SVG), ...] of the metrics that a pattern means and that have something to show."""
    shown = []
    for name in metrics_like(pattern, runs):
        lines = lines_of((run.name, run.metrics, name) for run in runs)
        values = {value for _, points in lines for _, value in points}
        if lines and values != {TRIVIAL.get(name)}:
            shown.append((name, plot({"": lines}, 3.8, 1.9, format="svg", metadata=NAMELESS,
                                     transparent=True)))
    return shown


def curves(run):
    """Reward by component, KL, entropy, diversity and, where it was measured, D, as a PNG."""
    panels = {name: lines_of([(name, run.metrics, name)])
              for name in ("reward", "kl", "entropy", "diversity", "diversity_kept")}
    panels["reward"] += lines_of((name, run.metrics, name)
                                 for name in metrics_like("reward/*", [run]))
    if not panels["diversity_kept"]:
        del panels["diversity_kept"]
    return plot(panels, 2.8, 2.4, dpi=110)


def plot(panels, width, height, **how):
    """Panels {title: lines} side by side, of so many inches each, as the bytes of a picture.

    A line (label, points) is drawn as it is, pale, and smoothed."""
    from matplotlib import figure, rc_context
    with rc_context(STYLE):
        fig = figure.Figure(figsize=(width * len(panels), height), layout="constrained")
        for k, (title, lines) in enumerate(panels.items(), 1):
            ax = fig.add_subplot(1, len(panels), k, title=title, xlabel="step")
            for i, (label, points) in enumerate(lines):
                ax.plot(*zip(*points), f"C{i}", alpha=0.3, linewidth=0.8)
                # The dot shows a line of a single point.  matplotlib leaves out a label that begins
                # with an underscore.
                ax.plot(*zip(*smooth(points)), f"C{i}.-", markevery=[-1], label=f" {plain(label)}")
            ax.tick_params(length=0)
            ax.locator_params(axis="x", nbins=5, integer=True)
            ax.locator_params(axis="y", nbins=5)
            if len(lines) > 1:
                fig.legend(*ax.get_legend_handles_labels(), loc="outside lower left",
                           ncols=len(panels), frameon=False)
        return content_of(fig.savefig, **how)


# ---------------------------------------------------------------------------------------------
# The sections
# ---------------------------------------------------------------------------------------------

def all_results(runs):
    """[(name, [before of the first run that has it, after of each]), ...] of the evaluations."""
    rows, after = {}, [run.summary.get("after", {}) for run in runs]
    for run, own in zip(runs, after):
        for name, value in own.items():
            if name not in rows and not isinstance(value, dict):
                values = [other.get(name) for other in after]
                rows[name] = [run.summary["before"].get(name), *values]
    return list(rows.items())


def shown_scores(arrays):
    """[(its number in the arrays, name), ...] of the scores that stand below a picture: but for
    those that repeat another one."""
    names, first = arrays["names"].tolist(), {}
    for k, column in enumerate(np.hstack([arrays["scores_before"], arrays["scores_after"]])):
        if names[k] not in ("entropy", "diversity") and not names[k].startswith("verified/"):
            first.setdefault(column.tobytes(), k)
    return [(k, names[k].removeprefix("reward/")) for k in first.values()]


def rewards_of(arrays):
    """The rewards before and after, (M, n) each; NaN where one is missing."""
    return [np.nan_to_num(arrays[f"scores_{when}"][0], nan=np.nan).astype(float)
            for when in ("before", "after")]


def highest(values, arrays, count):
    """[(row, sample), ...]: of each prompt the picture whose value (M, n) is highest, and of the
    prompts the first `count`, in their order.

    Of equal values that comes first whose pixels changed most.  NaN comes last."""
    moved = np.abs(arrays["after"].astype(int) - arrays["before"]).mean(axis=(2, 3, 4))  # (M, n)
    best = {}
    for place in np.lexsort((-moved.ravel(), -values.ravel())):
        row, sample = divmod(int(place), values.shape[1])
        best.setdefault(row, sample)
    return list(best.items())[:count]


def choices(arrays):
    """{title: [(row, sample), ...]}: the best, worst and most changed pairs, by the reward, then
    those of all prompts evenly."""
    old, new = rewards_of(arrays)
    orders = {"Best": new, "Worst": -new, "Most changed": np.abs(new - old)}
    shown = {title: highest(order, arrays, PICKED) for title, order in orders.items()}
    count, samples = new.shape
    rows = np.linspace(0, count - 1, min(ROWS, count)).astype(int)
    shown["All prompts"] = [(row, i) for row in rows for i in range(min(SAMPLES, samples))]
    return shown


def sprite(patches):
    """Patches (K, h, w, 3) in one picture, and how many stand in a row of it."""
    K, h, w, _ = patches.shape
    columns = max(1, min(K, 2048 // w))
    cells = np.pad(patches, [(0, -K % columns), (0, 0), (0, 0), (0, 0)])
    cells = cells.reshape(-1, columns, h, w, 3).swapaxes(1, 2)
    return cells.reshape(-1, columns * w, 3), columns


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
    if value is None or value != value:          # NaN
        return "–"
    if isinstance(value, float):
        return f"{value:.3g}" if 0 < abs(value) < 0.01 else f"{value:.3f}"
    return str(value)


def short(score):
    """A score below a picture."""
    return "-" if np.isnan(score) else f"{score:.2f}"


def rounded(values):
    return values.astype(float).round(4).tolist()


def page(*runs):
    """The HTML of one run's page, or of several runs', in bytes."""
    import jinja2
    environment = jinja2.Environment(loader=jinja2.FileSystemLoader(Path(__file__).parent),
                                     autoescape=True, trim_blocks=True, lstrip_blocks=True)
    environment.filters |= {function.__name__: function for function in (
        all_results, charts, choices, common_prompts, data_uri, differing, file_uri, frames_of,
        is_small, number, rounded, short, shown_scores, sprite)}
    if len({run.name for run in runs}) < len(runs):
        runs = [run._replace(name=str(run.folder)) for run in runs]
    one = runs[0] if len(runs) == 1 else None
    diagnoses = [doctor.diagnose(run.metrics, run.settings, run.summary) for run in runs]
    html = environment.get_template("report.html.j2").render(
        runs=runs, one=one, most=ROWS, diagnoses=diagnoses)
    return html.encode(errors="replace")


def write_made(path, make, run):
    """Writes what make(run) returns; returns the path."""
    return write_bytes(path, make(run))


def show(folder, attempt=lambda what, function, *given: function(*given)):
    """Makes everything that a run shows, of whatever is in its folder; returns the paths.

    attempt(what, function, *given) calls function(*given)."""
    run, makers = read_run(folder), {"report.html": page}
    if run.metrics:
        makers["curves.png"] = curves
    if "after" in run.arrays:
        makers["before_after.png"] = sheet_of_pairs
    if frames_of(folder):
        makers["progress.gif"] = animation
    paths = [attempt(name, write_made, run.folder / name, make, run)
             for name, make in makers.items()]
    return [path for path in paths if path]
