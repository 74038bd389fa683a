"""The plan's order when shares count examples: exact counts in every step, spread evenly inside it.

Where tasks alternate, what is counted are the steps of each task, `batch` rows each.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from data_mixers.plan.epoch_caps import OnCap
from data_mixers.plan.plan_spec import PlanSpec
from data_mixers.plan.quota import ExactQuota, Ints, exact_quota, interleave

BLOCK_ROWS = 65536  # rows whose order is computed together


class ExampleOrder:
    """Order of a plan with unit="examples"."""

    digest: str | None = None  # of the rows' lengths, which don't matter here

    def __init__(self, spec: PlanSpec, on_cap: OnCap) -> None:
        self.spec = spec
        self.seat = spec.batch if spec.style == "alternating" else 1  # rows counted as one
        self._block_steps = min(max(1, BLOCK_ROWS // spec.batch), ExactQuota.BLOCK)
        self.block_rows = self._block_steps * spec.batch
        # Tasks in the order of their names: ties then do not depend on the order in which the tasks were given.
        self._by_name = np.argsort(np.array(spec.names))
        self._as_given = np.argsort(self._by_name)  # back to the order in which the tasks were given
        limit_K = np.floor((spec.max_visits_K - spec.start_K) / self.seat)[self._by_name]
        share = spec.mixture.shares if spec.schedule is None else spec.schedule.shares(spec.steps)
        if spec.schedule is None and spec.carry is not None:
            share = np.tile(share, (spec.steps, 1))
        self._quota = exact_quota(
            share[..., self._by_name],
            limit_K,
            spec.steps,
            spec.batch // self.seat,
            owed_K=None if spec.carry is None else np.array(spec.carry)[self._by_name] / self.seat,
            on_cap=on_cap,
            names=[spec.names[k] for k in self._by_name],
            unit_name="rows" if self.seat == 1 else f"steps of {self.seat} rows",
        )

    def block(self, number: int) -> tuple[Ints, Ints]:
        """(task, visit) of rows number * block_rows onwards."""
        first = number * self._block_steps
        n_SK = self.seat * self._quota.rows(first, min(first + self._block_steps, self.spec.steps))
        task, visit = interleave(n_SK, (self.spec.start_K + self.counts(first))[self._by_name])
        return self._by_name[task], visit

    def counts(self, s: int) -> Ints:
        """Rows of each task [K] before step s."""
        return self.seat * self._quota.counts(s)[self._as_given]

    def amounts(self, s: int) -> Ints:
        """What the shares count: rows."""
        return self.counts(s)

    def owed(self, s: int) -> NDArray[np.float64]:
        """Rows [K] that each task is behind (or ahead: < 0) of its exact share before step s."""
        return self.seat * (self._quota.exact(s) - self._quota.counts(s))[self._as_given]
