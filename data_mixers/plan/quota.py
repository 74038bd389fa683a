"""How many rows of each task: totals of a run, the exact share of every step, and their order inside it.

Constant shares (StepQuota). Totals: largest-remainder rounding of S G p_k. Steps: each takes T_k // S rows of task k
or one more; the extra rows are placed by PD^2, the proportionate-fair scheduler of Anderson & Srinivasan (JCSS 2004;
Baruah et al. 1996), so that after every step |C_k - s T_k / S| < 1 and every step has exactly G rows. Cumulative
largest remainder would not do: the count of a rare task can go down from one step to the next.

Shares that change from step to step (VaryingQuota):

    A_k(s) = G sum of p_k(t) over the steps t < s,      C_k(s) = floor or ceil of A_k(s) after every step s

so |C_k - A_k| < 1 at every step, and every step has exactly G rows. Row j of task k may come once A_k has passed j - 1
and is due when A_k reaches j: jobs of one unit with release times and deadlines on G machines. The fractional plan A
is feasible, so a whole one exists (the polytope of jobs and steps is integral), and earliest-deadline-first finds it
(Jackson 1955; for one row a step this is Tijdeman's chairman assignment, Discrete Math. 32, 1980). All in integers:
A is kept in units of 2^-16 row.
"""

from __future__ import annotations

import heapq
from abc import ABC, abstractmethod
from typing import Any

import numpy as np
from numpy.typing import NDArray

from data_mixers.mixture.mixture import Floats
from data_mixers.plan.epoch_caps import capped_over_time, capped_shares

Ints = NDArray[np.int64]


def largest_remainder(quota_K: NDArray[np.float64], total: int) -> Ints:
    """Integers [K] with sum `total`, each floor or ceil of its quota (sum total); ties go to the lower index."""
    quota_K = np.round(quota_K, 6)  # 1/3 + 1/3 + 1/3 of a total are ties, whatever the last bits say
    floor_K = np.floor(quota_K).astype(np.int64)
    missing = total - int(floor_K.sum())
    order = np.argsort(-(quota_K - floor_K), kind="stable")
    if missing >= 0:
        floor_K[order[:missing]] += 1
    else:  # rounding at 6 decimals carried a quota over an integer: take it back where least was cut off
        floor_K[order[missing:]] -= 1
    return floor_K


class ExactQuota(ABC):
    """Rows of each task in each of S steps. Blocks of steps are scheduled when asked for; kept between them are the
    counts at the start of each block, O(K S / 1024) integers, and the last block."""

    BLOCK = 1024  # steps

    def __init__(self, steps: int, tasks: int) -> None:
        self.steps, self.tasks = steps, tasks
        self._marks: list[Ints] = [np.zeros(tasks, dtype=np.int64)]
        self._last: tuple[int, Ints] | None = None

    def counts(self, step: int) -> Ints:
        """C_K: rows of each task in the steps before `step` (0 <= step <= S)."""
        block, inside = divmod(step, self.BLOCK)
        while len(self._marks) <= block:
            self._block(len(self._marks) - 1)
        return self._marks[block] + (self._block(block)[:inside].sum(axis=0) if inside else 0)

    def rows(self, start: int, stop: int) -> Ints:
        """n [stop - start, K]: rows of each task in each of the steps start .. stop - 1."""
        parts = []
        while start < stop:
            block, inside = divmod(start, self.BLOCK)
            self.counts(block * self.BLOCK)
            end = min(stop, (block + 1) * self.BLOCK)
            parts.append(self._block(block)[inside : inside + end - start])
            start = end
        return np.concatenate(parts)

    @abstractmethod
    def exact(self, step: int) -> NDArray[np.float64]:
        """The real-valued counts [K] before `step`: what C_k is within one of."""

    @abstractmethod
    def _schedule(self, start: int, count_K: Ints) -> tuple[Ints, Ints]:
        """Rows [block, K] of the steps from `start` on, given the counts before; and the counts after."""

    def _block(self, block: int) -> Ints:
        if self._last is not None and self._last[0] == block:
            return self._last[1]
        rows, after_K = self._schedule(block * self.BLOCK, self._marks[block].copy())
        if len(self._marks) == block + 1:
            self._marks.append(after_K)
        self._last = (block, rows)
        return rows


