"""BiMix's mixing law, summed over tasks: every task's data is worth a power of its share.

    y = sum_k A_k (x_k + e)^-a_k,     A_k, a_k, e > 0

BiMix (Ge et al., arXiv 2405.14908) fits the loss on one domain by that domain's own share, A / x^a; here the target
need not be one of the tasks, so every task has its term, and e keeps a share of 0 finite (a term with a_k near 0 is a
constant). Minimises, by L-BFGS with exact gradients from non-negative least squares at three common exponents,

    mean squared error / var(y) + (0.1 sum (log a_k - log 0.2)^2 + 0.01 sum (log A_k - log mean|y| / K)^2) / n
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
from scipy.optimize import nnls

from data_mixers.surrogates.base import Floats
from data_mixers.surrogates.parametric_laws import Law, Objective

USUAL = float(np.log(0.2))  # log of the exponent that the penalty pulls to
EXPONENT, AMOUNT = 0.1, 0.01  # strengths of the two penalties, times n
OFFSET = 3e-3  # start of e
NOTHING = -700.0  # log A of a task that no trial uses: its term is 0


@dataclass
class BiMix(Law):
    """theta = [log e, log A_k, log a_k]."""

    name: ClassVar[str] = "bimix"
    SHARED: ClassVar[int] = 1
    UNUSED: ClassVar[tuple[float, ...]] = (NOTHING, USUAL)

    def _law(self, theta: Floats, X: Floats) -> Floats:
        log_A, log_a = np.split(theta[1:], 2)
        return np.exp(log_A - np.exp(log_a) * np.log(X + np.exp(theta[0]))).sum(axis=1)

    def _objective(self, X: Floats, y: Floats, weight: Floats) -> Objective:
        pull_a, pull_A, level = EXPONENT / len(y), AMOUNT / len(y), np.log(np.abs(y).mean() / X.shape[1])

        def value(theta: Floats) -> tuple[float, Floats]:
            log_A, log_a = np.split(theta[1:], 2)
            a, e = np.exp(log_a), np.exp(theta[0])
            logs = np.log(X + e)
            term = np.exp(np.minimum(log_A - a * logs, 50.0))
            error = term.sum(axis=1) - y
            slope = 2 * weight * error
            off_a, off_A = log_a - USUAL, log_A - level
            gradient = np.r_[
                -slope @ (term / (X + e) @ a) * e,
                slope @ term + 2 * pull_A * off_A,
                -a * (slope @ (term * logs)) + 2 * pull_a * off_a,
            ]
            return float(weight @ error**2 + pull_a * off_a @ off_a + pull_A * off_A @ off_A), gradient

        return value

    def _starts(self, X: Floats, y: Floats) -> list[Floats]:
        starts = []
        for a in (0.05, 0.15, 0.4):
            A, _ = nnls((X + OFFSET) ** -a, y)
            log_A = np.log(np.maximum(A, 1e-4 * np.abs(y).mean() + 1e-12))
            starts.append(np.r_[np.log(OFFSET), log_A, np.full(X.shape[1], np.log(a))])
        return starts

    def _limits(self, size: int) -> list[tuple[float | None, float | None]]:
        tasks = (size - 1) // 2
        return [(-12.0, 0.0), *[(-30.0, 30.0)] * tasks, *[(-7.0, 1.0)] * tasks]
