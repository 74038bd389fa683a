"""How many rows of each task: totals of a run, the exact share of every step, and their order inside it.

Totals: largest-remainder rounding of S G p_k. Steps: each takes T_k // S rows of task k or one more; the extra rows are
placed by PD^2, the proportionate-fair scheduler of Anderson & Srinivasan (JCSS 2004; Baruah et al. 1996), so that after
every step |C_k - s T_k / S| < 1 and every step has exactly G rows. Cumulative largest remainder would not do: the count
of a rare task can go down from one step to the next.
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from data_mixers.common.errors import MixError

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


def capped_shares(
    share_K: NDArray[np.float64],
    limit_K: NDArray[np.float64],
    total: float,
    *,
    on_cap: Literal["error", "redistribute"],
    names: Sequence[str],
    describe: str,
) -> NDArray[np.float64]:
    """Shares with total * share <= limit. `limit_K`: what each task can give under its epoch cap (same unit as total).

    error: MixError that names tasks, asked and allowed, and the ways out. redistribute: capped tasks give their limit,
    the others are scaled up by a common factor, again until nothing is over.
    """
    over_K = share_K * total > limit_K * (1 + 1e-12)
    if not over_K.any():
        return share_K
    if on_cap == "error":
        asked = "; ".join(
            f"{names[k]}: {share_K[k] * total:.0f} {describe} asked, {limit_K[k]:.0f} allowed"
            for k in np.flatnonzero(over_K).tolist()
        )
        raise MixError(
            f"the mixture asks for more epochs than max_epochs allows ({asked})",
            where="mixture.max_epochs",
            do="fewer steps, a lower share, a higher max_epochs; or on_cap: redistribute",
        )
    if limit_K[share_K > 0].sum() < total * (1 - 1e-12):
        given = limit_K[share_K > 0].sum()
        raise MixError(
            f"all tasks together give {given:.0f} {describe} under max_epochs, the run asks for {total:.0f}",
            where="mixture.max_epochs",
            do="fewer steps, or a higher max_epochs",
        )
    out_K, capped_K = share_K.copy(), np.zeros(len(share_K), dtype=bool)
    while True:
        capped_K |= out_K * total > limit_K * (1 + 1e-12)
        free_K = ~capped_K & (share_K > 0)
        out_K = np.where(capped_K, limit_K / total, 0.0)
        if not free_K.any():
            return out_K
        out_K = np.where(free_K, share_K * (1 - out_K.sum()) / share_K[free_K].sum(), out_K)
        if not np.any(out_K[free_K] * total > limit_K[free_K] * (1 + 1e-12)):
            return out_K


class StepQuota:
    """Rows of each task in each of S steps, for totals T_K (sum S G). Blocks of steps are computed when asked for.

    The only state between blocks is how many extra rows each task has had (releases and deadlines follow from it),
    kept once per block: O(K S / 1024) integers.
    """

    BLOCK = 1024  # steps

    def __init__(self, total_K: Ints, steps: int) -> None:
        self.steps = steps
        self.total = [int(t) for t in total_K]
        self.base_K = np.asarray(total_K, dtype=np.int64) // steps
        self.remainder = [t % steps for t in self.total]
        self.extras = sum(self.remainder) // steps  # F: extra rows in every step
        self._marks: list[list[int]] = [[0] * len(self.total)]  # extras so far at the start of each block
        self._cache: tuple[int, Ints] | None = None

    def counts(self, step: int) -> Ints:
        """C_K: rows of each task in the steps before `step` (0 <= step <= S)."""
        block, inside = divmod(step, self.BLOCK)
        self._reach(block)
        extra_K = np.array(self._marks[block], dtype=np.int64)
        if inside:
            extra_K = extra_K + self._block(block)[:inside].sum(axis=0)
        return step * self.base_K + extra_K

    def exact(self, step: int) -> NDArray[np.float64]:
        """s T_k / S: what C_k is within one of."""
        return step * np.array(self.total, dtype=np.float64) / self.steps

    def rows(self, start: int, stop: int) -> Ints:
        """n [stop - start, K]: rows of each task in each of the steps start .. stop - 1."""
        parts = []
        while start < stop:
            block, inside = divmod(start, self.BLOCK)
            self._reach(block)
            end = min(stop, (block + 1) * self.BLOCK)
            parts.append(self._block(block)[inside : inside + end - start])
            start = end
        return np.concatenate(parts) + self.base_K

    def _reach(self, block: int) -> None:
        while len(self._marks) <= block:
            self._block(len(self._marks) - 1)

    def _block(self, block: int) -> Ints:
        if self._cache is not None and self._cache[0] == block and len(self._marks) > block + 1:
            return self._cache[1]
        extra, done = self._schedule(block * self.BLOCK, list(self._marks[block]))
        if len(self._marks) == block + 1:
            self._marks.append(done)
        self._cache = (block, extra)
        return extra

    def _schedule(self, start: int, done: list[int]) -> tuple[Ints, list[int]]:
        """Extras [block, K] of the steps from `start`, given the extras done before; and those done after."""
        S, K = self.steps, len(self.total)
        stop = min(start + self.BLOCK, S)
        extra = np.zeros((max(0, stop - start), K), dtype=np.int64)
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

        for k in range(K):
            release(k, start)
        for step in range(start, stop):
            for key in released.pop(step, ()):
                heapq.heappush(ready, key)
            row = extra[step - start]
            for k in [heapq.heappop(ready)[3] for _ in range(self.extras)]:
                row[k] = 1
                done[k] += 1
                release(k, step + 1)
        return extra, done


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
