"""The final table on the terminal: one per metric, tasks down, what was compared across."""

from __future__ import annotations

from rich.console import Console
from rich.table import Table

SHOWN = (
    ("loss", "held-out loss, lower is better"),
    ("token_accuracy", "token accuracy"),
    ("exact_match", "exact match"),
)


def print_results(results: dict[str, dict[str, dict[str, float]]], console: Console | None = None) -> None:
    """results: {stage: {task: {metric: value}}}."""
    console = console or Console()
    tasks = list(dict.fromkeys(task for stage in results.values() for task in stage))
    for metric, title in SHOWN:
        table = Table(title=title, title_justify="left", title_style="bold")
        table.add_column("task")
        for stage in results:
            table.add_column(stage, justify="right")
        for task in tasks:
            values = [results[stage].get(task, {}).get(metric) for stage in results]
            table.add_row(task, *("–" if value is None else f"{value:.3f}" for value in values))
        console.print(table)
