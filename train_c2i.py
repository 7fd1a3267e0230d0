"""Improves a class-conditional image generator with AR-GRPO.

    python train_c2i.py                                  # the toy on a CPU: minutes, no download
    python train_c2i.py --reward my_rewards.py:redness   # your own reward
    python train_c2i.py --resume runs/train_c2i-toy      # continue after Ctrl-C
    python train_c2i.py --help                           # all options
"""

from pathlib import Path

import torch

import argrpo
import experiment
import reward
import toy

PRESETS = {
    # The toy's own learning rate, KL weight and sizes are the defaults of argrpo.GRPOConfig.
    "toy": dict(reward="shapes"),
}


def main(argv=None):
    with experiment.one_line_errors():
        default_preset = "B-256" if torch.cuda.is_available() else "toy"
        settings = experiment.parse_settings(experiment.Settings, PRESETS, default_preset, argv, "train_c2i", __doc__)
        device = experiment.pick_device(settings.device)
        reward_fn = reward.build_rewards(settings.reward, device)
        folder = toy.WEIGHTS
        if settings.from_scratch:
            folder = Path(settings.out) / "weights"
            if not (folder / "toy_c2i.pt").exists():             # it does when a run is resumed
                toy.main(["--out", str(folder), "--seed", str(settings.seed)])
        model, vq = (module.to(device) for module in toy.load("c2i", folder))

    classes = torch.arange(len(toy.CLASSES))
    prompts = argrpo.Prompts(toy.CLASSES, classes)
    backwards = argrpo.Prompts(toy.CLASSES[::-1], classes.flip(0))       # an order that training never uses
    return experiment.run(model, vq, prompts, backwards, reward_fn, settings, "train_c2i",
                          measures={"verified": toy.verify})


if __name__ == "__main__":
    main()
