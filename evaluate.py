"""Compares checkpoints: quality and diversity in one table, with intervals.

    python evaluate.py --gpt-ckpt base --gpt-ckpt runs/train_c2i-toy/model.pt          # the toy
    python evaluate.py --preset B-256 --gpt-ckpt base --gpt-ckpt CSshihao/AR-GRPO_C2I_B_256 \\
        --gpt-ckpt runs/train_c2i-B-256/model.pt --cfg-scale 2 --reference REFERENCE.npz
    python evaluate.py --preset t2i-XL-256 --gpt-ckpt base --gpt-ckpt CSshihao/AR-GRPO_T2I_XL_256 \\
        --prompts evaluation_metadata.jsonl --rewards geneval --cfg-scale 7.5
    torchrun --nproc_per_node 4 evaluate.py ...          # several GPUs draw

The first checkpoint is what the others are compared with; "base" is the preset's own.  All draw
the same prompts with the same random numbers; "base@1" is the base with those of another seed, to
see how much of a difference is chance.  Leaves results.json, results.md, grid.png and the
pictures in --out; after an interruption the same command goes on.  docs/reproduce.md tells which
commands answer which question.
"""

import json
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path

import torch
import torch.nn.functional as F
from PIL import ImageDraw, ImageFont

import argrpo
import captions
import pretrained
import reward
import toy
from harness import options, processes, scoring
from harness.checkpoints import write_json
from harness.drawing import SHARD, as_images, draw_shards, read_pictures, read_shards, shards
from harness.fid import ShardedPictures, fid_of_pictures
from harness.models import caption_encoder, choose_classes, class_names, load_models
from harness.processes import pick_device
from harness.progress import to_pillow
from harness.speed import Sampler
from toy.fid import fid_of_toy


@dataclass
class Settings:
    gpt_ckpt: list[str] = field(default_factory=list)    # a checkpoint, and again for each other
                                         # one: "base", a file, a folder, or a Hugging Face repo or
                                         # repo:file; with @1 behind it drawn with seed 1
    preset: str = "toy"                  # toy, B-256, L-256, B-384, L-384, XL-384, XXL-384, 3B-384,
                                         # t2i-XL-256 or t2i-XL-512
    task: str = ""                       # "c2i" or "t2i", of the toy; else the preset's
    vq_ckpt: str = ""                    # tokenizer weights of your own
    classes: str = "all"                 # classes to draw: "all", numbers or names
    prompts: str = ""                    # captions: one a line, or .json or .jsonl; GenEval's
                                         # evaluation_metadata.jsonl gives its categories, too
    samples: int = 0                     # pictures of each prompt; 0 is 32 for the toy, 50 for a
                                         # class, 4 for a caption
    rewards: str = ""                    # rewards to report, as in --reward of the training scripts
    reference: str = ""                  # real pictures for FID, precision and recall: a folder, or
                                         # an .npz such as ADM's (needs torch-fidelity)
    cfg_scale: float = 1.0               # classifier-free guidance: 1 is none
    temperature: float = 1.0             # of the policy
    top_k: int = 0                       # draw from the k likeliest codes only; 0 is all
    top_p: float = 1.0                   # draw from the likeliest codes of this total probability
    t5: str = "google/flan-t5-xl"        # text encoder of the t2i presets
    seed: int = 0                        # of the pictures
    device: str = ""                     # "cpu" or "cuda"; default: the GPU if there is one
    out: str = "evaluation"              # folder for pictures and results


def label_of(spec):
    """What the table calls a checkpoint: "base", a run's folder, or what is behind the last /."""
    spec, at, seed = spec.partition("@")
    path = Path(spec.split(":")[0])
    name = path.parent.name if path.name == "model.pt" else path.name.removesuffix(".pt")
    return name + at + seed


def place_and_seed(spec, seed):
    """What to load, "" for the preset's own, and the seed of its pictures."""
    place, at, own = spec.partition("@")
    if at and not own.isdigit():
        raise ValueError(f"--gpt-ckpt {spec}: behind the @ must be a seed such as 1, not {own!r}")
    return "" if place == "base" else place, int(own) if at else seed


