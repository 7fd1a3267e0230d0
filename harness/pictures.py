"""The pictures of a run: before and after, and the curves.

matplotlib is loaded when one is drawn.
"""

import torch

from harness.curves import figure


def draw_before_after(path, before, after, rows=8):
    """Two blocks of pictures, before and after: a row a prompt, the same seeds, with the rewards.

    before and after are galleries, lists of Shown, as of `evaluate`."""
    shown = torch.linspace(0, len(before) - 1, min(rows, len(before))).long().tolist()
    columns = len(before[0].images)
    width, height = 2 * columns * 1.05 + 0.4, len(shown) * 1.35 + 0.3    # a picture is 1 x 1
    fig = figure(0.85 * width, 0.85 * height)
    fig.set_layout_engine("none")
    ax = fig.add_axes((0, 0, 1, 1))              # one for all: 96 of them would take seconds
    for left, title, gallery in ((0.05, "before", before), (width / 2 + 0.1, "after", after)):
        ax.text(left + columns * 0.52, 0.17, title, fontsize=11, ha="center", va="center")
        for row, i in enumerate(shown):
            draw_prompt(ax, left, 0.5 + 1.35 * row, *gallery[i][:3])
    ax.set(xlim=(0, width), ylim=(height, 0), aspect="equal")
    ax.axis("off")
    fig.savefig(path, dpi=110)


def draw_prompt(ax, left, top, text, images, rewards):
    """One row, its corner at (left, top): the prompt above it, each picture's reward below it."""
    ax.text(left, top - 0.05, text, fontsize=7, va="bottom")
    for column, (image, score) in enumerate(zip(images, rewards)):
        x = left + 1.05 * column
        ax.imshow(image.permute(1, 2, 0).numpy(), extent=(x, x + 1, top + 1, top),
                  interpolation="nearest")
        ax.text(x + 0.5, top + 1.02, f"{score:.2f}", fontsize=6, ha="center", va="top")
