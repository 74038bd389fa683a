"""What an update broke: an old and a new model on the same held-out examples (`mtft eval --against OLD`).

    negative flip   old right, new wrong        positive flip   old wrong, new right
    churn           either: the share of examples whose right or wrong changed
    loss regression   mean over the examples of max(0, new loss - old loss), in nats per token

For every metric that says right or wrong of an example, with bootstrap intervals over the examples. A better average
can hide many negative flips, and users notice those (MUSCLE, Echterhoff et al., 2407.09435, EMNLP Findings 2024; Yan et
al., 2011.09161).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from mtft.common.bootstrap import percentile_interval, resampled_rows, same_order
from mtft.common.errors import UserError
from mtft.evaluation.task_scores import TaskScores, paired_bootstrap


@dataclass(frozen=True)
class PredictionFlips:
    """Counts of the 2 x 2 table. Rates are shares of all examples; NaN where the denominator is 0."""

    both_right: int
    negative: int
    positive: int
    both_wrong: int

    @property
    def examples(self) -> int:
        return self.both_right + self.negative + self.positive + self.both_wrong

    @property
    def churn(self) -> float:
        return (self.negative + self.positive) / self.examples if self.examples else math.nan

    @property
    def negative_rate(self) -> float:
        return self.negative / self.examples if self.examples else math.nan

    @property
    def positive_rate(self) -> float:
        return self.positive / self.examples if self.examples else math.nan

    @property
    def broken_share(self) -> float:
        """Share of what the old model had right that the new one has wrong."""
        old_right = self.both_right + self.negative
        return self.negative / old_right if old_right else math.nan


def prediction_flips(
    old_right_N: Sequence[bool] | np.ndarray, new_right_N: Sequence[bool] | np.ndarray
) -> PredictionFlips:
    """Compare two models example by example."""
    old, new = np.asarray(old_right_N, dtype=bool), np.asarray(new_right_N, dtype=bool)
    if old.shape != new.shape or old.ndim != 1:
        raise ValueError(f"old and new must be lists of equal length, are {old.shape} and {new.shape}")
    return PredictionFlips(
        both_right=int((old & new).sum()),
        negative=int((old & ~new).sum()),
        positive=int((~old & new).sum()),
        both_wrong=int((~old & ~new).sum()),
    )


def graded_regression(old_N: Sequence[float] | np.ndarray, new_N: Sequence[float] | np.ndarray) -> float:
    """mean max(0, old - new) of scores where higher is better."""
    old, new = np.asarray(old_N, dtype=np.float64), np.asarray(new_N, dtype=np.float64)
    if old.shape != new.shape or old.ndim != 1 or not len(old):
        raise ValueError(f"old and new must be lists of equal length above 0, are {old.shape} and {new.shape}")
    return float(np.maximum(0, old - new).mean())


def compare_scores(old: TaskScores, new: TaskScores, metrics: Sequence[str], *, level: float = 0.95) -> dict[str, Any]:
    """JSON of one task's comparison, on the same examples. UserError where the two have scored others.

    Returns:
        `flips` (counts), `negative_rate`, `positive_rate`, `broken_share` (all of exact match) and `loss_regression`;
        `difference`: {metric: {"value": new - old, "interval": [lower, upper]}}, by paired bootstrap at `level`;
        `right_or_wrong`: {metric: {"flips": counts, "negative_rate", "positive_rate", "churn": value and interval}} of
        exact match and of each of `metrics` that says right or wrong. None stands for what is undefined.
    """
    order = same_order(new.ids, old.ids)
    if order is None:
        raise _other_examples(old, new)
    old = old.taken(order)
    flips = prediction_flips(old.exact_N, new.exact_N)
    tokens_N = np.maximum(new.tokens_N, 1)
    figures = {
        "negative_rate": flips.negative_rate,
        "positive_rate": flips.positive_rate,
        "broken_share": flips.broken_share,
        "loss_regression": graded_regression(-old.nll_N / tokens_N, -new.nll_N / tokens_N),
    }
    differences = {metric: paired_bootstrap(new, old, metric=metric, level=level) for metric in metrics}
    return {
        "flips": dict(vars(flips)),
        **{name: value if math.isfinite(value) else None for name, value in figures.items()},
        "difference": {
            name: {"value": difference.difference, "interval": [difference.lower, difference.upper]}
            for name, difference in differences.items()
        },
        "right_or_wrong": {
            metric: _flip_rates(old_N, new_N, level)
            for metric in dict.fromkeys(["exact_match", *metrics])
            if (old_N := old.right_N(metric)) is not None and (new_N := new.right_N(metric)) is not None
        },
    }


def _flip_rates(old_N: np.ndarray, new_N: np.ndarray, level: float, draws: int = 2000, seed: int = 0) -> dict[str, Any]:
    """Counts of the 2 x 2 table, and each rate with its percentile interval over the examples."""
    flips = prediction_flips(old_N, new_N)
    changes = {"negative_rate": old_N & ~new_N, "positive_rate": ~old_N & new_N, "churn": old_N ^ new_N}
    changed_3N = np.stack(list(changes.values())).astype(np.float64)
    drawn_3D = np.concatenate(
        [changed_3N[:, rows_DN].mean(axis=2) for rows_DN in resampled_rows(len(old_N), draws, seed)], axis=1
    )
    return {"flips": dict(vars(flips))} | {
        name: {"value": getattr(flips, name), "interval": list(percentile_interval(drawn_D, level))}
        for name, drawn_D in zip(changes, drawn_3D, strict=True)
    }


def _other_examples(old: TaskScores, new: TaskScores) -> UserError:
    """What differs between the examples that two models have scored."""
    lost, added = (sorted(set(a.ids) - set(b.ids)) for a, b in ((old, new), (new, old)))
    parts = [
        f"{len(ids)} only with the {which} model (as {ids[0]})" for which, ids in (("old", lost), ("new", added)) if ids
    ]
    return UserError(
        f"{new.task}: the two models were not scored on the same rows: {', '.join(parts) or 'some stand twice'}",
        where="--against",
        do="compare models whose tokenizers leave out the same rows, or raise train.max_length",
    )
