"""How what rows scored becomes the score of a task: every metric keeps S numbers a row, and an aggregate of N rows.

    token_loss   (nll, tokens)       sum nll / sum tokens         lower is better
    token_share  (hits, tokens)      sum hits / sum tokens        in [0, 1]
    share        (x,)                mean x                       in [0, 1]
    mean         (x,)                mean x                       higher is better
    error        (x,)                mean x                       0 or more, lower is better
    bleu         10 counts           mtft.common.corpus_scores, as all below; in [0, 100], higher is better
    chrf         18 counts           in [0, 100], higher is better; chrf_1 and chrf_2, 21 and 24: with word n-grams
    macro_f1     (label, label)      in [0, 1], higher is better
    spearman     (x, y, given)       in [-1, 1], higher is better
    mae          (x, y, given)       0 or more, lower is better

Because the numbers are kept by row, an interval is a bootstrap over rows for every metric alike, also for those of a
whole corpus (BLEU is no mean of sentence scores). Letters: N rows, S numbers a row, D bootstrap draws.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from mtft.common.corpus_scores import (
    BLEU_ORDER,
    CHRF_ORDER,
    Array,
    Rows,
    absolute_error,
    bleu_of_sums,
    chrf_of_sums,
    drawn_counts,
    macro_f1,
    rank_correlation,
)


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

    def resampled(self, stats_NS: Array, rows_DN: Rows) -> Array:
        """float64 [D]: the score of each resample of the rows."""
        if self.value in _RATIOS:
            sums_DS = stats_NS[rows_DN].sum(axis=1)
            return _RATIOS[self.value](sums_DS, rows_DN.shape[1])
        if self.value in _CORPUS:
            return _CORPUS[self.value](stats_NS, rows_DN)
        return np.array([self.value(stats_NS[rows_N]) for rows_N in rows_DN])

    def weighted(self, stats_NS: Array, count_DN: Array) -> Array:
        """float64 [D]: the score of each resample, given how often it has each row (whole numbers that add up to N)."""
        if self.value in _RATIOS:
            return _RATIOS[self.value](count_DN @ stats_NS, count_DN.sum(axis=1))
        rows_N = np.arange(len(stats_NS))
        return self.resampled(stats_NS, np.stack([np.repeat(rows_N, of_draw) for of_draw in count_DN.astype(np.int64)]))


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


def _sums(stats_NS: Array, rows_DN: Rows) -> Array:
    return drawn_counts(rows_DN, len(stats_NS)) @ stats_NS


def _bleu(stats_NS: Array) -> float:
    return float(bleu_of_sums(stats_NS.sum(axis=0)[None])[0])


def _chrf(stats_NS: Array) -> float:
    return float(chrf_of_sums(stats_NS.sum(axis=0)[None])[0])


def _macro_f1(stats_NS: Array) -> float:
    return float(macro_f1(stats_NS, np.ones((1, len(stats_NS))))[0])


def _mae(stats_NS: Array) -> float:
    return float(absolute_error(stats_NS, np.arange(len(stats_NS))[None])[0])


def _spearman(stats_NS: Array) -> float:
    return float(rank_correlation(stats_NS, np.arange(len(stats_NS))[None])[0])


# Of the rows of all resamples at once, from the statistics of each row.
_CORPUS: dict[Callable[[Array], float], Callable[[Array, Rows], Array]] = {
    _bleu: lambda stats_NS, rows_DN: bleu_of_sums(_sums(stats_NS, rows_DN)),
    _chrf: lambda stats_NS, rows_DN: chrf_of_sums(_sums(stats_NS, rows_DN)),
    _macro_f1: lambda stats_NS, rows_DN: macro_f1(stats_NS, drawn_counts(rows_DN, len(stats_NS))),
    _mae: absolute_error,
    _spearman: rank_correlation,
}

AGGREGATES: dict[str, Aggregate] = {
    aggregate.name: aggregate
    for aggregate in (
        Aggregate("token_loss", 2, _ratio, higher_is_better=False, bounds=(0.0, None)),
        Aggregate("token_share", 2, _ratio, bounds=(0.0, 1.0)),
        Aggregate("share", 1, _mean, bounds=(0.0, 1.0)),
        Aggregate("mean", 1, _mean),
        Aggregate("error", 1, _mean, higher_is_better=False, bounds=(0.0, None)),
        Aggregate("bleu", 2 + 2 * BLEU_ORDER, _bleu, bounds=(0.0, 100.0)),
        Aggregate("chrf", 3 * CHRF_ORDER, _chrf, bounds=(0.0, 100.0)),
        Aggregate("chrf_1", 3 * (CHRF_ORDER + 1), _chrf, bounds=(0.0, 100.0)),
        Aggregate("chrf_2", 3 * (CHRF_ORDER + 2), _chrf, bounds=(0.0, 100.0)),
        Aggregate("macro_f1", 2, _macro_f1, bounds=(0.0, 1.0)),
        Aggregate("spearman", 3, _spearman, bounds=(-1.0, 1.0)),
        Aggregate("mae", 3, _mae, higher_is_better=False, bounds=(0.0, None)),
    )
}
