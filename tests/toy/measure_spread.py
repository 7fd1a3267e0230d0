"""Measures how varied the pictures of the shipped toy are, the yardstick of a run's D.  By hand:

    python -m tests.toy.measure_spread       # rewrites toy/weights/spread.json: after new weights
"""

import json

import torch

import toy
from argrpo import draw_images, rng_for


def measure_spread(folder, samples=128):
    """Writes spread.json into the folder: what `spread_by_prompt` says of the right ones among
    `samples` pictures of each prompt that a run's D looks at."""
    evaluated = toy.mixed(toy.PAIRS, toy.CLASSES)
    texts = {"c2i": toy.CLASSES,
             "t2i": [evaluated[k] for k in torch.linspace(0, len(evaluated) - 1, 27).long()]}
    result = {}
    for task, some in texts.items():
        gpt, vq = toy.load(task, folder)
        prompts, parts = toy.as_prompts(task, some), {}
        for k in range(len(some)):
            _, _, images = draw_images(gpt, vq, prompts, torch.tensor([k]),
                                       rng_for("cpu", "spread", task, k), micro_batch=64,
                                       samples_per_prompt=samples)
            for part, values in toy.spread_by_prompt(images, [some[k]] * samples).items():
                parts.setdefault(part, {}).update(values)
        result[task] = {"texts": some, "samples": samples, "parts": parts}
    (folder / "spread.json").write_text(json.dumps(result, indent=1) + "\n", "utf-8")


if __name__ == "__main__":
    measure_spread(toy.FOLDER)