def check(settings):
    """The task and the labels.  Raises ValueError, before anything is drawn, for what cannot be."""
    s = settings
    if not s.gpt_ckpt:
        raise ValueError("name at least one checkpoint: --gpt-ckpt base, or a file, folder or "
                         "Hugging Face repo")
    published = pretrained.MODELS.get(s.preset)
    task = published.task if published else s.task or "c2i"
    if task not in ("c2i", "t2i"):
        raise ValueError(f"--task must be c2i or t2i, not {s.task!r}")
    if task == "t2i" and published and not s.prompts:
        raise ValueError(f"preset {s.preset} draws captions: give it --prompts FILE, such as "
                         "GenEval's evaluation_metadata.jsonl (docs/reproduce.md)")
    if s.reference and not Path(s.reference).exists():
        raise ValueError(f"--reference: there is no {s.reference}")
    if s.samples < 0 or s.temperature <= 0 or s.cfg_scale < 0:
        raise ValueError("--samples and --cfg-scale must be at least 0, --temperature above 0, not "
                         f"{s.samples}, {s.cfg_scale}, {s.temperature}")
    labels = [label_of(spec) for spec in s.gpt_ckpt]
    for spec in s.gpt_ckpt:
        place_and_seed(spec, s.seed)
    for label in labels:
        if labels.count(label) > 1:
            raise ValueError(f"two checkpoints would be called {label!r} in the table: copy or "
                             "link one of them under another name")
    return task, labels


def choose_prompts(settings, task):
    """The prompts' texts, GenEval's categories or [], and the classes' numbers or None."""
    if task == "c2i":
        names = class_names(settings.preset)
        template = "{}" if settings.preset == "toy" else "a photo of {}"
        classes = choose_classes(settings.classes, names)
        return [template.format(names[k]) for k in classes], [], classes
    if not settings.prompts:                     # the toy's: every fifth meets all four relations
        return (toy.PAIRS + toy.CLASSES)[::5], [], None
    tagged = captions.read_tags(settings.prompts)
    texts, tags = list(tagged), [tag for own in tagged.values() for tag in own]
    if tags and any(len(own) != 1 for own in tagged.values()):
        raise ValueError(f"{settings.prompts} has {len(tags)} tags for {len(texts)} different "
                         "prompts: GenEval's categories need one tag for each, or none at all")
    return texts, tags, None


def evaluate_checkpoint(folder, texts, index, tags, reward_fn, settings, device):
    """Everything about one checkpoint's pictures: {metric: a number of each prompt (M,)}."""
    count, drawn = len(texts), [texts[k] for k in index.tolist()]
    is_toy, measure = settings.preset == "toy", None
    if is_toy:
        measure = toy.verify_by_kind if settings.task == "t2i" else toy.verify_all
    elif reward_fn and "imagenet" in reward_fn.rewards:
        measure = reward_fn.rewards["imagenet"][0].right_class
    scores = scoring.score_shards(folder, drawn, reward_fn, measure, device)
    table = {name: scoring.by_prompt(values, index, count) for name, values in scores.items()}
    if tags and "geneval" in table:              # right is what meets all demands
        right = scoring.by_prompt((scores["geneval"] >= 1).double(), index, count)
        table |= scoring.geneval_summary(right, tags)
    features = {name: scoring.feature_function(name, device) for name in scoring.FEATURES
                if reward_fn and name in reward_fn.rewards}
    table |= scoring.distances(folder, index, count, features)
    if is_toy:
        spread = toy.spread_by_prompt(as_images(read_shards(folder)), drawn)
        for name, values in spread.items():
            column = [values.get(text, float("nan")) for text in texts]
            table[f"spread/{name}"] = torch.tensor(column, dtype=torch.float64)
    return table


