"""Scores of a whole corpus from the sums, ranks or labels of its rows: what no mean of rows gives.

Letters: D resamples of N rows, S numbers a row, C labels. Every function also takes one sample as D = 1.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]
Rows = NDArray[np.int64]

BLEU_ORDER, CHRF_ORDER, CHRF_BETA = 4, 6, 2.0


def drawn_counts(rows_DN: Rows, rows: int) -> Array:
    """How often each of `rows` rows is in each resample [D, rows]: counts @ stats are the sums of every resample."""
    draws = len(rows_DN)
    flat = (rows_DN + np.arange(draws)[:, None] * rows).ravel()
    return np.bincount(flat, minlength=draws * rows).reshape(draws, rows).astype(np.float64)


def bleu_of_sums(sums_DS: Array) -> Array:
    """BLEU in [0, 100] (Papineni et al. 2002) with sacrebleu's exponential smoothing; float64 [D].

    sums_DS  tokens of answers, of references; for n = 1..4 the n-grams that both have; for n = 1..4 those of answers

        100 * min(1, exp(1 - references / answers)) * prod_n p_n^(1/4)
        p_n = both_n / answers_n; the k-th n with none in both: 1 / (2^k * answers_n)
    """
    ours, theirs = sums_DS[:, 0], sums_DS[:, 1]
    both, total = sums_DS[:, 2 : 2 + BLEU_ORDER], sums_DS[:, 2 + BLEU_ORDER :]
    halvings = np.cumsum(both == 0, axis=1)
    over = np.where(both > 0, both, 0.5**halvings)
    logs = np.log(over / np.maximum(total, 1)).mean(axis=1)
    brevity = np.minimum(0.0, 1 - theirs / np.maximum(ours, 1))
    defined = (both > 0).any(axis=1) & (total > 0).all(axis=1)
    return np.where(defined, 100 * np.exp(brevity + logs), 0.0)


def chrf_of_sums(sums_DS: Array) -> Array:
    """chrF in [0, 100] (Popović 2015; with word n-grams chrF++, 2017) as sacrebleu has it; float64 [D].

    sums_DS  for each kind of n-gram: of answers, of references, in both

        100 * (1 + 2^2) P R / (2^2 P + R); P and R: means of precision and recall over kinds that both sides have
    """
    ours, theirs, both = (sums_DS[:, place::3] for place in range(3))
    used = (ours > 0) & (theirs > 0)
    kinds = np.maximum(used.sum(axis=1), 1)
    precision = np.where(used, both / np.maximum(ours, 1), 0).sum(axis=1) / kinds
    recall = np.where(used, both / np.maximum(theirs, 1), 0).sum(axis=1) / kinds
    factor = CHRF_BETA**2
    under = factor * precision + recall
    return 100 * (1 + factor) * precision * recall / np.where(under > 0, under, 1)


def macro_f1(labels_N2: Array, counts_DN: Array) -> Array:
    """Mean over labels of F1 = 2 hits / (references + answers), in [0, 1]; float64 [D].

    labels_N2  number of the label of each row's reference, and of its answer
    Only labels that a resample has, as reference or as answer, count in its mean (scikit-learn's default).
    """
    known = np.unique(labels_N2)
    truth_NC, guess_NC = (labels_N2[:, [side]] == known for side in range(2))
    truth_DC, guess_DC, hits_DC = (counts_DN @ side.astype(float) for side in (truth_NC, guess_NC, truth_NC & guess_NC))
    size_DC = truth_DC + guess_DC
    f1_DC = 2 * hits_DC / np.maximum(size_DC, 1)
    return f1_DC.sum(axis=1) / np.maximum((size_DC > 0).sum(axis=1), 1)


def absolute_error(numbers_N3: Array, rows_DN: Rows) -> Array:
    """Mean of |answer - reference|; float64 [D].

    numbers_N3  number of the answer, of the reference, and 1, or 0 if there is no number in the answer: it then counts
                as the mean of the resample's references, which is what one says who knows nothing of the row
    """
    answer_DN, reference_DN = _with_means(numbers_N3, rows_DN)
    return np.abs(answer_DN - reference_DN).mean(axis=1)


def rank_correlation(numbers_N3: Array, rows_DN: Rows) -> Array:
    """Spearman's rho: Pearson's correlation of the ranks, ties with their mean rank; in [-1, 1], float64 [D].

    numbers_N3  as of `absolute_error`. 0 where all answers, or all references, are equal: nothing is told of the order.
    """
    answer_DN, reference_DN = _with_means(numbers_N3, rows_DN)
    return np.array([_spearman(*pair) for pair in zip(answer_DN, reference_DN, strict=True)])


def _with_means(numbers_N3: Array, rows_DN: Rows) -> tuple[Array, Array]:
    answer_DN, reference_DN, given_DN = (numbers_N3[:, place][rows_DN] for place in range(3))
    return np.where(given_DN > 0, answer_DN, reference_DN.mean(axis=1, keepdims=True)), reference_DN


def _spearman(a_N: Array, b_N: Array) -> float:
    a, b = _ranks(a_N), _ranks(b_N)
    a, b = a - a.mean(), b - b.mean()
    under = np.sqrt((a @ a) * (b @ b))
    return float(np.clip(a @ b / under, -1, 1)) if under else 0.0


def _ranks(values_N: Array) -> Array:
    _, place_N, count = np.unique(values_N, return_inverse=True, return_counts=True)
    return (np.cumsum(count) - (count - 1) / 2)[place_N]
