"""How many rows of each task: totals of a run, the exact share of every step, and their order inside it.

Totals: largest-remainder rounding of S G p_k. Steps: each takes T_k // S rows of task k or one more; the extra rows are
placed by PD^2, the proportionate-fair scheduler of Anderson & Srinivasan (JCSS 2004; Baruah et al. 1996), so that after
every step |C_k - s T_k / S| < 1 and every step has exactly G rows. Cumulative largest remainder would not do: the count
of a rare task can go down from one step to the next.
"""

from __future__ import annotations

import heapq
from abc import ABC, abstractmethod

import numpy as np
from numpy.typing import NDArray

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
