"""Exact counts when the shares change from step to step.

    A_k(s) = G sum of p_k(t) over the steps t < s,      C_k(s) = floor or ceil of A_k(s) after every step s

so |C_k - A_k| < 1 at every step, and every step has exactly G rows. Row j of task k may come once A_k has passed j - 1
and is due when A_k reaches j: jobs of one unit with release times and deadlines on G machines. The fractional plan A
is feasible, so a whole one exists (the polytope of jobs and steps is integral), and earliest-deadline-first finds it
(Jackson 1955; for one row a step this is Tijdeman's chairman assignment, Discrete Math. 32, 1980). All in integers:
A is kept in units of 2^-16 row.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from data_mixers.mixture.mixture import Floats
from data_mixers.plan.epoch_caps import capped_over_time, capped_shares
from data_mixers.plan.quota import ExactQuota, Ints, StepQuota, largest_remainder


def exact_quota(
    share: Floats, limit_K: Floats, steps: int, seats: int, *, owed_K: Floats | None = None, **caps: Any
) -> ExactQuota:
    """Counts of S steps with `seats` each, for constant shares [K] or those of each step [S, K].

    owed_K: as in VaryingQuota, with shares [S, K] only. caps: on_cap, names and unit_name of epoch_caps.
    """
    total = steps * seats
    if share.ndim == 1:
        return StepQuota(largest_remainder(capped_shares(share, limit_K, total, **caps) * total, total), steps)
    free_K = limit_K if owed_K is None else limit_K - np.maximum(owed_K, 0)
    return VaryingQuota(capped_over_time(share, free_K, total, **caps), seats, owed_K)


class VaryingQuota(ExactQuota):
    """The quota of shares [S, K], G rows a step.

    owed_K: rows each task is owed at the start (of a plan that this one follows; sum 0). A limit that the shares keep
    in sum is kept to the row.
    """

    def __init__(self, share_SK: Floats, batch: int, owed_K: Floats | None = None) -> None:
        super().__init__(*share_SK.shape)
        self.batch = batch
        self.unit = max(1, min(2**16, 2**52 // (self.steps * batch)))  # units that make a row
        exact_SK = np.vstack([np.zeros(self.tasks), np.cumsum(share_SK, axis=0)]) * batch
        if owed_K is not None:
            exact_SK += owed_K
        self.ideal = _integer_units(exact_SK, self.unit, batch)  # [S + 1, K], in units

    def exact(self, step: int) -> NDArray[np.float64]:
        """A_k (with what was owed)."""
        return self.ideal[step] / self.unit

    def _schedule(self, start: int, count_K: Ints) -> tuple[Ints, Ints]:
        stop = min(start + self.BLOCK, self.steps)
        floor_SK, rest_SK = np.divmod(self.ideal[start + 1 : stop + 1], self.unit)
        # the step by which the row that is not whole yet is due
        due_SK = np.stack(
            [np.searchsorted(self.ideal[1:, k], (floor_SK[:, k] + 1) * self.unit) for k in range(self.tasks)], axis=1
        )
        rows = np.empty_like(floor_SK)
        for s, (floor_K, rest_K, due_K) in enumerate(zip(floor_SK, rest_SK, due_SK)):
            next_K = np.maximum(floor_K, count_K)
            extra = int(count_K.sum()) + self.batch - int(next_K.sum())
            if extra > 0:
                ready_K = (next_K == floor_K) & (rest_K > 0)
                next_K[np.argsort(np.where(ready_K, due_K, np.iinfo(np.int64).max), kind="stable")[:extra]] += 1
            elif extra < 0:  # only behind a start that nobody could foresee (`owed_K`): what is least late waits
                late_K = np.where(next_K > count_K, rest_K, np.iinfo(np.int64).max)
                next_K[np.argsort(late_K, kind="stable")[:-extra]] -= 1
            rows[s], count_K = next_K - count_K, next_K
        return rows, count_K


def _integer_units(exact_SK: Floats, unit: int, batch: int) -> Ints:
    """Units [S + 1, K] that add up to whole steps. What is a whole number of rows stays one; what rounding leaves over
    goes to the task that is farthest from one.
    """
    whole_SK = np.rint(exact_SK * unit).astype(np.int64)
    left_S = np.arange(len(whole_SK)) * batch * unit - whole_SK.sum(axis=1)
    rest_SK = whole_SK % unit
    whole_SK[np.arange(len(whole_SK)), np.argmax(np.minimum(rest_SK, unit - rest_SK), axis=1)] += left_S
    return whole_SK
