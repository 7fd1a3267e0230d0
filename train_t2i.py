"""Improves a text-conditional image generator with AR-GRPO.

    python train_t2i.py                                # the toy on a CPU: minutes, no download
    python train_t2i.py --preset t2i-XL-256            # LlamaGen's GPT-XL at 256 pixels, on a GPU
    python train_t2i.py --preset t2i-XL-256 --reward paper_lite,geneval      # composed prompts
    python train_t2i.py --preset t2i-XL-256 --prompts my_captions.txt        # your own captions
    python train_t2i.py --resume runs/train_t2i-toy    # continue after Ctrl-C
    python train_t2i.py --help                         # all options

What changes from train_c2i.py: the condition is a caption's features and mask in the place of a
class label, and the prompts are captions.  Nothing else: the loop does not know the difference.
"""

from dataclasses import dataclass

import captions
import reward
import toy
from harness import options
from harness.choices import caption_encoder, choose_watched, starting_models
from harness.logs import one_line_errors
from harness.run import run

# The paper's t2i settings (arXiv 2508.06924), but for log-probs with guidance, and one GPU in the
# place of four: the same 64 images a step are 8 prompts of 8.  The paper's whole reward, which
# needs more packages and memory, is paper_t2i.
PAPER = dict(reward="paper_lite", steps=600, prompts_per_step=8, group_size=8, lr=1e-5, lr_end=1.0,
             kl_beta=1.0, cfg_scale=4.0, eval_images=64, eval_cfg_scales="1,7.5", save_every=25,
             micro_batch=None, rollout_prompts=None)         # None: as much as fits into the memory
PRESETS = {
    "toy": dict(reward="shapes"),                        # all else as in argrpo.GRPOConfig
    "t2i-XL-256": PAPER,
    "t2i-XL-512": PAPER,
}

# --recipe diverse, see train_c2i.py.  A caption comes up less often than a class: the bonus is a
# little larger, and on the toy more is learned from what the pretrained model draws, and GRPO has a
# smaller rate.
RECIPE = dict(rehearsal=0.15, rehearsal_groups=2, rehearsal_steps=400, kl_beta=0.0,
              diversity_bonus=6.0)
DIVERSE = {name: RECIPE | dict(steps=225, prompts_per_step=16, lr=1.25e-5) for name in PRESETS}
DIVERSE["toy"] |= dict(lr=6e-4, rehearsal_groups=24, rehearsal_steps=800, rehearsal_lr_factor=4.0)
QUICK = {name: recipe | dict(steps=78, diversity_bonus=3.0) for name, recipe in DIVERSE.items()}


@dataclass
class T2iSettings(options.RunSettings):
    script, task, presets, on_gpu = "train_t2i", "t2i", PRESETS, "t2i-XL-256"
    recipes = {"quick": QUICK, "diverse": DIVERSE}
    prompts: str = ""                    # file of captions: one a line, or .json or .jsonl;
                                         # default: composed ones
    composed: int = 2000                 # how many captions to compose from COCO's objects,
                                         # without a file
    t5: str = "google/flan-t5-xl"        # text encoder: a local folder, or a Hugging Face repo


def choose_captions(settings):
    """The captions to train on, and those to evaluate on."""
    if settings.prompts:
        texts = captions.read_captions(settings.prompts)
        return texts, texts
    if settings.preset == "toy":         # half counting, half position; all seen by pretraining
        return toy.mixed(toy.SEEN_PAIRS, toy.SEEN_CLASSES), toy.mixed(toy.PAIRS, toy.CLASSES)
    texts = captions.compose(settings.composed + 64, settings.seed)
    return texts[:-64], texts[-64:]      # compositions that training does not see


def load(settings, device):
    """What the settings name, for `harness.run.run`."""
    texts, eval_texts = choose_captions(settings)
    reward_fn = reward.build_rewards(settings.reward, device)
    reward_fn.check_prompts([*texts, *eval_texts])
    watched = choose_watched(settings, eval_texts, device, texts)
    model, vq = starting_models(settings)
    encode = caption_encoder(settings.preset, settings.t5, device)
    return model, vq, encode(texts), encode(eval_texts), reward_fn, watched


def main(argv=None):
    with one_line_errors():
        settings = options.parse_settings(T2iSettings, argv, __doc__)
    return run(settings, load)


if __name__ == "__main__":
    main()