class StepQuota(ExactQuota):
    """The quota of constant shares, for totals T_K (sum S G). Scheduled are the extra rows alone: how many of them a
    task has had is the only state, since releases and deadlines follow from it."""

    def __init__(self, total_K: Ints, steps: int) -> None:
        super().__init__(steps, len(total_K))
        self.total = [int(t) for t in total_K]
        self.base_K = np.asarray(total_K, dtype=np.int64) // steps
        self.remainder = [t % steps for t in self.total]
        self.extras = sum(self.remainder) // steps  # F: extra rows in every step

    def counts(self, step: int) -> Ints:
        if step == self.steps:  # the totals are what it began with: no need to play the run
            return np.array(self.total, dtype=np.int64)
        return step * self.base_K + super().counts(step)

    def rows(self, start: int, stop: int) -> Ints:
        return super().rows(start, stop) + self.base_K

    def exact(self, step: int) -> NDArray[np.float64]:
        """s T_k / S."""
        return step * np.array(self.total, dtype=np.float64) / self.steps

    def _schedule(self, start: int, count_K: Ints) -> tuple[Ints, Ints]:
        S, done = self.steps, count_K.tolist()
        stop = min(start + self.BLOCK, S)
        extra = np.zeros((max(0, stop - start), self.tasks), dtype=np.int64)
        released: dict[int, list[tuple[int, int, int, int]]] = {}
        ready: list[tuple[int, int, int, int]] = []

        def release(k: int, earliest: int) -> None:
            rem, j = self.remainder[k], done[k] + 1
            if rem == 0 or j > rem:
                return
            at = max((j - 1) * S // rem, earliest)
            due = _ceil(j * S, rem)
            b = 0 if (j * S) % rem == 0 else 1
            group = 0
            if 2 * rem >= S:  # group deadline of a heavy task
                group = _ceil(_ceil(due * (S - rem), S) * S, S - rem)
            key = (due, -b, -group, k)
            if at <= start:
                heapq.heappush(ready, key)
            else:
                released.setdefault(at, []).append(key)

        for k in range(self.tasks):
            release(k, start)
        for step in range(start, stop):
            for key in released.pop(step, ()):
                heapq.heappush(ready, key)
            row = extra[step - start]
            for k in [heapq.heappop(ready)[3] for _ in range(self.extras)]:
                row[k] = 1
                done[k] += 1
                release(k, step + 1)
        return extra, np.array(done, dtype=np.int64)


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


def interleave(n_SK: Ints, before_K: Ints) -> tuple[Ints, Ints]:
    """(task, visit) of all slots of some steps. n [S, K]: rows per step and task; before_K: visits before.

    Inside a step the n_k rows of task k sit at (j + 1/2) / n_k, ties to the lower task: n = 3,2,2,1 -> 0 1 2 0 3 1 2 0.
    """
    steps, tasks = n_SK.shape
    flat = n_SK.reshape(-1)
    cell = np.repeat(np.arange(steps * tasks), flat)
    j = np.arange(len(cell)) - np.repeat(np.cumsum(flat) - flat, flat)
    step, task = np.divmod(cell, tasks)
    visit = before_K[task] + (np.cumsum(n_SK, axis=0) - n_SK).reshape(-1)[cell] + j
    order = np.lexsort((task, (2 * j + 1) / (2 * flat[cell]), step))
    return task[order], visit[order]


def _ceil(a: int, b: int) -> int:
    """a / b rounded up."""
    return -(-a // b)
