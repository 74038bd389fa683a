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
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from mtft.common.aggregates import AGGREGATES, Aggregate
from mtft.common.atomic_io import write_text
from mtft.common.bootstrap import percentile_interval, resampled_rows, same_order
from mtft.common.errors import UserError
from mtft.common.own_files import read_own_lines
from mtft.evaluation.metrics.base import Answer

FORWARD = {"loss": "token_loss", "token_accuracy": "token_share", "exact_match": "share"}
"""Metrics that the forward pass over the held-out rows gives every task, and their aggregates."""
_LINE = {"task": str, "id": str, "nll": float, "tokens": int, "correct": int}


class MetricRows(NamedTuple):
    """What the rows scored by one metric: float64 [N, S], and the name of the aggregate that makes a score of them."""

    aggregate: str
    stats_NS: np.ndarray


@dataclass(frozen=True)
class TaskScores:
    """Scores of one task's held-out rows (in the metrics: examples), N of them, in the store's order.

    ids        N strings, each once: the row's own id, or file:line
    nll_N      float64, sum of -log p over the supervised tokens of the example (nats)
    tokens_N   int64, supervised tokens
    correct_N  int64, supervised tokens that are the argmax of the model
    answered   {metric: rows} of the metrics that ask for answers or labels (mtft.evaluation.metrics); may be empty
    answers    what the model wrote, where it was asked; not kept by `save`
    """

    task: str
    ids: tuple[str, ...]
    nll_N: np.ndarray
    tokens_N: np.ndarray
    correct_N: np.ndarray
    answered: Mapping[str, MetricRows] = field(default_factory=dict)
    answers: Sequence[Answer] = field(default=(), compare=False)

    def __post_init__(self) -> None:
        rows = {len(rows.stats_NS) for rows in self.answered.values()}
        lengths = {len(self.ids), len(self.nll_N), len(self.tokens_N), len(self.correct_N), *rows}
        if len(lengths) != 1:
            raise ValueError(f"scores of {self.task!r}: fields of unequal length {sorted(lengths)}")

    @property
    def metrics(self) -> tuple[str, ...]:
        """Names of everything that was measured."""
        return *FORWARD, *self.answered

    @property
    def exact_N(self) -> np.ndarray:
        """bool [N]: greedy decoding would reproduce the response. An example without supervised tokens is not exact."""
        return (self.correct_N == self.tokens_N) & (self.tokens_N > 0)

    def aggregate(self, metric: str) -> Aggregate:
        """How the rows become the score. Raises ValueError for a metric that was not measured."""
        return self._rows(metric)[0]

    def statistics(self, metric: str) -> np.ndarray:
        """float64 [N, S]: the numbers of each example."""
        return self._rows(metric)[1]

    def _rows(self, metric: str) -> tuple[Aggregate, np.ndarray]:
        if metric in self.answered:
            name, stats_NS = self.answered[metric]
            return AGGREGATES[name], stats_NS
        columns = {
            "loss": (self.nll_N, self.tokens_N),
            "token_accuracy": (self.correct_N, self.tokens_N),
            "exact_match": (self.exact_N,),
        }
        if metric not in columns:
            raise ValueError(f"metric {metric!r}: must be one of {', '.join(self.metrics)}")
        return AGGREGATES[FORWARD[metric]], np.stack(columns[metric], axis=1).astype(np.float64)

    def score(self, metric: str) -> float:
        """The task's score; NaN without examples, or without a supervised token."""
        aggregate, stats_NS = self._rows(metric)
        return aggregate.value(stats_NS) if len(stats_NS) else float("nan")

    def right_N(self, metric: str) -> np.ndarray | None:
        """bool [N]: which examples are right, for a metric that says right or wrong; None for the others."""
        aggregate, stats_NS = self._rows(metric)
        yes_no = aggregate.name == "share" and bool(np.isin(stats_NS, (0.0, 1.0)).all())
        return stats_NS[:, 0] == 1 if yes_no else None

    def taken(self, order: np.ndarray) -> TaskScores:
        """The examples at these places, in this order."""
        answered = {name: MetricRows(rows.aggregate, rows.stats_NS[order]) for name, rows in self.answered.items()}
        ids = tuple(self.ids[int(i)] for i in order)
        columns = (self.nll_N[order], self.tokens_N[order], self.correct_N[order])
        answers = [self.answers[int(i)] for i in order] if self.answers else ()
        return TaskScores(self.task, ids, *columns, answered, answers)

    def answering(self, answered: Mapping[str, MetricRows], answers: Sequence[Answer]) -> TaskScores:
        """The same with more of what was found by asking."""
        return replace(self, answered={**self.answered, **answered}, answers=answers or self.answers)

    def summary(self) -> dict[str, float]:
        """The task's point estimates by metric (NaN when nothing is supervised), and sizes."""
        scores = {metric: self.score(metric) for metric in self.metrics}
        return {**scores, "examples": len(self.ids), "tokens": int(self.tokens_N.sum())}

    def intervals(
        self, metrics: Sequence[str] | None = None, *, level: float = 0.95, draws: int = 2000, seed: int = 0
    ) -> dict[str, tuple[float, float]]:
        """Bootstrap percentile interval (lower, upper) of each metric over the examples. metrics: None: all."""
        samples = {
            name: np.concatenate(list(_resample(self, name, draws, seed)))
            for name in (self.metrics if metrics is None else metrics)
        }
        return {name: percentile_interval(values, level) for name, values in samples.items()}

    def save(self, path: str | os.PathLike[str]) -> None:
        """One JSON line an example: task, id, nll, tokens, correct, and what was `answered`. Whole or not at all."""
        lines = []
        columns = zip(self.ids, self.nll_N.tolist(), self.tokens_N.tolist(), self.correct_N.tolist(), strict=True)
        for row, values in enumerate(columns):
            record: dict[str, Any] = {"task": self.task, **dict(zip(("id", "nll", "tokens", "correct"), values))}
            if self.answered:
                record["metrics"] = {
                    metric: {of.aggregate: of.stats_NS[row].tolist()} for metric, of in self.answered.items()
                }
            lines.append(json.dumps(record, ensure_ascii=False) + "\n")
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
        try:
            answered = _answered([row.get("metrics", {}) for row in read.rows])
        except (AttributeError, KeyError, TypeError, ValueError):
            raise UserError("damaged scores: 'metrics' differ from line to line", where=str(path), do=do) from None
        return cls(read.rows[0]["task"], ids, nll, tokens, correct, answered)


