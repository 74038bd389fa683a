"""SAM-GS, its first branch: gradients of unlike lengths are made equally long before they are averaged.

    psi_ij = 2 n_i n_j / (n_i^2 + n_j^2),  n_k = |g_k|;  Psi = mean of psi over all K^2 pairs
    Psi < gamma:  alpha_k = p_k mean(n) / n_k            else:  alpha = p

Borsani, Rosani, Nicosia & Di Fatta, "Gradient Similarity Surgery in Multi-Task Deep Learning" (arXiv 2506.06130). Where
lengths are alike (Psi >= gamma) the paper modulates the momentum of each task coordinate by coordinate; its printed
formula is ambiguous and needs two more buffers a task, so here that branch is the plain mean. As psi_ii = 1, Psi is
never below 1/K: the paper's gamma of 0.1 would never equalise fewer than ten tasks, hence our default of 1 (always).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, ClassVar

import numpy as np
from pydantic import Field

from .base import Aggregator, lengths


@dataclass(eq=False)
class SamGs(Aggregator):
    """`gamma`: lengths that are more alike than this are left as they are."""

    gamma: Annotated[float, Field(gt=0, le=1)] = 1.0
    NAME: ClassVar[str] = "sam_gs"

    def solve(self, gram: np.ndarray, p: np.ndarray, step: int) -> np.ndarray:
        length = lengths(gram)
        if similarity(length) >= self.gamma:
            return p
        moved = length > 0
        return np.where(moved, p * length[moved].mean() / np.where(moved, length, 1), p)


def similarity(length: np.ndarray) -> float:
    """Psi; two zero gradients are alike."""
    n = length / length.max()
    above, below = 2 * np.outer(n, n), np.add.outer(n**2, n**2)
    return float(np.where(below > 0, above / np.where(below > 0, below, 1), 1).mean())
