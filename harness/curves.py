"""The curves of a run: which there are, what is healthy, and their drawing by matplotlib.

matplotlib is loaded when one is drawn, and torch never.
"""

import io
import math

# The metric, its title, and the sentence below.  A star stands for any end: a panel each.
PANELS = (
    ("reward", "reward",
     "Healthy: rises, noisily, for each step has other prompts, and levels off."),
    ("reward/*", "a part of the reward, unweighted",
     "Healthy: rises, or stays; one part may not rise at the cost of another."),
    ("verified", "verified: right for the toy's verifier",
     "Of every fifth step's images. Healthy: rises with the reward, or stays. If it falls while "
     "the reward rises, the policy learns to please the reward alone: reward hacking."),
    ("watch/*", "watched, not trained on",
     "Healthy: rises with the reward, or stays. If it falls while the reward rises, look at the "
     "pictures."),
    ("reward_std", "spread of rewards within a group",
     "Healthy: above zero; it may fall as a group's images get equally good. Zero: nothing to "
     "learn from."),
    ("flat_groups", "share of flat groups",
     "Groups whose rewards are all equal teach nothing. Healthy: well below 1, and rising only "
     "when most images are right."),
    ("kl", "KL to the pretrained model",
     "Nats a token. Healthy: rises, then levels off, below 0.5 on the toy. If it runs away, the "
     "policy forgets what it was; if all curves go level at once, look at the learning rate."),
    ("entropy", "entropy",
     "Nats a token: how undecided the policy is. Healthy: falls slowly. Near zero, it always draws "
     "the same."),
    ("diversity", "diversity within a group",
     "Mean distance of two images of a prompt, per pixel. It falls; near zero, all are alike."),
    ("diversity_kept", "diversity kept (D)",
     "Among right images, after to before, and rough: of one step's images. The evaluation's "
     "figure above is the one to trust. 1 is as varied as the pretrained model; the paper's recipe "
     "loses much of it."),
    ("lr", "learning rate",
     "Rises in the first steps, then falls or stays. At zero nothing is learned any more."),
    ("grad_norm", "gradient norm",
     "Before clipping. Healthy: the same order of magnitude throughout, without spikes."),
    ("loss", "loss",
     "Healthy: near zero, but for kl_beta times the KL, from first to last. Advantages add up to "
     "zero in every group, so that the loss says nothing of progress; only its gradient matters."),
    ("ratio_max", "largest ratio to the old policy",
     "Exactly 1 with one update per rollout; a few units with more."),
    ("clip_frac", "share of clipped tokens",
     "Exactly 0 with one update per rollout; a few per cent with more."),
    ("mismatch_mean", "sampler against learner",
     "Nats a token. Healthy: rounding alone, below 0.001 on a CPU and 0.05 on a GPU."),
    ("rehearsal", "rehearsal",
     "Nats a token that the pretrained model's right images cost. Healthy: level or falling."),
    ("missing", "images without a reward", "Healthy: 0. Images that the reward could not judge."),
    ("seconds", "seconds a step", "Healthy: about level; other programs on the machine show."),
)
TRIVIAL = {"ratio_max": {1.0}, "clip_frac": {0.0}, "missing": {0.0}}    # these need no panel
STYLE = {                                        # of a panel: small, and the same every time
    "svg.fonttype": "none", "svg.hashsalt": "curves", "savefig.transparent": True,
    "text.parse_math": False, "font.size": 8, "font.sans-serif": "DejaVu Sans",
    "xtick.color": "#6b7280", "ytick.color": "#6b7280", "axes.grid": True,
    "axes.grid.axis": "y", "grid.color": "#e5e7eb", "axes.edgecolor": "none",
}
NAMELESS = dict.fromkeys(("Creator", "Date", "Format", "Type"))      # no date, so equal to the byte


def figure(*size):
    """An empty matplotlib figure of that size in inches, which needs no display."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    fig = Figure(figsize=size, layout="constrained")
    FigureCanvasAgg(fig)
    return fig


def points_of(metrics, name):
    """[(step, value), ...] of a metric where it is known."""
    known = [(m["step"], m[name]) for m in metrics if m.get(name) is not None]
    return [(step, value) for step, value in known if math.isfinite(value)]


def smooth(points):
    """A running mean of up to a twentieth of the points to either side."""
    reach = len(points) // 20
    means = []
    for i, (step, _) in enumerate(points):
        window = [value for _, value in points[max(0, i - reach):i + reach + 1]]
        means.append((step, sum(window) / len(window)))
    return means


# ---------------------------------------------------------------------------------------------
# The page's panels
# ---------------------------------------------------------------------------------------------

def names_in(pattern, runs):
    """The metrics that a pattern means, in the order in which they first come up."""
    known = dict.fromkeys(name for _, metrics in runs for m in metrics for name in m)
    if not pattern.endswith("*"):
        return [pattern]
    names = [name for name in known if name.startswith(pattern[:-1])]
    if pattern == "reward/*" and len(names) == 1:
        return []                                # it is the reward itself
    return names


def panels(runs):
    """The panels that have something to show, for [(run's name, metrics), ...].

    [(title, SVG, healthy sentence), ...]"""
    shown = []
    for pattern, title, sentence in PANELS:
        for name in names_in(pattern, runs):
            lines = [(run, points_of(metrics, name)) for run, metrics in runs]
            lines = [(run, points) for run, points in lines if points]
            values = {value for _, points in lines for _, value in points}
            if not lines or (name in TRIVIAL and values <= TRIVIAL[name]):
                continue
            title_of = f"{name}: {title}" if pattern.endswith("*") else title
            shown.append((title_of, svg(lines, len(runs) > 1), sentence))
    return shown


def svg(lines, labelled):
    """A chart of lines [(label, [(step, value), ...]), ...]: each as it is, pale, and smoothed."""
    import matplotlib
    with matplotlib.rc_context(STYLE):
        fig = figure(3.8, 1.9)
        ax = fig.subplots()
        for i, (label, points) in enumerate(lines):
            marker = "o" if len(points) == 1 else ""
            ax.plot(*zip(*points), f"C{i}", alpha=0.3, linewidth=0.8)
            ax.plot(*zip(*smooth(points)), f"C{i}", marker=marker, label=label)
        ax.tick_params(length=0)
        ax.locator_params(axis="x", nbins=5, integer=True)
        ax.locator_params(axis="y", nbins=5)
        if labelled:
            fig.legend(loc="outside lower left", frameon=False)
        file = io.StringIO()
        fig.savefig(file, format="svg", metadata=NAMELESS)
    return file.getvalue()


# ---------------------------------------------------------------------------------------------
# curves.png
# ---------------------------------------------------------------------------------------------

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