def _answered(lines: Sequence[Mapping[str, Mapping[str, Sequence[float]]]]) -> dict[str, MetricRows]:
    """{metric: rows} of [{metric: {aggregate: numbers}}]. Raises where lines are not alike."""
    answered = {}
    for metric, first in lines[0].items():
        (name,) = first
        stats_NS = np.array([line[metric][name] for line in lines], dtype=np.float64)
        if stats_NS.shape != (len(lines), AGGREGATES[name].width) or not np.isfinite(stats_NS).all():
            raise ValueError(metric)
        answered[metric] = MetricRows(name, stats_NS)
    if any(line.keys() != lines[0].keys() for line in lines):
        raise ValueError("metrics")
    return answered


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
    order = same_order(a.ids, b.ids)
    if order is None:
        raise ValueError(f"{a.task!r} and {b.task!r} were not scored on the same examples (ids differ or repeat)")
    b = b.taken(order)
    both = zip(_resample(a, metric, draws, seed), _resample(b, metric, draws, seed), strict=True)
    lower, upper = percentile_interval(np.concatenate([left - right for left, right in both]), level)
    left, right = a.score(metric), b.score(metric)
    return MetricDifference(a.task, metric, left, right, left - right, lower, upper)


def _resample(scores: TaskScores, metric: str, draws: int, seed: int) -> Iterator[np.ndarray]:
    """Metric of `draws` resamples of the examples, in chunks; the same seed picks the same examples."""
    count = len(scores.ids)
    if count == 0 or scores.tokens_N.sum() == 0:
        raise ValueError(f"scores of {scores.task!r} hold no supervised token: no interval")
    aggregate, stats_NS = scores.aggregate(metric), scores.statistics(metric)
    for rows in resampled_rows(count, draws, seed):
        yield aggregate.resampled(stats_NS, rows)
