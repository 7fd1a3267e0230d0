"""Improves a class-conditional image generator with AR-GRPO.

    python train_c2i.py                                # the toy on a CPU: minutes, no download
    python train_c2i.py --reward my_rewards.py:redness --out runs/red    # your own reward
    python train_c2i.py --resume runs/train_c2i-toy    # continue after Ctrl-C
    python train_c2i.py --preset B-256                 # LlamaGen's GPT-B at 256 pixels, on a GPU
    python train_c2i.py --preset L-384 --classes otter,pizza --reward clip,aesthetic:0.5
    python train_c2i.py --help                         # all options
"""

from dataclasses import dataclass

import reward
from harness import options
from harness.choices import choose_watched, class_prompts, starting_models
from harness.logs import one_line_errors
from harness.run import run

# The paper's c2i settings (arXiv 2508.06924), but for log-probs with guidance, and one GPU in the
# place of four: the same 32 images a step are 4 prompts of 8.  The paper's whole reward, which
# needs more packages and memory, is paper_c2i.
PAPER = dict(reward="paper_lite", steps=400, prompts_per_step=4, group_size=8, lr=1e-5, lr_end=1.0,
             kl_beta=0.1, cfg_scale=2.0, eval_images=64, save_every=25, micro_batch=None,
             rollout_prompts=None)           # None: as much as fits into the memory
PRESETS = {
    "toy": dict(reward="shapes", steps=75, prompts_per_step=16, group_size=8, lr=1.6e-3,
                rehearsal_groups=4),
    **dict.fromkeys(("B-256", "L-256", "B-384", "L-384", "XL-384"), PAPER),
    # These need more than 24 GB.
    **dict.fromkeys(("XXL-384", "3B-384"), PAPER | dict(checkpointing=True)),
}

# --recipe diverse keeps a prompt's pictures varied.  Rehearsal takes the place of the KL penalty,
# and a bonus is added (diversity.py).  A step has more images, for noise in the update narrows the
# policy, too.  First it rehearses alone, for which the policy draws nothing.
# --recipe quick is the same, stops early, and keeps less.
RECIPE = dict(rehearsal=0.15, rehearsal_groups=2, rehearsal_steps=400, kl_beta=0.0,
              diversity_bonus=5.0)
DIVERSE = {name: RECIPE | dict(steps=225, prompts_per_step=8, lr=1.25e-5) for name in PRESETS}
DIVERSE["toy"] = RECIPE | dict(steps=225, prompts_per_step=16, group_size=16, lr=9e-4,
                               rehearsal_groups=64)
QUICK = {name: recipe | dict(steps=78, diversity_bonus=2.5) for name, recipe in DIVERSE.items()}


@dataclass
class C2iSettings(options.RunSettings):
    script, task, presets, on_gpu = "train_c2i", "c2i", PRESETS, "B-256"
    recipes = {"quick": QUICK, "diverse": DIVERSE}
    classes: str = "all"                 # classes to draw: "all", numbers such as 207,360, or names
                                         # such as otter,pizza


def load(settings, device):
    """What the settings name, for `harness.run.run`."""
    reward_fn = reward.build_rewards(settings.reward, device)
    prompts = class_prompts(settings.preset, settings.classes)
    reward_fn.check_prompts(prompts.texts)
    watched = choose_watched(settings, prompts.texts, device)
    return *starting_models(settings), prompts, prompts, reward_fn, watched


def main(argv=None):
    with one_line_errors():
        settings = options.parse_settings(C2iSettings, argv, __doc__)
    return run(settings, load)


if __name__ == "__main__":
    main()
