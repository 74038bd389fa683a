"""IMTL-G: the direction whose projections onto all (normalised) gradients are equal.

    <d, g_k / |g_k|> the same for all k,  sum alpha = 1          alpha ~ G^+ n,  n_k = |g_k|

Liu et al., "Towards Impartial Multi-task Learning" (ICLR 2021), the gradient part. alpha can be negative: a lagged
balancer clamps those. With a preference the projections are proportional to p.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from mtft.gradients.aggregators.base import Aggregator, cosines


@dataclass(eq=False)
class ImtlG(Aggregator):
    """No options."""

    NAME: ClassVar[str] = "imtl_g"

    def solve(self, gram: np.ndarray, p: np.ndarray, step: int) -> np.ndarray:
        cosine, length = cosines(gram / np.diag(gram).max())
        # With y_k = |g_k| alpha_k the condition is C y ~ p; the pseudo-inverse drops what is linearly dependent.
        y = np.linalg.pinv(cosine, rcond=1e-12, hermitian=True) @ p
        alpha = np.where(length > 0, y / np.where(length > 0, length, 1), 0)
        total = alpha.sum()
        return alpha / total if abs(total) > 1e-12 * np.abs(alpha).sum() else np.zeros(len(p))
