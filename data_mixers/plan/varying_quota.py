"""Exact counts when the shares change from step to step.

    A_k(s) = G sum of p_k(t) over the steps t < s,      C_k(s) = floor or ceil of A_k(s) after every step s

so |C_k - A_k| < 1 at every step, and every step has exactly G rows. Row j of task k may come once A_k has passed j - 1
and is due when A_k reaches j: jobs of one unit with release times and deadlines on G machines. The fractional plan A
is feasible, so a whole one exists (the polytope of jobs and steps is integral), and earliest-deadline-first finds it
(Jackson 1955; for one row a step this is Tijdeman's chairman assignment, Discrete Math. 32, 1980). All in integers:
A is kept in units of 2^-16 row.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from data_mixers.common.errors import MixError
from data_mixers.plan.quota import Ints


def capped_over_time(
    share_SK: NDArray[np.float64],
    limit_K: NDArray[np.float64],
    total: float,
    *,
    on_cap: Literal["error", "redistribute"],
    names: Sequence[str],
    describe: str,
) -> NDArray[np.float64]:
    """Shares [S, K] whose amounts over the run (`total`, the same in each step) stay within limit_K.

    error: MixError. redistribute: a task over its limit is scaled down by one factor at all steps, what it gives up
    goes to the others in proportion to their shares of the same step, again until nothing is over.
    """

    def over(share_SK: NDArray[np.float64]) -> NDArray[np.bool_]:
        return share_SK.mean(axis=0) * total > limit_K * (1 + 1e-12) + 1e-9

    if not over(share_SK).any():
        return share_SK
    if on_cap == "error":
        asked_K = share_SK.mean(axis=0) * total
        asked = "; ".join(
            f"{names[k]}: {asked_K[k]:.0f} {describe} asked, {limit_K[k]:.0f} allowed"
            for k in np.flatnonzero(over(share_SK)).tolist()
        )
        raise MixError(
            f"the mixture asks for more epochs than max_epochs allows ({asked})",
            where="mixture.max_epochs",
            do="fewer steps, lower shares, a higher max_epochs; or on_cap: redistribute",
        )
    given_SK, capped_K = share_SK, np.zeros(len(limit_K), dtype=bool)
    while True:
        new_K = over(given_SK) & ~capped_K
        if not new_K.any():
            return given_SK
        capped_K |= new_K
        with np.errstate(divide="ignore", invalid="ignore"):
            factor_K = np.where(capped_K, limit_K / (share_SK.mean(axis=0) * total), 1.0)
        held_SK = np.where(capped_K, share_SK * factor_K, 0.0)
        free_SK = np.where(capped_K, 0.0, share_SK)
        room_S, left_S = free_SK.sum(axis=1), 1 - held_SK.sum(axis=1)
        stuck_S = (room_S <= 0) & (left_S > 1e-9)
        if stuck_S.any():
            capped = ", ".join(names[k] for k in np.flatnonzero(capped_K).tolist())
            raise MixError(
                f"at progress {np.argmax(stuck_S) / len(share_SK):.2f} only tasks at their epoch cap have a share "
                f"({capped}), so what they can't give can't go to others",
                where="mixture.max_epochs",
                do="fewer steps, a higher max_epochs, or a share for another task there",
            )
        scale_S = np.divide(left_S, room_S, out=np.zeros_like(room_S), where=room_S > 0)
        given_SK = held_SK + free_SK * scale_S[:, None]


class VaryingQuota:
    """Rows of each task in each of S steps of G rows, for shares [S, K]. The same interface as quota.StepQuota.

    carry_K: rows each task is owed at the start (of a plan that this one follows; sum 0). Kept: the ideal counts
    [S + 1, K], and the real ones once a block. A limit that the shares keep in sum is kept to the row.
    """

    BLOCK = 1024  # steps

    def __init__(
        self,
        share_SK: NDArray[np.float64],
        batch: int,
        carry_K: NDArray[np.float64] | None = None,
    ) -> None:
        self.steps, self.tasks = share_SK.shape
        self.batch = batch
        self.unit = max(1, min(2**16, 2**52 // (self.steps * batch)))  # units that make a row
        exact_SK = np.vstack([np.zeros(self.tasks), np.cumsum(share_SK, axis=0)]) * batch
        if carry_K is not None:
            exact_SK += carry_K
        self.ideal = _whole(exact_SK, self.unit, batch)  # [S + 1, K], in units
        self._marks: list[Ints] = [np.zeros(self.tasks, dtype=np.int64)]
        self._cache: tuple[int, Ints] | None = None

    def counts(self, step: int) -> Ints:
        """C_K: rows of each task in the steps before `step` (0 <= step <= S)."""
        block, inside = divmod(step, self.BLOCK)
        while len(self._marks) <= block:
            self._block(len(self._marks) - 1)
        return self._marks[block] + (self._block(block)[:inside].sum(axis=0) if inside else 0)

    def exact(self, step: int) -> NDArray[np.float64]:
        """A_k (with the carry): what C_k is within one of."""
        return self.ideal[step] / self.unit

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

    def _block(self, block: int) -> Ints:
        if self._cache is not None and self._cache[0] == block:
            return self._cache[1]
        rows, after = self._schedule(block * self.BLOCK, self._marks[block].copy())
        if len(self._marks) == block + 1:
            self._marks.append(after)
        self._cache = (block, rows)
        return rows

    def _schedule(self, start: int, count_K: Ints) -> tuple[Ints, Ints]:
        """Rows [block, K] of the steps from `start` on, given the counts before; and the counts after."""
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
            elif extra < 0:  # only behind a start that nobody could foresee (`carry`): what is least late waits
                late_K = np.where(next_K > count_K, rest_K, np.iinfo(np.int64).max)
                next_K[np.argsort(late_K, kind="stable")[:-extra]] -= 1
            rows[s], count_K = next_K - count_K, next_K
        return rows, count_K


def _whole(exact_SK: NDArray[np.float64], unit: int, batch: int) -> Ints:
    """Units [S + 1, K] that add up to whole steps. What is a whole number of rows stays one; what rounding leaves over
    goes to the task that is farthest from one.
    """
    whole_SK = np.rint(exact_SK * unit).astype(np.int64)
    left_S = np.arange(len(whole_SK)) * batch * unit - whole_SK.sum(axis=1)
    rest_SK = whole_SK % unit
    whole_SK[np.arange(len(whole_SK)), np.argmax(np.minimum(rest_SK, unit - rest_SK), axis=1)] += left_S
    return whole_SK
