"""PCGrad: from each gradient take away what points against another task's, one task after the other; then sum.

    for each i, for the others j in random order:  if <g_i', g_j> < 0:  g_i' -= <g_i', g_j> / |g_j|^2 g_j;  d = sum g_i'

Yu et al., "Gradient Surgery for Multi-Task Learning" (arXiv 2001.06782). The order comes from a generator seeded by
(seed, step), so all ranks and a resumed run agree; for two tasks there is only one. d is a sum: K times the mean where
nothing conflicts. p multiplies the losses: g_k becomes K p_k g_k.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from mtft.gradients.aggregators.base import Aggregator


@dataclass(eq=False)
class PCGrad(Aggregator):
    """No options."""

    NAME: ClassVar[str] = "pcgrad"

    def solve(self, gram: np.ndarray, p: np.ndarray, step: int) -> np.ndarray:
        scale, rng = len(p) * p, np.random.default_rng([self.draw_seed, step])
        total, square = np.zeros(len(p)), np.diag(gram)
        for i in range(len(p)):
            mix = np.zeros(len(p))  # g_i' = sum_k mix_k g_k
            mix[i] = scale[i]
            for j in rng.permutation(len(p)):
                against = gram[j] @ mix
                if j != i and against < 0 and square[j] > 0:
                    mix[j] -= against / square[j]
            total += mix
        return total
