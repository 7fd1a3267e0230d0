"""The page of a run, or of several: one HTML file that needs nothing else.

It is made from the files in the run's folder, whatever is there of them, and loads no model and no
reward: so it can also be made of a run that is still going or was killed.
"""

import base64
import io
import json
from collections import namedtuple
from pathlib import Path

import numpy as np
from PIL import Image

from harness import curves, doctor

RunData = namedtuple("RunData", "name folder config settings metrics summary arrays")
SMALL = 72                                       # pixels: smaller images are shown as they are
ROWS, SAMPLES, PICKED = 32, 3, 6                 # prompts on the page, pairs of each; best, worst


# ---------------------------------------------------------------------------------------------
# Reading
# ---------------------------------------------------------------------------------------------

def read_run(folder):
    """What is in a run's folder.  Raises FileNotFoundError if it holds no run."""
    folder = Path(folder)
    if not (folder / "config.json").exists():
        raise FileNotFoundError(f"{folder} holds no run: there is no {folder / 'config.json'}")
    config = json.loads((folder / "config.json").read_text())
    summary, arrays = {}, {}
    if (folder / "summary.json").exists():
        summary = json.loads((folder / "summary.json").read_text())
    if (folder / "report.npz").exists():
        with np.load(folder / "report.npz") as file:
            arrays = dict(file)
    settings = config["settings"] | {"device": config.get("device", "")}
    name = folder.resolve().name
    metrics = read_log(folder / "metrics.jsonl")
    return RunData(name, folder, config, settings, metrics, summary, arrays)


def read_log(path):
    """The metrics of all steps in the log.  A last line that was being written is left out."""
    metrics = []
    for line in path.read_text().splitlines() if path.exists() else ():
        try:
            metrics.append(json.loads(line))
        except json.JSONDecodeError:
            break
    return metrics


def names_apart(runs):
    """The same runs, those of equal names renamed to their whole paths."""
    names = [run.name for run in runs]
    return [run._replace(name=str(run.folder)) if names.count(run.name) > 1 else run
            for run in runs]


# ---------------------------------------------------------------------------------------------
# Pictures as text
# ---------------------------------------------------------------------------------------------

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
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, kind, quality=88)
    return file_uri(file.getvalue(), kind)


def frames(folder):
    """The pictures of progress, as addresses."""
    files = sorted((folder / "progress").glob("*.*g"))
    return [file_uri(file.read_bytes(), file.suffix[1:]) for file in files]


# ---------------------------------------------------------------------------------------------
# The sections
# ---------------------------------------------------------------------------------------------

