"""How what rows scored becomes the score of a task: every metric keeps S numbers a row, and an aggregate of N rows.

    token_loss   (nll, tokens)       sum nll / sum tokens         lower is better
    token_share  (hits, tokens)      sum hits / sum tokens        in [0, 1]
    share        (x,)                mean x                       in [0, 1]
    mean         (x,)                mean x                       higher is better
    error        (x,)                mean x                       0 or more, lower is better

Because the numbers are kept by row, an interval is a bootstrap over rows for every metric alike, also for those of a
whole corpus (BLEU is no mean of sentence scores). Letters: N rows, S numbers a row, D bootstrap draws.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]


@dataclass(frozen=True)
class Aggregate:
    """One way from rows to a score.

    width   S
    value   statistics [N, S], N > 0, to the score; NaN where it is not defined
    bounds  (lowest, highest) score that there can be; None: no bound on that side
    """

    name: str
    width: int
    value: Callable[[Array], float]
    higher_is_better: bool = True
    bounds: tuple[float | None, float | None] = (None, None)

    def resampled(self, stats_NS: Array, rows_DN: NDArray[np.int64]) -> Array:
        """float64 [D]: the score of each resample of the rows."""
        if self.value in _RATIOS:
            sums_DS = stats_NS[rows_DN].sum(axis=1)
            return _RATIOS[self.value](sums_DS, rows_DN.shape[1])
        return np.array([self.value(stats_NS[rows_N]) for rows_N in rows_DN])


def _mean(stats_NS: Array) -> float:
    return float(stats_NS[:, 0].mean())


def _ratio(stats_NS: Array) -> float:
    over, under = stats_NS.sum(axis=0).tolist()
    return over / under if under else float("nan")


# Of sums [D, S] over N rows: thousands of draws at once.
_RATIOS: dict[Callable[[Array], float], Callable[[Array, int], Array]] = {
    _mean: lambda sums_DS, n: sums_DS[:, 0] / n,
    _ratio: lambda sums_DS, n: sums_DS[:, 0] / np.maximum(sums_DS[:, 1], 1),
}

AGGREGATES: dict[str, Aggregate] = {
    aggregate.name: aggregate
    for aggregate in (
        Aggregate("token_loss", 2, _ratio, higher_is_better=False, bounds=(0.0, None)),
        Aggregate("token_share", 2, _ratio, bounds=(0.0, 1.0)),
        Aggregate("share", 1, _mean, bounds=(0.0, 1.0)),
        Aggregate("mean", 1, _mean),
        Aggregate("error", 1, _mean, higher_is_better=False, bounds=(0.0, None)),
    )
}
