"""Weights that are the gradient of a function of the current losses: geometric mean and smooth Tchebycheff.

    gls    (prod_k L_k)^(1/K)                              w_k ~ 1 / L_k
    stch   mu log sum_k exp(p_k (L_k - z_k) / mu)          w_k ~ p_k softmax_k(p_k (L_k - z_k) / mu), p_k = 1/K

GLS: Chennupati et al., MultiNet++ (arXiv 1904.08492). STCH: Lin et al., "Smooth Tchebycheff Scalarization for
Multi-Objective Optimization" (ICML 2024, arXiv 2402.19078). Only the direction of the gradient is used.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Annotated, ClassVar

import torch
from pydantic import Field
from torch import Tensor

from mtft.losses.balancers.base import LossWeightedBalancer, fill_missing_weights

SMALLEST_LOSS = 1e-8


@dataclass(eq=False)
class GeometricMean(LossWeightedBalancer):
    """Every task's relative improvement counts the same, whatever the size of its loss."""

    NAME: ClassVar[str] = "gls"

    def balance(self, step: int, step_loss_K: Tensor | None) -> Tensor:
        return fill_missing_weights(1 / self.losses(step_loss_K).clamp(min=SMALLEST_LOSS))


@dataclass(eq=False)
class SmoothTchebycheff(LossWeightedBalancer):
    """The worst task counts most: `mu` -> 0 looks at it alone, large mu is uniform.

    `ideal`: {task: z}, the best loss hoped for; 0 where not given.
    """

    mu: Annotated[float, Field(gt=0)] = 0.5
    ideal: Mapping[str, float] = field(default_factory=dict)
    NAME: ClassVar[str] = "stch"

    def reset(self) -> None:
        super().reset()
        self.ideal_K = self.per_task("ideal", self.ideal, default=0.0)

    def balance(self, step: int, step_loss_K: Tensor | None) -> Tensor:
        gap_K = self.losses(step_loss_K) - self.ideal_K
        known_K = gap_K[gap_K.isfinite()]
        highest = known_K.max() if len(known_K) else 0.0
        return fill_missing_weights(torch.exp((gap_K - highest) / (self.K * self.mu)))
