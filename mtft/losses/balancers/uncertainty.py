"""Weights that are parameters themselves, moved by their own Adam: uncertainty weighting and IMTL-L.

    uw       minimise sum_k e^-s_k L_k / 2 + s_k / 2      w_k ~ e^-s_k      Kendall, Gal & Cipolla (arXiv 1705.07115)
    imtl_l   minimise sum_k e^s_k L_k - s_k               w_k ~ e^s_k       Liu et al., IMTL (ICLR 2021), the loss part

Both come to rest at w_k ~ 1/L_k; they differ in how they get there. Only the direction of w is used, not
its length, which in the papers also scales the learning rate. The papers move s with the model's optimizer.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, ClassVar

import torch
from pydantic import Field
from torch import Tensor

from mtft.losses.balancers.base import Balancer, Observation

BETA1, BETA2, EPSILON = 0.9, 0.999, 1e-8  # Adam's own defaults


@dataclass(eq=False)
class LearnedBalancer(Balancer):
    """Base of the methods that learn one number a task. `learning_rate`: of their own Adam."""

    learning_rate: Annotated[float, Field(gt=0)] = 0.025
    STATE: ClassVar[tuple[str, ...]] = ("value_K", "first_K", "second_K", "moves")

    def reset(self) -> None:
        self.value_K = torch.zeros(self.K, dtype=torch.float64)
        self.first_K = torch.zeros_like(self.value_K)
        self.second_K = torch.zeros_like(self.value_K)
        self.moves = torch.zeros((), dtype=torch.int64)

    def descend(self, gradient_K: Tensor, decay: float = 0.0) -> None:
        """One step of Adam in float64 (`decay` = its L2 term). Where the gradient is NaN, number and moments stay."""
        active_K = gradient_K.isfinite()
        if not active_K.any():
            return
        self.moves = self.moves + 1
        gradient_K = gradient_K + decay * self.value_K
        first_K = BETA1 * self.first_K + (1 - BETA1) * gradient_K
        second_K = BETA2 * self.second_K + (1 - BETA2) * gradient_K**2
        unbiased_K = first_K / (1 - BETA1 ** int(self.moves))
        scale_K = (second_K / (1 - BETA2 ** int(self.moves))).sqrt() + EPSILON
        self.value_K = torch.where(active_K, self.value_K - self.learning_rate * unbiased_K / scale_K, self.value_K)
        self.first_K = torch.where(active_K, first_K, self.first_K)
        self.second_K = torch.where(active_K, second_K, self.second_K)


@dataclass(eq=False)
class UncertaintyWeighting(LearnedBalancer):
    """s_k = log variance of task k's noise, from 0."""

    NAME: ClassVar[str] = "uw"

    def balance(self, step: int, step_loss_K: Tensor | None) -> Tensor:
        return torch.exp(-self.value_K)

    def observe(self, observation: Observation) -> None:
        self.descend(uw_gradient(self.value_K, observation.train_loss_K))


@dataclass(eq=False)
class ImpartialLoss(LearnedBalancer):
    """s_k so that all scaled losses e^s_k L_k come to be equal, from 0."""

    NAME: ClassVar[str] = "imtl_l"

    def balance(self, step: int, step_loss_K: Tensor | None) -> Tensor:
        return torch.exp(self.value_K)

    def observe(self, observation: Observation) -> None:
        self.descend(imtl_l_gradient(self.value_K, observation.train_loss_K))


def uw_gradient(s_K: Tensor, loss_K: Tensor) -> Tensor:
    """d/ds of sum_k e^-s_k L_k / 2 + s_k / 2."""
    return (1 - torch.exp(-s_K) * loss_K) / 2


def imtl_l_gradient(s_K: Tensor, loss_K: Tensor) -> Tensor:
    """d/ds of sum_k e^s_k L_k - s_k."""
    return torch.exp(s_K) * loss_K - 1
