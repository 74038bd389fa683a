"""A few steps of a run laid out in micro-batches: how many there are, and how much of them is padding.

Bounded in the number of steps and in their size. Where shares are constant every step is like the first ones, and to
know a late one the plan would have to play all before it. Of a step with more than MOST_ROWS examples a part is drawn
that has its shares.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from data_mixers.plan.mixture_plan import MixturePlan
from data_mixers.plan.replanned import ReplannedPlan
from mtft.data.batching.batches import BatchSource, PlannedStep

LAID_OUT = 8  # steps
NEAR = 1000  # steps from which they are taken, where all are alike
MOST_ROWS = 40_000  # examples that are packed, which takes some 30 microseconds each


class LaidOut(NamedTuple):
    """What the steps that were looked at have in common. sampled: it is told from a part of one step."""

    micro_batches_per_step: float
    padding_share: float
    sampled: bool


def lay_out(source: BatchSource, plan: MixturePlan | ReplannedPlan, rows_K: Sequence[int], seed: int) -> LaidOut:
    """Lays out some steps. rows_K: examples of each task in the whole run."""
    rows = sum(rows_K) / plan.steps
    if rows > MOST_ROWS:
        steps, scale = [_part_of_step(source, rows_K, seed)], rows / MOST_ROWS
    else:
        alike = plan.schedule is None and plan.unit == "examples"
        last = min(plan.steps, NEAR) if alike else plan.steps
        number = max(1, min(LAID_OUT, int(MOST_ROWS // rows)))
        chosen = np.unique(np.linspace(0, last - 1, number).astype(int)).tolist()
        steps, scale = [source.step(s) for s in chosen], 1.0
    real = positions = micro_batches = 0
    for step in steps:
        layout = source.layout(step)
        real, positions = real + int(step.lengths.sum()), positions + source.positions(step, layout)
        micro_batches += len(layout[0])
    return LaidOut(scale * micro_batches / len(steps), 1 - real / positions, rows > MOST_ROWS)


def _part_of_step(source: BatchSource, rows_K: Sequence[int], seed: int) -> PlannedStep:
    """MOST_ROWS examples in the run's shares, drawn from all rows of the tasks."""
    random = np.random.default_rng(seed)
    ends = np.rint(np.cumsum(rows_K) / sum(rows_K) * MOST_ROWS).astype(np.int64)
    task = np.repeat(np.arange(len(rows_K)), np.diff(ends, prepend=0))
    size_K = np.array([len(store.lengths) for store in source.stores])
    return source.step_of(task, random.integers(size_K[task]))
