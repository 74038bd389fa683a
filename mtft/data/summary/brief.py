"""What is shown of many tasks: all of them together, the extremes, and like warnings as one. JSON has everything."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence

from mtft.common.listing import listed
from mtft.data.summary.data_summary import TaskSummary

MOST_TASKS = 20  # that are shown one by one
MOST_WARNINGS = 40  # of few tasks
MOST_KINDS = 12  # of warnings, of many tasks
EVERYTHING = "mtft check --all, or --json"
_NUMBER = re.compile(r"\d[\d.,]*")
# The largest of each is shown; then the smallest of the last of them.
DATA_EXTREMES: tuple[Callable[[TaskSummary], float], ...] = (
    lambda task: task.longest,
    lambda task: task.truncated + task.dropped + task.skipped,
    lambda task: task.examples,
)
PLAN_EXTREMES: tuple[Callable[[TaskSummary], float], ...] = (
    lambda task: task.epochs,
    lambda task: task.effective_weight,
    lambda task: task.realised_share,
)


def extremes(tasks: Sequence[TaskSummary], by: Sequence[Callable[[TaskSummary], float]]) -> list[TaskSummary]:
    """The tasks with the largest value of each kind and the smallest of the last, each once, in their own order."""
    chosen = {max(range(len(tasks)), key=lambda k, value=value: value(tasks[k])) for value in by}
    chosen.add(min(range(len(tasks)), key=lambda k: by[-1](tasks[k])))
    return [tasks[k] for k in sorted(chosen)]


def warning_lines(warnings: Sequence[str], names: Sequence[str], *, everything: bool = False) -> list[str]:
    """The warnings, a bounded number. Of many tasks those that differ in names and numbers alone become one line."""
    if everything:
        return list(warnings)
    if len(names) <= MOST_TASKS:
        return _first(list(warnings), MOST_WARNINGS)
    known, kinds = set(names), {}
    for warning in warnings:
        words = [("\0" if word.rstrip(":") in known else word) for word in warning.split(" ")]
        kinds.setdefault(_NUMBER.sub("0", " ".join(words)), []).append(warning)
    return _first([_as_one(alike, known) for alike in kinds.values()], MOST_KINDS)


def _as_one(alike: list[str], known: set[str]) -> str:
    if len(alike) == 1:
        return alike[0]
    others = [head for warning in alike[1:] if (head := warning.partition(": ")[0]) in known]
    tasks = f": {listed(dict.fromkeys(others), 3)}" if others else ""
    return f"{alike[0]} (and {len(alike) - 1:,} more like it{tasks})"


def _first(lines: list[str], most: int) -> list[str]:
    if len(lines) <= most:
        return lines
    return [*lines[:most], f"... and {len(lines) - most:,} more warnings ({EVERYTHING})"]
