"""The trade-offs that a search has found, drawn: one panel for each pair of tasks, the Pareto front marked.

A point is one merge (one vector of weights), its place the held-out losses on two tasks. Grey: another merge is better
on every task. The line joins what is best for the two tasks of the panel alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import combinations
from pathlib import Path

from .search import SearchResult, Trial, pareto

PANELS = 6
COLOURS = {"beaten": "#b9bec7", "front": "#2f6fb2", "uniform": "#d98c21", "chosen": "#c2352b"}


def front_facts(names: Sequence[str], found: SearchResult) -> dict[str, object]:
    """What front.json holds: the front's merges with weights and losses, the uniform merge and the chosen one."""
    rows = [{"weights": list(t.weights), "losses": t.losses} for t in pareto(found.trials)]
    return {
        "adapters": list(names),
        "trials": len(found.trials),
        "front": rows,
        "uniform": {"weights": list(found.uniform.weights), "losses": found.uniform.losses},
        "chosen": {"weights": list(found.weights), "losses": _of(found).losses},
        "verdict": found.verdict,
    }


def _of(found: SearchResult) -> Trial:
    return found.best if found.weights == found.best.weights else found.uniform


def draw_front(found: SearchResult, path: str | Path) -> Path:
    """Write the picture (.png or .svg); of many tasks the pairs of those whose losses spread most."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    tasks = list(found.uniform.losses)
    spread = {
        task: max(t.losses[task] for t in found.trials) - min(t.losses[task] for t in found.trials) for task in tasks
    }
    count = max(n for n in range(2, 5) if n * (n - 1) // 2 <= PANELS)
    shown = [task for task in tasks if task in sorted(tasks, key=lambda task: -spread[task])[:count]]
    pairs = list(combinations(shown, 2)) or [(tasks[0], tasks[0])]
    columns = min(3, len(pairs))
    rows = -(-len(pairs) // columns)
    figure, axes = pyplot.subplots(rows, columns, figsize=(3.6 * columns, 3.3 * rows), squeeze=False)
    best = pareto(found.trials)
    rest = [t for t in found.trials if t not in best]
    for axis, (a, b) in zip(axes.flat, pairs, strict=False):
        _panel(axis, rest, best, found, a, b)
    for axis in axes.flat[len(pairs) :]:
        axis.axis("off")
    handles, labels = axes.flat[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="lower center", ncols=4, frameon=False, fontsize=9)
    title = (
        f"Held-out loss of {len(found.trials)} merges, {len(best)} of them on the Pareto front of {len(tasks)} tasks"
    )
    figure.suptitle(title, fontsize=11)
    figure.tight_layout(rect=(0, 0.05 if rows > 1 else 0.09, 1, 1))
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110, metadata={"Software": None} if path.suffix == ".png" else None)
    pyplot.close(figure)
    return path


def _panel(axis, rest: Sequence[Trial], best: Sequence[Trial], found: SearchResult, a: str, b: str) -> None:
    def at(trials: Sequence[Trial]) -> tuple[list[float], list[float]]:
        return [t.losses[a] for t in trials], [t.losses[b] for t in trials]

    axis.scatter(*at(rest), s=14, color=COLOURS["beaten"], label="beaten on every task", zorder=1)
    axis.scatter(*at(best), s=20, color=COLOURS["front"], label="Pareto front", zorder=2)
    here: list[Trial] = []
    for trial in sorted([*rest, *best], key=lambda t: (t.losses[a], t.losses[b])):
        if not here or trial.losses[b] < here[-1].losses[b]:
            here.append(trial)
    axis.plot(*at(here), color=COLOURS["front"], linewidth=1, alpha=0.6, zorder=1.5)
    marks = {"s": 46, "zorder": 3, "edgecolors": "white", "linewidths": 0.8}
    axis.scatter(*at([found.uniform]), color=COLOURS["uniform"], marker="s", label="uniform", **marks)
    axis.scatter(*at([_of(found)]), color=COLOURS["chosen"], marker="D", label="chosen", **marks)
    axis.set_xlabel(f"loss on {a}", fontsize=9)
    axis.set_ylabel(f"loss on {b}", fontsize=9)
    axis.tick_params(labelsize=8)
    axis.grid(alpha=0.25)
    axis.spines[["top", "right"]].set_visible(False)
