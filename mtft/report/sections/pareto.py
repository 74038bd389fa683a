"""The trade-offs that a search of merge weights has found: one panel for each pair of tasks, the Pareto front marked.

A point is one merge (one vector of weights), its place the held-out losses on two tasks. Grey: another merge is no
worse on any task and better on one. The line joins what is best for the two tasks of the panel alone.
"""

from __future__ import annotations

from itertools import combinations
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from mtft.report.components.plots import name_shown, plain_text, quiet_glyphs, to_svg

TASKS = 4
"""Of more tasks the pairs of the four whose losses spread most are shown."""
GREY, BLUE, ORANGE, RED = "#b9bec7", "#2f6fb2", "#d98c21", "#c2352b"


@plain_text
def front_figure(facts: dict[str, Any]) -> Figure:
    """facts: front.json, as mtft.merge.search.pareto makes it."""
    trials, tasks = facts["trials"], facts["tasks"]

    def spread(task: str) -> float:
        values = [row["losses"][task] for row in trials]
        return max(values) - min(values)

    widest = sorted(tasks, key=spread, reverse=True)[:TASKS]
    pairs = list(combinations([task for task in tasks if task in widest], 2))
    columns = min(3, len(pairs))
    rows = -(-len(pairs) // columns)
    figure = Figure(figsize=(3.3 * columns, 2.9 * rows + 0.4), layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False)
    for axis, (a, b) in zip(axes.flat, pairs, strict=False):
        _panel(axis, facts, a, b)
    for axis in axes.flat[len(pairs) :]:
        axis.axis("off")
    handles, labels = axes.flat[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=4, frameon=False, fontsize=9)
    return figure


def front_caption(facts: dict[str, Any]) -> str:
    best = sum(row["front"] for row in facts["trials"])
    return f"{len(facts['trials'])} merges, {best} of them on the Pareto front of {len(facts['tasks'])} tasks"


@plain_text
def save_front(facts: dict[str, Any], path: Path) -> Path:
    """Write the picture as PNG."""
    figure = front_figure(facts)
    figure.suptitle("Held-out loss of " + front_caption(facts), fontsize=10.5)
    path.parent.mkdir(parents=True, exist_ok=True)
    with quiet_glyphs():
        figure.savefig(path, dpi=110, metadata={"Software": None})
    return path


def front_svg(facts: dict[str, Any]) -> str:
    """The picture for the page."""
    return to_svg(front_figure(facts))


def _panel(axis: Any, facts: dict[str, Any], a: str, b: str) -> None:
    def at(rows: list[dict[str, Any]]) -> tuple[list[float], list[float]]:
        return [row["losses"][a] for row in rows], [row["losses"][b] for row in rows]

    trials = facts["trials"]
    axis.scatter(*at([row for row in trials if not row["front"]]), s=14, color=GREY, label="beaten", zorder=1)
    axis.scatter(*at([row for row in trials if row["front"]]), s=20, color=BLUE, label="Pareto front", zorder=2)
    here: list[dict[str, Any]] = []
    for row in sorted(trials, key=lambda row: (row["losses"][a], row["losses"][b])):
        if not here or row["losses"][b] < here[-1]["losses"][b]:
            here.append(row)
    axis.plot(*at(here), color=BLUE, linewidth=1, alpha=0.6, zorder=1.5)
    hollow = {"facecolors": "none", "edgecolors": ORANGE, "linewidths": 1.8, "marker": "s", "s": 80}
    axis.scatter(*at([facts["uniform"]]), label="all weights 1", zorder=3, **hollow)
    axis.scatter(*at([facts["chosen"]]), s=34, color=RED, marker="D", label="chosen", zorder=4)
    axis.set_xlabel(f"loss on {name_shown(a)}", fontsize=9)
    axis.set_ylabel(f"loss on {name_shown(b)}", fontsize=9)
    axis.tick_params(labelsize=8)
    axis.grid(alpha=0.25)
    axis.spines[["top", "right"]].set_visible(False)
