"""The plan's order when shares count tokens: the tasks' streams merged by tokens.

Row i of task k's stream has the tag (tokens before it + half its own) / p_k; all streams are merged by tag, ties to the
lower task. At every prefix |tokens_k - p_k tokens| <= L_k / 2 + p_k sum_j L_j / 2 with L the longest rows; with the tag
at a row's start or end the error is about twice that. Step s takes rows until the cumulative tokens reach
(s + 1) x batch tokens. Where the shares change over the run, a row's tag is the place at which the tokens that its task
is asked for reach the row's middle. A plan that follows another one (`carry`) begins with the tokens owed to each task:
the tag is (tokens before + half its own - owed) / p_k. Where tasks alternate, a task's i-th step takes rows until its
own tokens reach i x batch tokens. Kept: one small integer per row of the run, and counts every 4096 rows.
"""

from __future__ import annotations

import hashlib
from functools import partial
from typing import TYPE_CHECKING, Literal

import numpy as np
from numpy.typing import NDArray

from data_mixers.common.errors import MixError
from data_mixers.plan.quota import Ints, StepQuota, capped_shares, largest_remainder
from data_mixers.plan.varying_quota import VaryingQuota, capped_over_time

if TYPE_CHECKING:
    from data_mixers.plan.mixture_plan import MixturePlan

Floats = NDArray[np.float64]
OnCap = Literal["error", "redistribute"]


