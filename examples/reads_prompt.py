"""A reward that reads the prompt, and says before training which prompts it cannot judge.

    python train_c2i.py --reward shapes,examples/reads_prompt.py:coloured:0.2 --out runs/coloured
"""

import torch

CHANNELS = {"red": 0, "green": 1, "blue": 2}


def colour_of(prompt):
    """The channel of the first colour that the prompt names."""
    for word in prompt.split():
        if word in CHANNELS:
            return CHANNELS[word]
    raise ValueError(f"{prompt!r} names none of the colours {', '.join(CHANNELS)}")


def coloured(images, prompts):
    """How much the prompt's colour exceeds the mean of all three, averaged over the pixels."""
    channels = torch.tensor([colour_of(prompt) for prompt in prompts], device=images.device)
    means = images.mean(dim=(2, 3))                                      # (B, 3)
    return means.gather(1, channels[:, None])[:, 0] - means.mean(dim=1)


def check_prompts(prompts):
    for prompt in prompts:
        colour_of(prompt)


coloured.check_prompts = check_prompts
