"""CAGrad: the direction near the mean gradient that is best for the task it helps least.

    g0 = sum_k p_k g_k;  maximise over d   min_k <g_k, d>   subject to |d - g0| <= c |g0|
    d = g0 + c |g0| / |g_w| g_w,  w = argmin { w^T G p + c |g0| sqrt(w^T G w) : w >= 0, sum w = 1 }

Liu et al., "Conflict-Averse Gradient Descent" (arXiv 2110.14048); the authors' code divides d by 1 + c^2, ours and
TorchJD's do not. c = 0 is the mean; for c >= 1 no task gets worse. Solved exactly: the shortest d - g0 that gives every
task at least m is a least-distance problem, its length grows with m, and m is found where the length is c |g0|.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, ClassVar

import numpy as np
from pydantic import Field

from mtft.gradients.aggregators.base import Aggregator, even_out, lengths, root
from mtft.gradients.aggregators.dual_cone import shortest

HALVINGS = 60  # of the interval of m: down to its rounding


@dataclass(eq=False)
class CAGrad(Aggregator):
    """`c`: how far d may be from the mean gradient, in lengths of the mean gradient."""

    c: Annotated[float, Field(ge=0)] = 0.5
    NAME: ClassVar[str] = "cagrad"

    def solve(self, gram: np.ndarray, p: np.ndarray, step: int) -> np.ndarray:
        gram = gram / np.diag(gram).max()
        columns, gain = root(gram), gram @ p  # gain: what the mean gradient gives each task
        radius = self.c * np.sqrt(max(p @ gram @ p, 0))
        low, high = gain.min(), (gain + radius * lengths(gram)).min()
        best = np.zeros(len(p))
        for _ in range(HALVINGS):
            middle = (low + high) / 2
            _, x = shortest(columns, middle - gain)
            if x is not None and np.linalg.norm(columns @ x) <= radius:
                low, best = middle, x
            else:
                high = middle
        return p + even_out(gram, best)
