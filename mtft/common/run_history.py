"""What a run has logged (metrics.jsonl: a line a step; eval.jsonl: one an evaluation), and what is wrong with it.

Weights don't hang on it, but a curve with a hole looks like one without: holes are said on going on, in result.json and
on the report's page.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mtft.common.own_files import OwnLines, read_own_lines

METRICS, EVALS = "metrics.jsonl", "eval.jsonl"
MOST = 5  # places that a message names
_DO = "move it away: the run goes on, and its history begins anew"


@dataclass(frozen=True)
class RunHistory:
    """Lines by step, the later of two for the same; `problems`: what is wrong, in words. torn: of the last line."""

    by_step: dict[int, dict[str, Any]]
    problems: list[str]
    torn: bool = False

    def up_to(self, step: int) -> list[dict[str, Any]]:
        return [self.by_step[known] for known in sorted(self.by_step) if known <= step]


def read_history(path: Path, expected: Iterable[int] = (), *, until: int | None = None) -> RunHistory:
    """A file of lines with a `step`; an empty history where there is none. UserError if it can't be read.

    expected: steps that should be there; until: the last step that is looked at (None: all).
    """
    if not _there(path):
        return RunHistory({}, _missing(path.name, {}, expected))
    read = read_own_lines(path, {"step": int, "tasks": dict}, do=_DO)
    by_step = {row["step"]: row for row in read.rows}
    looked = [step for step in (row["step"] for row in read.rows) if until is None or step <= until]
    problems = _unreadable(path.name, read) + _doubled(path.name, looked) + _missing(path.name, by_step, expected)
    return RunHistory(by_step, problems, read.torn)


def evaluated_steps(last: int, every: int | None, *, at_start: bool) -> list[int]:
    """The steps up to `last` after which a run evaluates, without its very last one."""
    return ([0] if at_start else []) + (list(range(every, last + 1, every)) if every else [])


def _there(path: Path) -> bool:
    return path.is_symlink() or path.exists()


def _unreadable(name: str, read: OwnLines) -> list[str]:
    if not read.problems:
        return []
    more = f"; and {len(read.problems) - MOST:,} more" if len(read.problems) > MOST else ""
    return [f"{name}: {'; '.join(read.problems[:MOST])}{more}"]


def _doubled(name: str, steps: Sequence[int]) -> list[str]:
    seen: set[int] = set()
    twice = {step for step in steps if step in seen or seen.add(step)}
    return [f"{name}: {_spans(sorted(twice))} twice (the later line counts)"] if twice else []


def _missing(name: str, by_step: dict[int, Any], expected: Iterable[int]) -> list[str]:
    gone = [step for step in expected if step not in by_step]
    return [f"{name}: no line of {_spans(gone)}"] if gone else []


def _spans(steps: Sequence[int]) -> str:
    """step 3; steps 3-5, 9"""
    spans: list[list[int]] = []
    for step in steps:
        if spans and step == spans[-1][1] + 1:
            spans[-1][1] = step
        else:
            spans.append([step, step])
    shown = [str(first) if first == last else f"{first}-{last}" for first, last in spans[:MOST]]
    more = f" and {len(spans) - MOST:,} more places" if len(spans) > MOST else ""
    return f"step{'s' if len(steps) > 1 else ''} {', '.join(shown)}{more}"