class TokenBalancedOrder:
    """Order and step bounds of a plan with unit="tokens"."""

    BLOCK = 4096  # rows between two count marks

    def __init__(self, plan: MixturePlan, lengths: list[Ints], on_cap: OnCap) -> None:
        self._check(plan, lengths)
        self._start_K = plan.start_K
        self._owed_K = np.zeros(len(plan.names)) if plan.carry is None else np.array(plan.carry)
        self._share_K: Floats | None = None  # where they are constant
        K = len(plan.names)
        self.digest = hashlib.sha256(
            b"".join(hashlib.sha256(length.tobytes()).digest() for length in lengths)
        ).hexdigest()
        limit_K = np.array([self._tokens_under_cap(plan, k, lengths[k]) for k in range(K)])
        if plan.style == "alternating":
            task, own, self.bounds = self._take_turns(plan, lengths, limit_K, on_cap)
        else:
            task, own, self.bounds = self._merged(plan, lengths, limit_K, on_cap)
        end = int(self.bounds[-1])
        self._task = task[:end].astype(np.uint8 if K <= 256 else np.uint16)
        self._plan, self._lengths = plan, lengths
        self._total_K = np.bincount(self._task, weights=own[:end], minlength=K).astype(np.int64)
        marks = [np.zeros(K, dtype=np.int64)]
        for first in range(0, end, self.BLOCK):
            marks.append(marks[-1] + np.bincount(self._task[first : first + self.BLOCK], minlength=K))
        self._marks = np.stack(marks)

    def _merged(
        self, plan: MixturePlan, lengths: list[Ints], limit_K: Floats, on_cap: OnCap
    ) -> tuple[Ints, Ints, Ints]:
        """(task, tokens) of every row in order, and the steps' bounds [S + 1]: streams merged by tag."""
        total, options = plan.steps * plan.batch, {"on_cap": on_cap, "names": plan.names, "describe": "tokens"}
        if plan.schedule is None:
            share_K = capped_shares(plan.mixture.shares, limit_K, total, **options)
            self._share_K, self._owed_K = share_K, np.where(share_K > 0, self._owed_K, 0.0)
            asked_K, last_K = share_K * total + np.maximum(self._owed_K, 0), share_K
            tag = [lambda x, share=share, owed=owed: (x - owed) / share for share, owed in zip(share_K, self._owed_K)]
        else:
            share_SK = capped_over_time(plan.schedule.shares(plan.steps), limit_K, total, **options)
            asked_SK = np.vstack([np.zeros(len(limit_K)), np.cumsum(share_SK, axis=0)]) * plan.batch
            asked_K, last_K = asked_SK[-1], share_SK[-1]
            at_S = np.arange(plan.steps + 1, dtype=np.float64) * plan.batch
            tag = [partial(_reached, asked_S=asked_SK[:, k], at_S=at_S, last=last_K[k]) for k in range(len(limit_K))]
        # A stream must reach past the last tag that can be drawn: the total plus half a longest row of each task.
        beyond = sum(int(length.max()) for length in lengths if len(length)) + 1
        tags, tasks, owns = [], [], []
        for k in range(len(limit_K)):
            own = self._stream(plan, k, lengths[k], asked_K[k] + last_K[k] * beyond)
            if len(own):
                tags.append(tag[k]((2.0 * (np.cumsum(own) - own) + own) / 2.0))
                tasks.append(np.full(len(own), k, dtype=np.uint16))
                owns.append(own)
        order = np.argsort(np.concatenate(tags), kind="stable")  # stable: ties stay in task order
        task, own = np.concatenate(tasks)[order], np.concatenate(owns)[order]
        asked = np.arange(1, plan.steps + 1, dtype=np.int64) * plan.batch
        bounds = np.r_[0, np.minimum(np.searchsorted(np.cumsum(own), asked) + 1, len(task))]
        self._refuse_empty(bounds)
        return task, own, bounds

    def _take_turns(
        self, plan: MixturePlan, lengths: list[Ints], limit_K: Floats, on_cap: OnCap
    ) -> tuple[Ints, Ints, Ints]:
        """The same for steps of one task each: which task has which step is counted exactly, as for rows."""
        S, K = plan.steps, len(limit_K)
        turns_K = np.where(np.isinf(limit_K), np.inf, np.floor(limit_K / plan.batch))
        options = {"on_cap": on_cap, "names": plan.names, "describe": f"steps of {plan.batch} tokens"}
        quota: StepQuota | VaryingQuota
        if plan.schedule is None:
            quota = StepQuota(largest_remainder(capped_shares(plan.mixture.shares, turns_K, S, **options) * S, S), S)
        else:
            quota = VaryingQuota(capped_over_time(plan.schedule.shares(S), turns_K, S, **options), 1)
        turn_SK = quota.rows(0, S).astype(bool)
        rows_S, own_of = np.zeros(S, dtype=np.int64), []
        for k in range(K):
            turns = int(turn_SK[:, k].sum())
            own = self._stream(plan, k, lengths[k], float(turns * plan.batch))
            ends = np.searchsorted(np.cumsum(own), np.arange(1, turns + 1) * plan.batch) + 1
            ends = np.minimum(ends, len(own))
            rows_S[turn_SK[:, k]] = np.diff(ends, prepend=0)
            own_of.append(own[: ends[-1]] if turns else own[:0])
        task = np.repeat(np.argmax(turn_SK, axis=1), rows_S)
        own = np.empty(len(task), dtype=np.int64)
        for k in range(K):
            own[task == k] = own_of[k]
        bounds = np.r_[0, np.cumsum(rows_S)]
        self._refuse_empty(bounds)
        return task, own, bounds

    @staticmethod
    def _refuse_empty(bounds: Ints) -> None:
        if np.any(np.diff(bounds) <= 0):
            step = int(np.flatnonzero(np.diff(bounds) <= 0)[0])
            raise MixError(
                f"the rows that max_epochs allows end before step {step}", do="fewer steps, or a higher max_epochs"
            )

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
        return self._marks[number] + np.bincount(part, minlength=self._marks.shape[1])

    def owed(self, s: int) -> Floats:
        """Tokens [K] that each task is behind (or ahead: < 0) of its share of what the steps before s hold."""
        if self._share_K is None:
            raise ValueError("only a plan of constant, mixed shares keeps an account of tokens")
        tokens_K = self.tokens(s)
        return self._owed_K + self._share_K * tokens_K.sum() - tokens_K

    def tokens(self, s: int) -> Ints:
        """Tokens of each task [K] before step s."""
        if s == len(self.bounds) - 1:
            return self._total_K
        visits_K = self._start_K + self.counts(s)
        return np.array(
            [
                _tokens_until(self._plan, k, length, int(visits_K[k]))
                - _tokens_until(self._plan, k, length, int(self._start_K[k]))
                for k, length in enumerate(self._lengths)
            ]
        )


def _reached(x: NDArray[np.floating], asked_S: Floats, at_S: Floats, last: float) -> Floats:
    """Where the asked tokens (asked_S at the steps' borders at_S, `last` a token after them) reach x."""
    inside = np.interp(x, asked_S, at_S)
    with np.errstate(divide="ignore", invalid="ignore"):  # last = 0: what comes after the end comes never
        return np.where(x > asked_S[-1], at_S[-1] + np.divide(x - asked_S[-1], last), inside)


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
