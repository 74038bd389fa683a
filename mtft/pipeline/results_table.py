"""The final table on the terminal: one per metric, tasks down, what was compared across."""

from __future__ import annotations

from rich import box
from rich.console import Console
from rich.table import Table

SHOWN = (
    ("loss", "held-out loss, lower is better"),
    ("token_accuracy", "token accuracy"),
    ("exact_match", "exact match"),
)
WIDTH = 108  # where the output is no terminal, or a narrow one: wrapped lines read better than cut headings


def print_results(results: dict[str, dict[str, dict[str, float]]], console: Console | None = None) -> None:
    """results: {stage: {task: {metric: value}}}."""
    console = console or Console(width=max(WIDTH, Console().width))
    tasks = list(dict.fromkeys(task for stage in results.values() for task in stage))
    for metric, title in SHOWN:
        table = Table(title=title, title_justify="left", title_style="bold", box=box.SIMPLE_HEAD, pad_edge=False)
        table.add_column("task", no_wrap=True)
        for stage in results:
            table.add_column(stage, justify="right", min_width=max(map(len, stage.split())))
        for task in tasks:
            values = [results[stage].get(task, {}).get(metric) for stage in results]
            table.add_row(task, *("–" if value is None else f"{value:.3f}" for value in values))
        console.print(table)
