"""Draws docs/frontier.png: the runs made for --recipe diverse, from docs/frontier.json.

    python benchmarks/frontier.py

A row of the file is one training run of the toy that was made to its end: the share of right
pictures, D, and how many pictures of the policy it drew.  docs/diversity.md says what the rows are.
"""

import json
from pathlib import Path

from matplotlib.figure import Figure

DOCS = Path(__file__).resolve().parent.parent / "docs"
STYLES = {                                       # family: (colour, marker)
    "paper": ("#D55E00", "o"),
    "KL penalty, log-ratio bonus": ("#F0E442", "P"),
    "KL penalty, bonus by pixel distance": ("#E69F00", "^"),
    "rehearsal alone": ("#999999", "s"),
    "rehearsal, bonus by pixel distance": ("#56B4E9", "v"),
    "rehearsal, bonus by energy distance": ("#009E73", "D"),
    "rehearsal first": ("#CC79A7", "X"),
    "--recipe quick and diverse": ("#0072B2", "*"),
}
TASKS = {"c2i": ("classes", "right, %"), "t2i": ("captions", "right, % (seen and unseen)")}
YARDSTICK = 180 * 128                            # pictures in 180 steps of the paper's recipe


def main():
    rows = json.loads((DOCS / "frontier.json").read_text())
    fig = Figure(figsize=(11, 6.4), layout="constrained")
    axes = fig.subplots(2, 3)
    for line, (task, (title, share)) in zip(axes, TASKS.items()):
        for family, (colour, marker) in STYLES.items():
            some = [row for row in rows if row["task"] == task and row["family"] == family]
            cost = [row["steps"] * row["images"] / YARDSTICK for row in some]
            right, kept = [row["verified"] for row in some], [row["D"] for row in some]
            size = 90 if marker == "*" else 25
            for ax, x, y in ((line[0], right, kept), (line[1], cost, right), (line[2], cost, kept)):
                ax.scatter(x, y, size, color=colour, marker=marker, label=family, alpha=0.8)
        line[0].axhline(0.95, color="#cccccc", linewidth=1)
        if task == "c2i":                        # for captions the goal is of the seen ones alone
            line[0].axvline(95, color="#cccccc", linewidth=1)
        line[0].set(xlabel=share, ylabel=f"{title}: D", title="the goal is the upper right")
        for ax, name in ((line[1], share), (line[2], "D")):
            ax.axvline(3, color="#cccccc", linewidth=1)
            ax.set(xlabel="pictures of the policy (yardstick: 1)", ylabel=name)
    axes[0, 0].legend(fontsize=7, loc="lower left")
    fig.savefig(DOCS / "frontier.png", dpi=100)


if __name__ == "__main__":
    main()
