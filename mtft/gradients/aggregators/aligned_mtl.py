"""Aligned-MTL: the nearest set of orthogonal gradients of equal length is averaged instead.

    G = V diag(l) V^T (zero eigenvalues dropped);   alpha = sqrt(s) V diag(l)^-1/2 V^T p
    s = min l (default), median l, or mean l (`rmse`)

Senushkin et al., "Independent Component Alignment for Multi-Task Learning" (CVPR 2023, arXiv 2305.19000). `min` keeps
the step as short as the weakest common direction, which is what their convergence proof needs.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import numpy as np

from mtft.gradients.aggregators.base import Aggregator


@dataclass(eq=False)
class AlignedMtl(Aggregator):
    """`scale`: which eigenvalue sets the length."""

    scale: Literal["min", "median", "rmse"] = "min"
    NAME: ClassVar[str] = "aligned_mtl"

    def solve(self, gram: np.ndarray, p: np.ndarray, step: int) -> np.ndarray:
        value, vector = np.linalg.eigh(gram)
        positive = value > value.max() * len(p) * np.finfo(float).eps
        value, vector = value[positive], vector[:, positive]
        # The lower one of two medians, as torch has it.
        scale = {"min": value[0], "median": value[(len(value) - 1) // 2], "rmse": value.mean()}[self.scale]
        return np.sqrt(scale) * vector @ (vector.T @ p / np.sqrt(value))