def write_grid(path, folders, index, labels, prompts=8, each=4):
    """The same pictures of all checkpoints side by side, a row a prompt."""
    from torchvision.utils import make_grid
    count, columns = int(index.max()) + 1, []
    rows = torch.linspace(0, count - 1, min(prompts, count)).long().tolist()
    numbers = [number for k in rows for number in (index == k).nonzero()[:each, 0].tolist()]
    for folder in folders:
        images = as_images(read_pictures(folder, numbers))
        images = F.interpolate(images, scale_factor=max(1, 72 // images.shape[-1]))
        columns.append(make_grid(images, nrow=len(numbers) // len(rows), pad_value=1))
    grid = F.pad(torch.cat(columns, dim=2), (6, 6, 26, 6), value=1)      # room for the labels
    picture = to_pillow(grid)
    draw = ImageDraw.Draw(picture)
    for i, label in enumerate(labels):
        draw.text((8 + i * columns[0].shape[2], 7), label, "black", ImageFont.load_default(13))
    picture.save(path)


def fid(folder, texts, settings):
    """FID and its kin by name: against settings.reference, or, of the toy, rendered scenes."""
    if settings.reference:
        pictures = ShardedPictures(shards(folder), SHARD, len(texts))
        return fid_of_pictures(pictures, settings.reference)
    if settings.preset == "toy" and find_spec("torch_fidelity"):
        return fid_of_toy(read_shards(folder), texts)
    return {}


PAPER = ("The column \"paper\" is empty: the paper's figures were not at hand where this program "
         "was written.  Fill it in from arXiv 2508.06924.")


def as_markdown(rows, others, labels, settings, count):
    lines = [f"{count} prompts, {settings.samples} pictures of each, guidance "
             f"{settings.cfg_scale:g}, temperature {settings.temperature:g}, seed {settings.seed}. "
             "In brackets: 95% intervals, by bootstrap over prompts; in parentheses: the change to "
             f"{labels[0]}, paired prompt by prompt.", "",
             f"| | {' | '.join(labels)} | paper |", "|---" * (len(labels) + 2) + "|"]
    for name, cells in rows.items():
        texts = [scoring.in_words(found, i == 0) for i, found in enumerate(cells)]
        lines.append(f"| {name} | {' | '.join(texts)} | |")
    for name in others[0]:
        lines.append(f"| {name} | {' | '.join(f'{other[name]:.4g}' for other in others)} | |")
    return "\n".join([*lines, "", PAPER, ""])


def main(argv=None):
    with options.one_line_errors():
        settings = Settings(**options.read_options(Settings, argv, "evaluate.py", __doc__))
        task, labels = check(settings)
        settings.task = task
        published = settings.preset in pretrained.MODELS
        settings.samples = settings.samples or (
            32 if not published else 50 if task == "c2i" else 4)
        device, out = pick_device(settings.device), Path(settings.out)
        texts, tags, classes = choose_prompts(settings, task)
        reward_fn = None
        if settings.rewards:
            reward_fn = reward.build_rewards(settings.rewards, device)
            reward_fn.check_prompts(texts)
        index = torch.arange(len(texts)).repeat_interleave(settings.samples)
        policy = dict(cfg_scale=settings.cfg_scale, temperature=settings.temperature,
                      top_k=settings.top_k, top_p=settings.top_p)
        prompts = (argrpo.Prompts(texts, torch.tensor(classes)) if task == "c2i" else
                   caption_encoder(settings.preset, settings.t5, device)(texts))
        for spec, label in zip(settings.gpt_ckpt, labels):
            place, seed = place_and_seed(spec, settings.seed)
            model, vq = load_models(settings.preset, task, place, settings.vq_ckpt)
            draw_shards(Sampler()(model.to(device)), vq.to(device), prompts, index, out / label,
                        seed, shard=processes.rank_and_size(), **policy)
        processes.wait_for_all()
        if processes.rank_and_size()[0] > 0:
            return None

        folders = [out / label for label in labels]
        tables = [evaluate_checkpoint(folder, texts, index, tags, reward_fn, settings, device)
                  for folder in folders]
        kept = [name for name in tables[0] if name.startswith("spread/")]
        rows = scoring.compare(tables, kept)
        rows = {name: cells for name, cells in rows.items() if name not in kept}
        drawn = [texts[k] for k in index.tolist()]
        others = [fid(folder, drawn, settings) for folder in folders]
        markdown = as_markdown(rows, others, labels, settings, len(texts))
        write_json(out / "results.json", {"settings": vars(settings), "checkpoints": labels,
                                          "metrics": rows, "pictures": others})
        (out / "results.md").write_text(markdown)
        write_grid(out / "grid.png", folders, index, labels)
        print(markdown + f"wrote {out}/results.md, results.json and grid.png")
        return json.loads((out / "results.json").read_text())


if __name__ == "__main__":
    main()
