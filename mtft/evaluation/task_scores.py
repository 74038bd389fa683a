"""What a model scored on held-out examples, one number per example: all tables and intervals are made from these.

    loss           = sum of nll / supervised tokens            (nats per token, as the objective `token`)
    token_accuracy = supervised tokens that are the argmax / supervised tokens
    exact_match    = examples whose supervised tokens are all the argmax / examples

`exact_match` is measured by teacher forcing and equals what greedy decoding would do: if the argmax is right at the
first supervised position, decoding emits it, so the second position sees the very prefix that was scored, and so on
up to and including the end of turn. It is proved against `generate` in the tests. (Where supervised tokens come in
several turns, it means: each turn is reproduced given the true turns before it.)

Intervals are bootstrap percentiles over examples (mtft.common.bootstrap). Two models are compared on the same examples,
so that the examples' own difficulty cancels.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from mtft.common.atomic_io import write_text
from mtft.common.bootstrap import percentile_interval, resampled_rows, same_order
from mtft.common.errors import UserError
from mtft.common.own_files import read_own_lines

METRICS = ("loss", "token_accuracy", "exact_match")
_LINE = {"task": str, "id": str, "nll": float, "tokens": int, "correct": int}


@dataclass(frozen=True)
class TaskScores:
    """Scores of one task's held-out rows (in the metrics: examples), N of them, in the store's order.

    ids        N strings, each once: the row's own id, or file:line
    nll_N      float64, sum of -log p over the supervised tokens of the example (nats)
    tokens_N   int64, supervised tokens
    correct_N  int64, supervised tokens that are the argmax of the model
    """

    task: str
    ids: tuple[str, ...]
    nll_N: np.ndarray
    tokens_N: np.ndarray
    correct_N: np.ndarray

    def __post_init__(self) -> None:
        lengths = {len(self.ids), len(self.nll_N), len(self.tokens_N), len(self.correct_N)}
        if len(lengths) != 1:
            raise ValueError(f"scores of {self.task!r}: fields of unequal length {sorted(lengths)}")

    @property
    def exact_N(self) -> np.ndarray:
        """bool [N]: greedy decoding would reproduce the response. An example without supervised tokens is not exact."""
        return (self.correct_N == self.tokens_N) & (self.tokens_N > 0)

    def parts(self, metric: str) -> tuple[np.ndarray, np.ndarray]:
        """(numerator, denominator) [N] of a metric."""
        over_N = {"loss": self.nll_N, "token_accuracy": self.correct_N, "exact_match": self.exact_N}[metric]
        return over_N, np.ones(len(self.ids)) if metric == "exact_match" else self.tokens_N

    def summary(self) -> dict[str, float]:
        """The task's point estimates: loss, token_accuracy, exact_match (NaN when nothing is supervised), and sizes."""
        tokens = int(self.tokens_N.sum())
        examples = len(self.ids)
        return {
            "loss": float(self.nll_N.sum() / tokens) if tokens else float("nan"),
            "token_accuracy": float(self.correct_N.sum() / tokens) if tokens else float("nan"),
            "exact_match": float(self.exact_N.mean()) if examples else float("nan"),
            "examples": examples,
            "tokens": tokens,
        }

    def intervals(self, *, level: float = 0.95, draws: int = 2000, seed: int = 0) -> dict[str, tuple[float, float]]:
        """Bootstrap percentile interval (lower, upper) of each metric over the examples."""
        samples = {name: np.concatenate(list(_resample(self, name, draws, seed))) for name in METRICS}
        return {name: percentile_interval(values, level) for name, values in samples.items()}

    def save(self, path: str | os.PathLike[str]) -> None:
        """One JSON line an example: task, id, nll, tokens, correct. Written whole or not at all."""
        lines = []
        for row in zip(self.ids, self.nll_N.tolist(), self.tokens_N.tolist(), self.correct_N.tolist(), strict=True):
            record = dict(zip(("id", "nll", "tokens", "correct"), row, strict=True))
            lines.append(json.dumps({"task": self.task, **record}, ensure_ascii=False) + "\n")
        write_text(Path(path), "".join(lines))

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> TaskScores:
        """Read what `save` wrote. UserError, with its line, for the first that is damaged: scores are whole or none."""
        do = "delete it (its stage scores again), or score again with `mtft eval`"
        read = read_own_lines(Path(path), _LINE, do=do)
        if read.problems:
            place, _, problem = read.problems[0].partition(": ")
            raise UserError(f"damaged scores: {problem}", where=f"{path}, {place}", do=do)
        problem = "the last line is cut off" if read.torn else None
        if problem is None and len({row["task"] for row in read.rows}) != 1:
            problem = "lines of several tasks" if read.rows else "no line"
        if problem is not None:
            raise UserError(f"damaged scores: {problem}", where=str(path), do=do)
        ids = tuple(row["id"] for row in read.rows)
        nll = np.array([row["nll"] for row in read.rows], dtype=np.float64)
        tokens, correct = (np.array([row[key] for row in read.rows], dtype=np.int64) for key in ("tokens", "correct"))
        return cls(read.rows[0]["task"], ids, nll, tokens, correct)


@dataclass(frozen=True)
class MetricDifference:
    """How metric `a - b` of one task comes out on the same examples, with its interval."""

    task: str
    metric: str
    a: float
    b: float
    difference: float
    lower: float
    upper: float


def paired_bootstrap(
    a: TaskScores, b: TaskScores, *, metric: str = "loss", level: float = 0.95, draws: int = 2000, seed: int = 0
) -> MetricDifference:
    """Interval of metric(a) - metric(b), resampling the examples that both have scored.

    Raises ValueError when the two don't hold the same examples: a difference over other examples would mean nothing.
    """
    if metric not in METRICS:
        raise ValueError(f"metric {metric!r}: must be one of {', '.join(METRICS)}")
    order = same_order(a.ids, b.ids)
    if order is None:
        raise ValueError(f"{a.task!r} and {b.task!r} were not scored on the same examples (ids differ or repeat)")
    b = TaskScores(b.task, a.ids, b.nll_N[order], b.tokens_N[order], b.correct_N[order])
    both = zip(_resample(a, metric, draws, seed), _resample(b, metric, draws, seed), strict=True)
    lower, upper = percentile_interval(np.concatenate([left - right for left, right in both]), level)
    left, right = a.summary()[metric], b.summary()[metric]
    return MetricDifference(a.task, metric, left, right, left - right, lower, upper)


def _resample(scores: TaskScores, metric: str, draws: int, seed: int) -> Iterator[np.ndarray]:
    """Metric of `draws` resamples of the examples, in chunks; the same seed picks the same examples."""
    count = len(scores.ids)
    if count == 0 or scores.tokens_N.sum() == 0:
        raise ValueError(f"scores of {scores.task!r} hold no supervised token: no interval")
    over, under = scores.parts(metric)
    for rows in resampled_rows(count, draws, seed):
        yield over[rows].sum(axis=1) / np.maximum(under[rows].sum(axis=1), 1)
