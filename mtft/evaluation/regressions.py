"""What an update broke: flips between an old and a new model on the same examples.

    negative flip   old right, new wrong        positive flip   old wrong, new right
    Rates are over all examples, and negative also over those that the old model had right. For graded scores (higher
    is better) the loss of the ones that got worse, mean max(0, old - new), takes their place.

A better average can hide many negative flips, and users notice those (MUSCLE, Echterhoff et al., 2407.09435, EMNLP
Findings 2024; Yan et al., 2011.09161).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class PredictionFlips:
    """Counts of the 2 x 2 table, and how many examples are wrong in both but answered differently (None: not known)."""

    both_right: int
    negative: int
    positive: int
    both_wrong: int
    changed_wrong: int | None = None

    @property
    def examples(self) -> int:
        return self.both_right + self.negative + self.positive + self.both_wrong

    @property
    def negative_rate(self) -> float:
        """Share of all examples; NaN without any."""
        return self.negative / self.examples if self.examples else float("nan")

    @property
    def positive_rate(self) -> float:
        return self.positive / self.examples if self.examples else float("nan")

    @property
    def broken_share(self) -> float:
        """Share of what the old model had right that the new one has wrong; NaN if it had nothing right."""
        right = self.both_right + self.negative
        return self.negative / right if right else float("nan")


def flips(
    old_right_N: Sequence[bool] | np.ndarray,
    new_right_N: Sequence[bool] | np.ndarray,
    old_answers: Sequence[str] | None = None,
    new_answers: Sequence[str] | None = None,
) -> PredictionFlips:
    """Compare two models example by example. Answers, if given for both, show what changed without getting right."""
    old, new = np.asarray(old_right_N, dtype=bool), np.asarray(new_right_N, dtype=bool)
    if old.shape != new.shape or old.ndim != 1:
        raise ValueError(f"old and new must be lists of equal length, are {old.shape} and {new.shape}")
    changed = None
    if old_answers is not None and new_answers is not None:
        if not len(old_answers) == len(new_answers) == len(old):
            raise ValueError(f"{len(old_answers)} and {len(new_answers)} answers for {len(old)} examples")
        differs = np.array([a != b for a, b in zip(old_answers, new_answers, strict=True)], dtype=bool)
        changed = int((differs & ~old & ~new).sum())
    return PredictionFlips(
        both_right=int((old & new).sum()),
        negative=int((old & ~new).sum()),
        positive=int((~old & new).sum()),
        both_wrong=int((~old & ~new).sum()),
        changed_wrong=changed,
    )


def graded_regression(old_N: Sequence[float] | np.ndarray, new_N: Sequence[float] | np.ndarray) -> float:
    """mean max(0, old - new) of scores where higher is better."""
    old, new = np.asarray(old_N, dtype=np.float64), np.asarray(new_N, dtype=np.float64)
    if old.shape != new.shape or old.ndim != 1 or not len(old):
        raise ValueError(f"old and new must be lists of equal length above 0, are {old.shape} and {new.shape}")
    return float(np.maximum(0, old - new).mean())
