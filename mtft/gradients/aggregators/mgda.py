"""MGDA: the shortest vector between the gradients; it goes down for every task at the same rate.

    alpha = argmin { a^T G a : a >= 0, sum a = 1 }            d = 0 exactly where no direction improves all tasks

Désidéri 2012; Sener & Koltun, "Multi-Task Learning as Multi-Objective Optimization" (arXiv 1810.04650), who approximate
by Frank-Wolfe (error 6e-4 after 100 steps on three tasks); ours is exact. The task with the shortest gradient gets
the most weight, so one task that is nearly done can stop the others. p multiplies the losses: g_k becomes K p_k g_k.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from mtft.gradients.aggregators.base import Aggregator, even_out, root
from mtft.gradients.aggregators.dual_cone import shortest


@dataclass(eq=False)
class Mgda(Aggregator):
    """No options."""

    NAME: ClassVar[str] = "mgda"

    def solve(self, gram: np.ndarray, p: np.ndarray, step: int) -> np.ndarray:
        scale = len(p) * p
        scaled = gram * np.outer(scale, scale)
        # The shortest z with <g_k, z> >= 1 for all k points along the answer; its multipliers do so too.
        u, _ = shortest(root(scaled / np.diag(scaled).max()), np.ones(len(p)))
        return scale * even_out(scaled, u / u.sum())
