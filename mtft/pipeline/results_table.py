"""The final table on the terminal: one per metric, tasks down, what was compared across."""

from __future__ import annotations

from collections.abc import Sequence

from rich import box
from rich.console import Console
from rich.table import Table

SHOWN = (
    ("loss", "held-out loss, lower is better"),
    ("token_accuracy", "token accuracy"),
    ("exact_match", "exact match"),
)
SIZES = {"examples", "tokens"}
WIDTH = 108  # where the output is no terminal, or a narrow one: wrapped lines read better than cut headings


MOST_TASKS, SHOWN_OF_MANY = 20, 8


def print_results(
    results: dict[str, dict[str, dict[str, float]]], console: Console | None = None, *, auxiliary: Sequence[str] = ()
) -> None:
    """results: {stage: {task: {metric: value}}}. Of more than MOST_TASKS tasks their mean, without the auxiliary ones,
    and those that differ most between the first stage and the last; results.json has all of them.
    """
    console = console or Console(width=max(WIDTH, Console().width))
    tasks = list(dict.fromkeys(task for stage in results.values() for task in stage))
    counted = [task for task in tasks if task not in auxiliary]
    told = {metric for stage in results.values() for scores in stage.values() for metric in scores} - SIZES
    more = sorted(told - {metric for metric, _ in SHOWN})
    for metric, title in (*SHOWN, *((metric, metric) for metric in more)):
        table = Table(title=title, title_justify="left", title_style="bold", box=box.SIMPLE_HEAD, pad_edge=False)
        table.add_column("task", no_wrap=True)
        for stage in results:
            table.add_column(stage, justify="right", min_width=max(map(len, stage.split())))
        having = [task for task in tasks if metric not in more or _has(results, task, metric)]
        shown = having if len(having) <= MOST_TASKS else _most_changed(results, having, metric)
        if len(shown) < len(having):
            judged = [task for task in having if task in counted]
            means = (_mean(scores, metric, judged) for scores in results.values())
            table.add_row(f"mean of {len(judged):,}", *means)
        for task in shown:
            values = [results[stage].get(task, {}).get(metric) for stage in results]
            name = task if task in counted else f"{task} (auxiliary)"
            table.add_row(name, *("–" if value is None else f"{value:.3f}" for value in values))
        console.print(table)
        if len(shown) < len(having):
            console.print(f"and {len(having) - len(shown):,} more tasks (results.json)")


def _has(results: dict[str, dict[str, dict[str, float]]], task: str, metric: str) -> bool:
    return any(stage.get(task, {}).get(metric) is not None for stage in results.values())


def _most_changed(results: dict[str, dict[str, dict[str, float]]], tasks: list[str], metric: str) -> list[str]:
    """The tasks with the largest difference between the first stage and the last, in their own order."""

    def change(task: str) -> float:
        known = [scores[task][metric] for scores in results.values() if scores.get(task, {}).get(metric) is not None]
        return abs(known[-1] - known[0]) if known else -1.0

    chosen = set(sorted(tasks, key=change, reverse=True)[:SHOWN_OF_MANY])
    return [task for task in tasks if task in chosen]


def _mean(scores: dict[str, dict[str, float]], metric: str, tasks: Sequence[str]) -> str:
    known = [value for task in tasks if (value := scores.get(task, {}).get(metric)) is not None]
    return f"{sum(known) / len(known):.3f}" if known else "–"
