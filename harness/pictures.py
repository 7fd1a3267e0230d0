"""The pictures of a run: before and after, and the curves.

matplotlib is loaded when one is drawn.
"""

import torch


def figure(*size):
    """An empty matplotlib figure of that size in inches, which needs no display."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    fig = Figure(figsize=size, layout="constrained")
    FigureCanvasAgg(fig)
    return fig


def draw_before_after(path, before, after, rows=8):
    """Two blocks of pictures, before and after: a row a prompt, the same seeds, with the rewards.

    before and after are galleries, lists of Shown, as of `evaluate`."""
    rows = min(rows, len(before))
    shown = torch.linspace(0, len(before) - 1, rows).long().tolist()
    columns = len(before[0].images)
    fig = figure(2 * columns * 0.85 + 1, rows * 1.05 + 0.5)
    left, right = fig.subfigures(1, 2, wspace=0.02)
    for block, title, gallery in ((left, "before", before), (right, "after", after)):
        block.suptitle(title)
        axes = block.subplots(rows, columns, squeeze=False)
        for row, i in zip(axes, shown):
            draw_prompt(row, *gallery[i][:3])
    fig.savefig(path, dpi=110)


def draw_prompt(axes, text, images, rewards):
    """One row: the prompt above the first picture, and each one's reward below it."""
    axes[0].set_title(text, fontsize=7, loc="left", pad=9)
    for ax, image, score in zip(axes, images, rewards):
        ax.imshow(image.permute(1, 2, 0).numpy(), interpolation="nearest")
        ax.set_xlabel(f"{score:.2f}", fontsize=6, labelpad=1)
        ax.set_xticks([])
        ax.set_yticks([])


def draw_curves(path, metrics):
    """Reward by component, KL, entropy, diversity and, where it was measured, D over the steps."""
    rewards = [name for name in metrics[0] if name.startswith("reward/")]
    if len(rewards) > 1:
        rewards = ["reward", *rewards]
    panels = {"reward": rewards, "kl": ["kl"], "entropy": ["entropy"], "diversity": ["diversity"]}
    if any(m.get("diversity_kept") is not None for m in metrics):
        panels["diversity_kept"] = ["diversity_kept"]
    fig = figure(2.8 * len(panels), 2.8)
    for ax, (title, names) in zip(fig.subplots(1, len(panels)), panels.items()):
        for name in names:
            known = [(m["step"], m[name]) for m in metrics if m.get(name) is not None]
            ax.plot(*zip(*known), linewidth=1, label=name.removeprefix("reward/"))
        ax.set_title(title, fontsize=9)
        ax.set_xlabel("step", fontsize=8)
        ax.tick_params(labelsize=7)
    fig.axes[0].legend(fontsize=7)
    fig.savefig(path, dpi=110)
