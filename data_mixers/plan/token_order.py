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

import numpy as np
from numpy.typing import NDArray

from data_mixers.common.errors import MixError
from data_mixers.mixture.mixture import Floats
from data_mixers.plan.epoch_caps import OnCap, capped_over_time, capped_shares
from data_mixers.plan.plan_spec import PlanSpec
from data_mixers.plan.quota import Ints, exact_quota

BLOCK = 4096  # rows between two count marks
MOST_ROWS = 10**9  # of a run: sorting them takes some 60 bytes each


class TokenBalancedOrder:
    """Order and step bounds of a plan with unit="tokens"."""

    block_rows = BLOCK

    def __init__(self, spec: PlanSpec, lengths: list[Ints], on_cap: OnCap) -> None:
        self.spec, self._lengths = spec, lengths
        self._on_cap: OnCap = on_cap
        self._check_lengths()
        self._check_rows()
        K = len(spec.names)
        self._owed_K = np.array([0.0] * K if spec.carry is None else spec.carry)
        self._share_K: Floats | None = None  # where they are constant
        digests = (hashlib.sha256(length.tobytes()).digest() for length in lengths)
        self.digest = hashlib.sha256(b"".join(digests)).hexdigest()
        limit_K = np.array([self._tokens_of(k, cap) for k, cap in enumerate(spec.max_visits_K)])
        task, tokens, self._bounds = (self._alternating if spec.style == "alternating" else self._merged)(limit_K)
        empty = np.flatnonzero(np.diff(self._bounds) <= 0)
        if len(empty):
            raise MixError(
                f"the rows that max_epochs allows end before step {int(empty[0])}",
                do="fewer steps, or a higher max_epochs",
            )
        end = int(self._bounds[-1])
        self._task = task[:end].astype(np.uint8 if K <= 256 else np.uint16)
        self._total_K = np.bincount(self._task, weights=tokens[:end], minlength=K).astype(np.int64)
        marks = [np.zeros(K, dtype=np.int64)]
        for first in range(0, end, BLOCK):
            marks.append(marks[-1] + np.bincount(self._task[first : first + BLOCK], minlength=K))
        self._marks = np.stack(marks)

    def _merged(self, limit_K: Floats) -> tuple[Ints, Ints, Ints]:
        """(task, tokens) of every row in order, and the steps' bounds [S + 1]: streams merged by tag."""
        spec, K = self.spec, len(limit_K)
        total = spec.steps * spec.batch
        if spec.schedule is None:
            share_K = capped_shares(
                spec.mixture.shares, limit_K, total, on_cap=self._on_cap, names=spec.names, unit_name="tokens"
            )
            self._share_K, self._owed_K = share_K, np.where(share_K > 0, self._owed_K, 0.0)
            asked_K, last_K = share_K * total + np.maximum(self._owed_K, 0), share_K
            tag = [lambda x, share=share, owed=owed: (x - owed) / share for share, owed in zip(share_K, self._owed_K)]
        else:
            share_SK = capped_over_time(
                spec.schedule.shares(spec.steps), limit_K, total,
                on_cap=self._on_cap, names=spec.names, unit_name="tokens",
            )  # fmt: skip
            asked_SK = np.vstack([np.zeros(K), np.cumsum(share_SK, axis=0)]) * spec.batch
            asked_K, last_K = asked_SK[-1], share_SK[-1]
            at_S = np.arange(spec.steps + 1, dtype=np.float64) * spec.batch
            tag = [partial(_reached, asked_S=asked_SK[:, k], at_S=at_S, last=last_K[k]) for k in range(K)]
        # A stream must reach past the last tag that can be drawn: the total plus half a longest row of each task.
        beyond = sum(int(length.max()) for length in self._lengths if len(length)) + 1
        tags, tasks, streams = [], [], []
        for k in range(K):
            tokens = self._stream(k, asked_K[k] + last_K[k] * beyond)
            if len(tokens):
                tags.append(tag[k]((2.0 * (np.cumsum(tokens) - tokens) + tokens) / 2.0))
                tasks.append(np.full(len(tokens), k, dtype=np.uint16))
                streams.append(tokens)
        order = np.argsort(np.concatenate(tags), kind="stable")  # stable: ties stay in task order
        task, tokens = np.concatenate(tasks)[order], np.concatenate(streams)[order]
        asked = np.arange(1, spec.steps + 1, dtype=np.int64) * spec.batch
        return task, tokens, np.r_[0, np.minimum(np.searchsorted(np.cumsum(tokens), asked) + 1, len(task))]

    def _alternating(self, limit_K: Floats) -> tuple[Ints, Ints, Ints]:
        """The same for steps of one task each: which task has which step is counted exactly, as for rows."""
        spec, S, K = self.spec, self.spec.steps, len(limit_K)
        quota = exact_quota(
            spec.mixture.shares if spec.schedule is None else spec.schedule.shares(S),
            np.floor(limit_K / spec.batch),
            S,
            1,
            on_cap=self._on_cap,
            names=spec.names,
            unit_name=f"steps of {spec.batch} tokens",
        )
        turn_SK = quota.rows(0, S).astype(bool)
        rows_S, streams = np.zeros(S, dtype=np.int64), []
        for k in range(K):
            turns = int(turn_SK[:, k].sum())
            tokens = self._stream(k, float(turns * spec.batch))
            ends = np.searchsorted(np.cumsum(tokens), np.arange(1, turns + 1) * spec.batch) + 1
            ends = np.minimum(ends, len(tokens))
            rows_S[turn_SK[:, k]] = np.diff(ends, prepend=0)
            streams.append(tokens[: ends[-1]] if turns else tokens[:0])
        task = np.repeat(np.argmax(turn_SK, axis=1), rows_S)
        tokens = np.empty(len(task), dtype=np.int64)
        for k in range(K):
            tokens[task == k] = streams[k]
        return task, tokens, np.r_[0, np.cumsum(rows_S)]

    def _check_lengths(self) -> None:
        for name, size, length in zip(self.spec.names, self.spec.size_K, self._lengths, strict=True):
            if length.shape != (size,):
                raise MixError(
                    f"task {name} has {size} rows and lengths of shape {length.shape}", do="one length per row"
                )
            if len(length) and (length.min() < 0 or length.max() == 0):
                raise MixError(
                    f"task {name} has rows of {length.min()} to {length.max()} tokens", do="lengths >= 0, not all 0"
                )
            if len(length) and length.max() > self.spec.batch:
                raise MixError(
                    f"task {name} has a row of {length.max()} tokens, a step has {self.spec.batch}",
                    do="raise the batch tokens",
                )

    def _check_rows(self) -> None:
        """MixError for a run of more rows than can be put in order."""
        spec = self.spec
        shares_K = zip(spec.mixture.shares.tolist(), self._lengths, strict=True)
        total = spec.steps * spec.batch
        rows = round(sum(share * total / float(length.mean()) for share, length in shares_K if share > 0))
        if rows > MOST_ROWS:
            raise MixError(
                f"a run by tokens is put in order as a whole: it has {rows:,} rows, and {MOST_ROWS:,} is the most",
                where="mixture.unit",
                do="fewer steps, fewer tokens in a step, or mixture.unit: examples, which needs no such order",
            )

    def _tokens_of(self, k: int, end: float) -> float:
        """Tokens in the visits start .. end of task k."""
        if np.isinf(end):
            return np.inf
        return self._tokens_before(k, int(end)) - self._tokens_before(k, int(self.spec.start_K[k]))

    def _tokens_before(self, k: int, visits: int) -> int:
        """Tokens in the first `visits` visits of task k."""
        length = self._lengths[k]
        epochs, rest = divmod(visits, len(length)) if len(length) else (0, 0)
        if rest == 0:
            return epochs * int(length.sum())
        visit = epochs * len(length) + np.arange(rest)
        return epochs * int(length.sum()) + int(length[self.spec.rows_of(np.full(rest, k), visit)[2]].sum())

    def _stream(self, k: int, tokens: float) -> Ints:
        """Lengths of task k's visits from `start` on, until they hold `tokens` or the cap ends them."""
        length, cap, first = self._lengths[k], self.spec.max_visits_K[k], int(self.spec.start_K[k])
        if tokens <= 0 or not len(length):
            return np.zeros(0, dtype=np.int64)
        epoch, parts, total = first // len(length), [], 0
        while total < tokens and epoch * len(length) < cap:
            visit = np.arange(max(first, epoch * len(length)), int(min((epoch + 1) * len(length), cap)))
            parts.append(length[self.spec.rows_of(np.full(len(visit), k), visit)[2]])
            total += int(parts[-1].sum())
            epoch += 1
        stream = np.concatenate(parts) if parts else np.zeros(0, dtype=np.int64)
        return stream[: int(np.searchsorted(np.cumsum(stream), tokens)) + 1]

    def step_range(self, s: int) -> tuple[int, int]:
        """Indices [first, last) of step s."""
        return int(self._bounds[s]), int(self._bounds[s + 1])

    def block(self, number: int) -> tuple[Ints, Ints]:
        """(task, visit) of rows number * block_rows onwards."""
        task = self._task[number * BLOCK : (number + 1) * BLOCK].astype(np.int64)
        return task, self.spec.start_K[task] + self._marks[number][task] + _rank_among_equals(task)

    def counts(self, s: int) -> Ints:
        """Rows of each task [K] before step s."""
        number, inside = divmod(int(self._bounds[s]), BLOCK)
        part = self._task[number * BLOCK : number * BLOCK + inside]
        return self._marks[number] + np.bincount(part, minlength=self._marks.shape[1])

    def amounts(self, s: int) -> Ints:
        """Tokens of each task [K] before step s."""
        if s == len(self._bounds) - 1:
            return self._total_K
        visits_K = self.spec.start_K + self.counts(s)
        return np.array([self._tokens_of(k, int(end)) for k, end in enumerate(visits_K)])

    def owed(self, s: int) -> Floats:
        """Tokens [K] that each task is behind (or ahead: < 0) of its share of what the steps before s hold."""
        if self._share_K is None:
            raise ValueError("only a plan of constant, mixed shares keeps an account of tokens")
        tokens_K = self.amounts(s)
        return self._owed_K + self._share_K * tokens_K.sum() - tokens_K


def _reached(x: NDArray[np.floating], asked_S: Floats, at_S: Floats, last: float) -> Floats:
    """Where the asked tokens (asked_S at the steps' borders at_S, `last` a token after them) reach x."""
    inside = np.interp(x, asked_S, at_S)
    with np.errstate(divide="ignore", invalid="ignore"):  # last = 0: what comes after the end comes never
        return np.where(x > asked_S[-1], at_S[-1] + np.divide(x - asked_S[-1], last), inside)


def _rank_among_equals(task: NDArray[np.int64]) -> Ints:
    """How many equal entries stand before each entry: 3 1 3 3 1 -> 0 0 1 2 1."""
    order = np.argsort(task, kind="stable")
    sorted_task = task[order]
    starts = np.flatnonzero(np.r_[True, np.diff(sorted_task) != 0]) if len(task) else np.zeros(0, dtype=np.int64)
    rank = np.arange(len(task)) - np.repeat(starts, np.diff(np.r_[starts, len(task)]))
    out = np.empty(len(task), dtype=np.int64)
    out[order] = rank
    return out
