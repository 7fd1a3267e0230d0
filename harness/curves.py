"""The curves of a run's page: which there are, what is healthy, and their drawing as SVG."""

import math
from html import escape

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
COLOURS = ("#2563eb", "#dc2626", "#059669", "#d97706", "#7c3aed", "#0891b2", "#be185d", "#4d7c0f")
WIDTH, HEIGHT, LEFT, BOTTOM, TOP = 380, 190, 52, 24, 10


def names_in(pattern, runs):
    """The metrics that a pattern means, in the order in which they first come up."""
    known = dict.fromkeys(name for _, metrics in runs for m in metrics for name in m)
    if not pattern.endswith("*"):
        return [pattern]
    names = [name for name in known if name.startswith(pattern[:-1])]
    if pattern == "reward/*" and len(names) == 1:
        return []                                # it is the reward itself
    return names


def points_of(metrics, name):
    """[(step, value), ...] of a metric where it is known."""
    known = [(m["step"], m[name]) for m in metrics if m.get(name) is not None]
    return [(step, value) for step, value in known if math.isfinite(value)]


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


def smooth(points):
    """A running mean of up to a twentieth of the points to either side."""
    reach = len(points) // 20
    means = []
    for i, (step, _) in enumerate(points):
        window = [value for _, value in points[max(0, i - reach):i + reach + 1]]
        means.append((step, sum(window) / len(window)))
    return means


def ticks(low, high, count=4):
    """About so many round numbers between low and high."""
    raw = (high - low) / count
    power = 10 ** math.floor(math.log10(raw))
    step = next(power * m for m in (1, 2, 2.5, 5, 10) if power * m >= raw)
    first = math.ceil(low / step)
    return [k * step for k in range(first, math.floor(high / step) + 1)]


def svg(lines, labelled):
    """A chart of lines [(label, [(step, value), ...]), ...]: each as it is, pale, and smoothed."""
    steps = [step for _, points in lines for step, _ in points]
    values = [value for _, points in lines for _, value in points]
    low, high = min(values), max(values)
    if high - low < 1e-9 * max(abs(high), 1e-9):                 # constant
        margin = abs(high) / 2 or 1.0
    else:
        margin = 0.05 * (high - low)
    low, high = low - margin, high + margin
    first, last = min(steps), max(max(steps), min(steps) + 1)

    def x(step):
        return LEFT + (WIDTH - LEFT - 8) * (step - first) / (last - first)

    def y(value):
        return TOP + (HEIGHT - TOP - BOTTOM) * (high - value) / (high - low)

    def path(points):
        return " ".join(f"{x(step):.1f},{y(value):.1f}" for step, value in points)

    parts = [f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img">']
    for value in ticks(low, high):
        parts.append(f'<line class="grid" x1="{LEFT}" x2="{WIDTH - 8}" y1="{y(value):.1f}" '
                     f'y2="{y(value):.1f}"/><text x="{LEFT - 5}" y="{y(value) + 4:.1f}" '
                     f'text-anchor="end">{value:.3g}</text>')
    for step in ticks(first, last, 5):
        parts.append(f'<text x="{x(step):.1f}" y="{HEIGHT - 6}" text-anchor="middle">{step:g}'
                     '</text>')
    for i, (_, points) in enumerate(lines):
        colour = COLOURS[i % len(COLOURS)]
        parts.append(f'<polyline points="{path(points)}" stroke="{colour}" opacity="0.3"/>'
                     f'<polyline points="{path(smooth(points))}" stroke="{colour}" '
                     'stroke-width="2"/>')
        if len(points) == 1:
            parts.append(f'<circle cx="{x(points[0][0]):.1f}" cy="{y(points[0][1]):.1f}" r="3" '
                         f'fill="{colour}"/>')
    return "".join(parts) + "</svg>" + legend([label for label, _ in lines] if labelled else [])


def legend(labels):
    """The lines' names in their colours."""
    spans = [f'<span style="color:{COLOURS[i % len(COLOURS)]}">&#9632; {escape(label)}</span>'
             for i, label in enumerate(labels)]
    return f'<div class="legend">{" ".join(spans)}</div>'
