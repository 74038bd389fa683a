"""UPGrad: each gradient is projected so that it hurts no task, then the projections are summed.

    d = sum_i p_i proj(g_i)     proj: onto { d : <g_k, d> >= 0 for all k }
    alpha = sum_i argmin { v^T G v : v >= p_i e_i }            with G / trace(G) + epsilon I for G

Quinton & Rey, "Jacobian Descent for Multi-Objective Optimization" (arXiv 2406.16232). No task's loss goes up (to first
order), tasks without conflict are simply averaged, and a longer gradient counts for more. epsilon is TorchJD's; it
protects tasks whose gradient is below 1 % of the longest one less. Linear in p.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, ClassVar

import numpy as np
from pydantic import Field

from mtft.gradients.aggregators.base import Aggregator
from mtft.gradients.aggregators.dual_cone import at_least


@dataclass(eq=False)
class UPGrad(Aggregator):
    """`epsilon`: what is added to the diagonal of the Gram matrix of trace 1."""

    epsilon: Annotated[float, Field(gt=0)] = 1e-4
    NAME: ClassVar[str] = "upgrad"

    def solve(self, gram: np.ndarray, p: np.ndarray, step: int) -> np.ndarray:
        regular = regularised(gram, self.epsilon)
        return sum((at_least(regular, floor) for floor in np.diag(p)), start=np.zeros(len(p)))


def regularised(gram: np.ndarray, epsilon: float) -> np.ndarray:
    """G / trace(G) + epsilon I."""
    return gram / np.trace(gram) + epsilon * np.eye(len(gram))
