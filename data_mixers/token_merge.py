"""The plan's order when shares count tokens: the tasks' streams merged by tokens.

Row i of task k's stream has the tag (tokens before it + half its own) / p_k; all streams are merged by tag, ties to the
lower task. At every prefix |tokens_k - p_k tokens| <= L_k / 2 + p_k sum_j L_j / 2 with L the longest rows; with the tag
at a row's start or end the error is about twice that. Step s takes rows until the cumulative tokens reach
(s + 1) x batch tokens. Kept: one small integer per row of the run, and counts every 4096 rows.
"""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from .errors import MixError
from .quota import Ints, capped_shares

if TYPE_CHECKING:
    from .plan import MixturePlan


class TokenMerge:
    """Order and step bounds of a plan with unit="tokens"."""

    BLOCK = 4096  # rows between two count marks

    def __init__(self, plan: MixturePlan, lengths: list[Ints], on_cap: str) -> None:
        self._check(plan, lengths)
        self._start_K = plan.start_K
        K, total = len(plan.names), plan.steps * plan.batch
        self.digest = hashlib.sha256(
            b"".join(hashlib.sha256(length.tobytes()).digest() for length in lengths)
        ).hexdigest()
        limit_K = np.array([self._tokens_under_cap(plan, k, lengths[k]) for k in range(K)])
        share_K = capped_shares(plan.mixture.shares, limit_K, total, on_cap=on_cap, names=plan.names, describe="tokens")
        # A stream must reach past the last tag that can be drawn: the total plus half a longest row of each task.
        reach = total + sum(int(length.max()) for length in lengths if len(length)) + 1
        tags, tasks, owns = [], [], []
        for k in range(K):
            own = self._stream(plan, k, lengths[k], share_K[k] * reach)
            if len(own):
                tags.append((2.0 * (np.cumsum(own) - own) + own) / (2.0 * share_K[k]))
                tasks.append(np.full(len(own), k, dtype=np.uint16))
                owns.append(own)
        order = np.argsort(np.concatenate(tags), kind="stable")  # stable: ties stay in task order
        task, own = np.concatenate(tasks)[order], np.concatenate(owns)[order]
        cumulative = np.cumsum(own)
        asked = np.arange(1, plan.steps + 1, dtype=np.int64) * plan.batch
        self.bounds = np.r_[0, np.minimum(np.searchsorted(cumulative, asked) + 1, len(task))]
        if np.any(np.diff(self.bounds) <= 0):
            step = int(np.flatnonzero(np.diff(self.bounds) <= 0)[0])
            raise MixError(
                f"the rows that max_epochs allows end before step {step}", do="fewer steps, or a higher max_epochs"
            )
        end = int(self.bounds[-1])
        self._task = task[:end].astype(np.uint8 if K <= 256 else np.uint16)
        self.rows_K = np.bincount(self._task, minlength=K).astype(np.int64)
        self.tokens_K = np.bincount(self._task, weights=own[:end], minlength=K).astype(np.int64)
        marks = [np.zeros(K, dtype=np.int64)]
        for first in range(0, end, self.BLOCK):
            marks.append(marks[-1] + np.bincount(self._task[first : first + self.BLOCK], minlength=K))
        self._marks = np.stack(marks)

    @staticmethod
    def _check(plan: MixturePlan, lengths: list[Ints]) -> None:
        for name, size, length in zip(plan.names, plan.size_K, lengths, strict=True):
            if length.shape != (size,):
                raise MixError(
                    f"task {name} has {size} rows and lengths of shape {length.shape}", do="one length per row"
                )
            if len(length) and (length.min() < 0 or length.max() == 0):
                raise MixError(
                    f"task {name} has rows of {length.min()} to {length.max()} tokens", do="lengths >= 0, not all 0"
                )
            if len(length) and length.max() > plan.batch:
                raise MixError(
                    f"task {name} has a row of {length.max()} tokens, a step has {plan.batch}",
                    do="raise the batch tokens",
                )

    @staticmethod
    def _tokens_under_cap(plan: MixturePlan, k: int, length: Ints) -> float:
        """Tokens in the visits start .. cap of task k."""
        cap = plan._max_rows_K[k]
        if np.isinf(cap):
            return np.inf
        return float(_tokens_until(plan, k, length, int(cap)) - _tokens_until(plan, k, length, int(plan.start_K[k])))

    @staticmethod
    def _stream(plan: MixturePlan, k: int, length: Ints, tokens: float) -> Ints:
        """Lengths of task k's visits from `start` on, until they hold `tokens` or the cap ends them."""
        if tokens <= 0 or not len(length):
            return np.zeros(0, dtype=np.int64)
        first = int(plan.start_K[k])
        epoch, parts, have = first // len(length), [], 0
        while have < tokens and epoch * len(length) < plan._max_rows_K[k]:
            visit = np.arange(max(first, epoch * len(length)), int(min((epoch + 1) * len(length), plan._max_rows_K[k])))
            parts.append(length[plan.rows_of(np.full(len(visit), k), visit)[2]])
            have += int(parts[-1].sum())
            epoch += 1
        own = np.concatenate(parts) if parts else np.zeros(0, dtype=np.int64)
        return own[: int(np.searchsorted(np.cumsum(own), tokens)) + 1]

    def block(self, number: int) -> tuple[Ints, Ints]:
        """(task, visit) of rows number * BLOCK onwards."""
        task = self._task[number * self.BLOCK : (number + 1) * self.BLOCK].astype(np.int64)
        return task, self._start_K[task] + self._marks[number][task] + _rank_among_equals(task)

    def counts(self, s: int) -> Ints:
        """Rows of each task [K] before step s."""
        number, inside = divmod(int(self.bounds[s]), self.BLOCK)
        part = self._task[number * self.BLOCK : number * self.BLOCK + inside]
        return self._marks[number] + np.bincount(part, minlength=len(self.rows_K))


def _tokens_until(plan: MixturePlan, k: int, length: Ints, visits: int) -> int:
    full, rest = divmod(visits, len(length)) if len(length) else (0, 0)
    if rest == 0:
        return full * int(length.sum())
    visit = full * len(length) + np.arange(rest)
    return full * int(length.sum()) + int(length[plan.rows_of(np.full(rest, k), visit)[2]].sum())


def _rank_among_equals(task: NDArray[np.int64]) -> Ints:
    """How many equal entries stand before each entry: 3 1 3 3 1 -> 0 0 1 2 1."""
    order = np.argsort(task, kind="stable")
    sorted_task = task[order]
    starts = np.flatnonzero(np.r_[True, np.diff(sorted_task) != 0]) if len(task) else np.zeros(0, dtype=np.int64)
    rank = np.arange(len(task)) - np.repeat(starts, np.diff(np.r_[starts, len(task)]))
    out = np.empty(len(task), dtype=np.int64)
    out[order] = rank
    return out