def results(run):
    """[(name, before, after), ...]: of the evaluations, or else of the first and last steps."""
    if run.summary:
        before, after = run.summary["before"], run.summary["after"]
        return [(name, before.get(name), value) for name, value in after.items()
                if not isinstance(value, dict)]
    few = max(1, min(10, len(run.metrics) // 4))
    rows = []
    for name in ("reward", "kl", "entropy", "diversity"):
        values = [m[name] for m in run.metrics if m.get(name) is not None]
        if values:
            rows.append((name, sum(values[:few]) / few, sum(values[-few:]) / few))
    return rows


def all_results(runs):
    """[(name, [before of the first run, after of each]), ...]."""
    tables = [{name: (before, after) for name, before, after in results(run)} for run in runs]
    names = dict.fromkeys(name for table in tables for name in table)
    rows = []
    for name in names:
        before = next((t[name][0] for t in tables if name in t), None)
        rows.append((name, [before] + [t.get(name, (None, None))[1] for t in tables]))
    return rows


def score_names(arrays):
    """Which scores stand below a picture."""
    names = [n for n in arrays["names"].tolist() if n not in ("entropy", "diversity")]
    if sum(name.startswith("reward/") for name in names) == 1:
        names.remove("reward")                   # it is that part's, but for a weight
    column = dict(zip(arrays["names"].tolist(), arrays["scores_before"]))
    if "verified" in names and np.array_equal(column["verified"], column.get("reward/shapes")):
        names.remove("verified")                 # the reward says it
    return [n for n in names if not n.startswith("verified/")]


def pair(arrays, row, sample):
    """A picture before and after, with its prompt and scores."""
    names, scores = arrays["names"].tolist(), []
    for name in score_names(arrays):
        k = names.index(name)
        two = [arrays[f"scores_{when}"][k, row, sample] for when in ("before", "after")]
        scores.append((name.removeprefix("reward/"), *map(float, two)))
    return {"text": str(arrays["texts"][row]), "scores": scores,
            "before": data_uri(arrays["before"][row, sample]),
            "after": data_uri(arrays["after"][row, sample])}


def pairs(arrays):
    """{title: pairs}: best, worst and most changed, by the reward, then all prompts evenly."""
    if "after" not in arrays:
        return {}
    old, new = (np.nan_to_num(arrays[f"scores_{when}"][0]) for when in ("before", "after"))
    moved = np.abs(arrays["after"].astype(int) - arrays["before"]).mean(axis=(2, 3, 4))
    moved = moved / (1 + moved.max())            # below 1: it only orders what is otherwise equal
    tiny = 1e-6 * (1 + np.abs(new).max())
    orders = {"Best": -new - tiny * moved, "Worst": new - tiny * moved,
              "Most changed": -np.abs(new - old) - tiny * moved}
    shown = {}
    for title, order in orders.items():
        best = order.argmin(axis=1)              # of each prompt, so that prompts differ
        rows = order.min(axis=1).argsort(kind="stable")[:PICKED]
        shown[title] = [pair(arrays, row, best[row]) for row in rows]
    count, samples = new.shape
    rows = np.linspace(0, count - 1, min(ROWS, count)).astype(int)
    shown["All prompts"] = [
        pair(arrays, row, i) for row in rows for i in range(min(SAMPLES, samples))]
    return shown


def minds(arrays):
    """Where the policy changed its mind, for the page's script, or None."""
    if "mind_kl" not in arrays:
        return None
    a = {name.removeprefix("mind_"): value for name, value in arrays.items()}
    pictures = []
    for q in range(len(a["kl"])):
        pictures.append({
            "text": str(a["texts"][q]), "drawn": ("before", "after")[q % 2],
            "image": data_uri(a["pictures"][q]), "kl": rounded(a["kl"][q]),
            "entropy": rounded(a["entropy"][:, q]), "logp": rounded(a["logp"][:, q]),
            "tokens": a["tokens"][q].tolist(), "codes": a["top"][:, q].tolist(),
            "chance": rounded(np.exp(a["top_logp"][:, q])), "patch": a["patch_of"][:, q].tolist()})
    sheet, columns = sprite(a["patches"])
    height, width = a["patches"].shape[1:3]
    patch = a["pictures"].shape[1] / a["tokens"].shape[1] ** 0.5     # pixels, without the margin
    return {"pictures": pictures, "sprite": data_uri(sheet, sharp=width <= SMALL // 2),
            "columns": columns, "width": width, "height": height, "inner": patch / width}


def rounded(values):
    return np.asarray(values, float).round(4).tolist()


def sprite(patches):
    """Patches (K, h, w, 3) in one picture, and how many stand in a row of it."""
    K, h, w, _ = patches.shape
    columns = max(1, min(K, 2048 // w))
    rows = -(-K // columns)
    sheet = np.zeros((rows * columns, h, w, 3), np.uint8)
    sheet[:K] = patches
    sheet = sheet.reshape(rows, columns, h, w, 3).swapaxes(1, 2)
    return sheet.reshape(rows * h, columns * w, 3), columns


def differing(runs):
    """[(setting, value in each run), ...] for the settings that are not the same in all runs."""
    names = dict.fromkeys(name for run in runs for name in run.settings)
    rows = [(name, [str(run.settings.get(name)) for run in runs]) for name in names
            if name not in ("out", "resume", "log")]
    return [(name, values) for name, values in rows if len(set(values)) > 1]


def side_by_side(runs):
    """[(text, [(label, address), ...]), ...]: the first pictures of each prompt in all runs.

    Of the prompts that every run evaluated; before training, and after each run."""
    done = [run for run in runs if "after" in run.arrays]
    if len(done) < 2:
        return []
    texts = [run.arrays["texts"].tolist() for run in done]
    common = [text for text in texts[0] if all(text in other for other in texts)][:ROWS // 2]
    rows = []
    for text in common:
        pictures = [("before", data_uri(done[0].arrays["before"][texts[0].index(text), 0]))]
        for run, own in zip(done, texts):
            for i in range(min(2, run.arrays["after"].shape[1])):
                pictures.append((run.name, data_uri(run.arrays["after"][own.index(text), i])))
        rows.append((text, pictures))
    return rows


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
    runs = names_apart(runs)
    loader = jinja2.FileSystemLoader(Path(__file__).parent)
    environment = jinja2.Environment(loader=loader, autoescape=True, trim_blocks=True,
                                     lstrip_blocks=True)
    environment.filters |= {"number": number, "short": "{:.2f}".format, "uri": data_uri}
    content = dict(
        runs=runs, results=all_results(runs), is_small=is_small, most=ROWS,
        panels=[(title, file_uri(svg.encode(), "svg+xml"), sentence) for title, svg, sentence
                in curves.panels([(run.name, run.metrics) for run in runs])],
        diagnoses=[doctor.diagnose(run.metrics, run.settings, run.summary) for run in runs])
    if len(runs) == 1:
        one, = runs
        content |= dict(one=one, frames=frames(one.folder), pairs=pairs(one.arrays),
                        minds=minds(one.arrays))
    else:
        content |= dict(differing=differing(runs), pictures=side_by_side(runs))
    return environment.get_template("report.html.j2").render(content)


def write_page(folders, path):
    """Writes the page of the runs in the folders; replaces what was there."""
    text = page([read_run(folder) for folder in folders])
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(text, encoding="utf-8")
    temporary.replace(path)
