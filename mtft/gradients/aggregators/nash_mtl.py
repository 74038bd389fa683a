"""Nash-MTL: the bargaining solution, in which every task gains the same share of what it could.

    alpha > 0 with  (G alpha)_k alpha_k = K p_k         d = J^T alpha maximises sum_k p_k log <g_k, d> on a ball

Navon et al., "Multi-Task Learning as a Bargaining Game" (arXiv 2202.01017). The authors approximate by a sequence of
convex programs that starts from the last step's answer; here it is the minimum of the strictly convex
1/2 a^T G a - K sum_k p_k log a_k, found by Newton's method: no solver, and nothing to remember between steps. Scaling a
task's loss changes nothing. |d| = sqrt(K) whatever the gradients (the paper clips it to 1; train.max_grad_norm does).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from mtft.gradients.aggregators.base import Aggregator, cosines

EPSILON = 1e-9  # on the diagonal of the cosines: without it alpha is infinite where no direction improves all tasks


@dataclass(eq=False)
class NashMtl(Aggregator):
    """No options."""

    NAME: ClassVar[str] = "nash_mtl"

    def solve(self, gram: np.ndarray, p: np.ndarray, step: int) -> np.ndarray:
        cosine, length = cosines(gram)
        moved = length > 0  # a task without a gradient has nothing to bargain for
        y = bargain(cosine[np.ix_(moved, moved)] + EPSILON * np.eye(int(moved.sum())), len(p) * p[moved])
        alpha = np.zeros(len(p))
        alpha[moved] = y / length[moved]
        return alpha


def bargain(cosine: np.ndarray, q: np.ndarray, most: int = 200) -> np.ndarray:
    """y > 0 with (C y) y = q, for a positive definite C, by Newton's method with a line search."""
    y = np.sqrt(q)

    def value(at: np.ndarray) -> float:
        return float(at @ cosine @ at / 2 - q @ np.log(at))

    for _ in range(most):
        slope = cosine @ y - q / y
        change = np.linalg.solve(cosine + np.diag(q / y**2), slope)
        decrement = slope @ change
        if decrement < 1e-26 * q.sum():
            break
        down = change > 0
        length = min(1.0, 0.95 / np.max(change[down] / y[down])) if down.any() else 1.0
        while value(y - length * change) > value(y) - 0.25 * length * decrement and length > 1e-3:
            length /= 2
        y = y - length * change
    return y
