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

from dataclasses import dataclass, field
from pathlib import Path

import torch

import captions
import pretrained
import reward
import toy
from harness import compare, fidelity, options, processes
from harness.choices import caption_encoder, check_task, checkpoint, class_prompts, load_models
from harness.logs import one_line_errors, write_json


@dataclass
class EvaluateSettings(options.DrawSettings):
    gpt_ckpt: list[str] = field(default_factory=lambda: ["base"])    # a checkpoint, and again for
                                         # each other one: "base", the default, a file, a folder, or
                                         # a Hugging Face repo or repo:file; with @1 behind it drawn
                                         # with seed 1
    task: str = ""                       # "c2i" or "t2i", of the toy; else the preset's
    samples: int = 0                     # pictures of each prompt; 0 is 32 for the toy, 50 for a
                                         # class, 4 for a caption
    rewards: str = ""                    # rewards to report, as in --reward of the training scripts
    reference: str = ""                  # real pictures for FID, precision and recall: a folder, or
                                         # an .npz such as ADM's (needs torch-fidelity)
    out: str = "evaluation"              # folder for pictures and results

    LEAST = dict(samples=0, cfg_scale=0)


def check(settings):
    """The task, and {what the table calls a checkpoint: (what to load, its seed)}.

    Raises ValueError, before anything is drawn, for what cannot be."""
    s = settings
    task = s.task or ("t2i" if s.prompts else "c2i")
    if task not in ("c2i", "t2i"):
        raise ValueError(f"--task must be c2i or t2i, not {s.task!r}")
    check_task(s.preset, task)
    options.check_writable(s.out)
    checkpoints, taken = {}, {"results.json", "results.md", "grid.png"}
    for spec in s.gpt_ckpt:
        label, place, seed = checkpoint(spec, s.seed)
        if label.casefold() in taken:            # some file systems do not tell A from a
            raise ValueError(f"two checkpoints would be called {label!r} in the table: copy or "
                             "link one of them under another name")
        taken.add(label.casefold())
        if place:                                # what is missing is missed before all drawing
            pretrained.fetch(place, pretrained.GPT_HINT)
        checkpoints[label] = place, seed
    return task, checkpoints


def choose_texts(settings):
    """The classes' texts or the captions, and GenEval's category of each, or none at all."""
    if settings.task == "c2i":
        return class_prompts(settings.preset, settings.classes).texts, []
    if settings.preset == "toy" and not settings.prompts:
        # Every fifth: these meet all four relations.
        return (toy.PAIRS + toy.CLASSES)[::5], []
    tagged = captions.read_tags(settings.prompts)
    texts, tags = list(tagged), [tag for own in tagged.values() for tag in own]
    if tags and any(len(own) != 1 for own in tagged.values()):
        raise ValueError(f"{settings.prompts} has {len(tags)} tags for {len(texts)} different "
                         "prompts: GenEval's categories need one tag for each, or none at all")
    return texts, tags


def main(argv=None):
    with one_line_errors():
        given = options.read_options(EvaluateSettings, argv, "evaluate.py", __doc__)
        settings = EvaluateSettings(**given)
        settings.task, checkpoints = check(settings)
        c2i, published = settings.task == "c2i", settings.preset in pretrained.MODELS
        settings.samples = settings.samples or (32 if not published else 50 if c2i else 4)
        device, out = processes.pick_device(settings.device), Path(settings.out)
        texts, tags = choose_texts(settings)
        index = torch.arange(len(texts)).repeat_interleave(settings.samples)
        if settings.reference:
            fidelity.check_reference(settings.reference, len(index))
        reward_fn = reward.RewardSet({})
        if settings.rewards:
            reward_fn = reward.build_rewards(settings.rewards, device)
            reward_fn.check_prompts(texts)
        prompts = (class_prompts(settings.preset, settings.classes) if c2i else
                   caption_encoder(settings.preset, settings.t5, device)(texts))
        for label, (place, seed) in checkpoints.items():
            model, vq = load_models(settings.preset, settings.task, place, settings.vq_ckpt)
            compare.draw_shards(model.to(device), vq.to(device), prompts, index, out / label, seed,
                                shard=processes.rank_and_size(), **settings.policy())
        processes.wait_for_all()
        if processes.rank_and_size()[0] > 0:
            return None

        labels, folders = list(checkpoints), [out / label for label in checkpoints]
        rows = compare.compare([
            compare.columns_of(folder, texts, tags, reward_fn, settings, device)
            for folder in folders])
        figures = [fidelity.figures_of(folder, texts, settings, device) for folder in folders]
        results = dict(settings=vars(settings), checkpoints=labels, metrics=rows, pictures=figures)
        write_json(out / "results.json", results)
        markdown = compare.as_markdown(rows, figures, labels, settings, len(texts))
        (out / "results.md").write_text(markdown, encoding="utf-8", errors="replace")
        compare.draw_grid(out / "grid.png", folders, texts, settings.samples, labels)
        print(markdown + f"wrote {out}/results.md, results.json and grid.png")
        return results


if __name__ == "__main__":
    main()
