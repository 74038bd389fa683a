"""DualProj: the mean gradient, projected so that it hurts no task.

    d = proj(sum_k p_k g_k)     proj: onto { d : <g_k, d> >= 0 for all k }
    alpha = argmin { v^T G v : v >= p }                       with G / trace(G) + epsilon I for G

Lopez-Paz & Ranzato, "Gradient Episodic Memory" (arXiv 1706.08840); the name is TorchJD's. Cheaper than UPGrad by a
factor K, and it leaves a task that the mean gradient does not hurt without any gain of its own.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, ClassVar

import numpy as np
from pydantic import Field

from mtft.gradients.aggregators.base import Aggregator
from mtft.gradients.aggregators.dual_cone import at_least
from mtft.gradients.aggregators.upgrad import regularised


@dataclass(eq=False)
class DualProj(Aggregator):
    """`epsilon`: what is added to the diagonal of the Gram matrix of trace 1."""

    epsilon: Annotated[float, Field(gt=0)] = 1e-4
    NAME: ClassVar[str] = "dualproj"

    def solve(self, gram: np.ndarray, p: np.ndarray, step: int) -> np.ndarray:
        return at_least(regularised(gram, self.epsilon), p)
