"""The mixing law of supervised fine-tuning: data of other tasks counts as so much data of one's own.

    y = c + A (e0 + sum_k s_k x_k^a_k)^-b,     A, e0, s_k, a_k, b > 0

Effective data transferred: N_i + sum_j k_j N_j^a_j examples (arXiv 2508.11953 for mixtures in fine-tuning; the form
goes back to Hernandez et al., arXiv 2102.01293). There the target is one of the tasks, whose own factor and exponent
are 1; here it need not be, so every task has both. With all a_k = 1 it is the power law (laws.py). Minimises, from that
law's three starts and by L-BFGS with exact gradients,

    mean squared error / var(y) + (0.03 sum (log s_k + 3)^2 + 0.3 sum (log a_k - log 0.4)^2) / n

Other surrogates are handed a root or a log of the shares; here each task's exponent says how fast more of it stops to
help. Penalties chosen by cross-validation on training trials; within a factor of 3 they change little.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from data_mixers.surrogates.base import Floats
from data_mixers.surrogates.parametric_laws import Law, Objective, PowerLaw

AMOUNT, EXPONENT = 0.03, 0.3  # strengths of the two penalties, times n
USUAL = float(np.log(0.4))  # log of the exponent that the penalty pulls to


@dataclass
class TransferLaw(Law):
    """theta = [c, log A, log b, log e0, log s_k, log a_k]."""

    name: ClassVar[str] = "transfer"
    SHARED: ClassVar[int] = 4
    UNUSED: ClassVar[tuple[float, ...]] = (-3.0, USUAL)

    def _law(self, theta: Floats, X: Floats) -> Floats:
        log_s, log_a = np.split(theta[4:], 2)
        base = np.exp(theta[3]) + X ** np.exp(log_a) @ np.exp(log_s)
        return theta[0] + np.exp(theta[1] - np.exp(theta[2]) * np.log(base))

    def _objective(self, X: Floats, y: Floats, weight: Floats) -> Objective:
        logs_x, pull_s, pull_a = np.log(np.maximum(X, 1e-300)), AMOUNT / len(y), EXPONENT / len(y)

        def value(theta: Floats) -> tuple[float, Floats]:
            b, e0 = np.exp(theta[2]), np.exp(theta[3])
            log_s, log_a = np.split(theta[4:], 2)
            s, a = np.exp(log_s), np.exp(log_a)
            amount = np.where(X > 0, np.exp(a * logs_x), 0.0)
            base = e0 + amount @ s
            logs = np.log(base)
            term = np.exp(np.minimum(theta[1] - b * logs, 50.0))
            error = theta[0] + term - y
            slope = 2 * weight * error
            by_term = slope * term
            by_base = -b * by_term / base
            off_s, off_a = log_s + 3, log_a - USUAL
            gradient = np.r_[
                slope.sum(),
                by_term.sum(),
                -b * (by_term @ logs),
                by_base.sum() * e0,
                (by_base @ amount) * s + 2 * pull_s * off_s,
                (by_base @ (amount * logs_x)) * s * a + 2 * pull_a * off_a,
            ]
            return float(weight @ error**2 + pull_s * off_s @ off_s + pull_a * off_a @ off_a), gradient

        return value

    def _starts(self, X: Floats, y: Floats) -> list[Floats]:
        return [np.r_[start, np.full(X.shape[1], USUAL)] for start in PowerLaw()._starts(X, y)]

    def _limits(self, size: int) -> list[tuple[float | None, float | None]]:
        tasks = (size - 4) // 2
        # b <= 1 and e0 >= 0.02: else one outlier makes a pole beside the trials (DaMo's table, mixtures left out)
        return [(None, None), (-30.0, 30.0), (-5.0, 0.0), (-4.0, 6.0), *[(-12.0, 6.0)] * tasks, *[(-3.0, 1.0)] * tasks]
