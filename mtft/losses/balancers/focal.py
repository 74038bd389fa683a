"""Focal weights: a task that the model is sure of already counts less.

    w_k = (1 - p_k)^gamma      p_k = mean over samples of the mean token probability exp(-nll)

The task level of the focal loss that the MFTCoder paper describes (arXiv 2311.02303; its code has no working one; after
Lin et al., RetinaNet, arXiv 1708.02002). Open in the paper: averaging p before or after the power (here: before), and
whether gradient flows through the factor (here: no). The sample level is in losses/sample_weights.py: it changes the
loss of
single samples and goes with any balancer.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, ClassVar

import torch
from pydantic import Field
from torch import Tensor

from mtft.losses.balancers.base import Balancer, BalancerNeeds, Observation, fill_missing_weights, update_moving_average


@dataclass(eq=False)
class Focal(Balancer):
    """p_k is a running mean over earlier steps (`smoothing`: share of the old mean kept), which costs nothing."""

    gamma: Annotated[float, Field(ge=0)] = 2.0
    smoothing: Annotated[float, Field(ge=0, lt=1)] = 0.9
    NAME: ClassVar[str] = "focal"
    STATE: ClassVar[tuple[str, ...]] = ("prob_K",)

    def declare(self) -> BalancerNeeds:
        return BalancerNeeds(token_probs=True)

    def reset(self) -> None:
        self.prob_K = torch.full((self.K,), torch.nan, dtype=torch.float64)

    def balance(self, step: int, step_loss_K: Tensor | None) -> Tensor:
        # The floor: every task certain (p = 1) must not leave all weights 0.
        return fill_missing_weights((1 - self.prob_K).clamp(min=1e-6) ** self.gamma)

    def observe(self, observation: Observation) -> None:
        if observation.step == 0:
            return
        if observation.train_prob_K is None:
            raise ValueError("balancer focal needs Observation.train_prob_K")
        self.prob_K = update_moving_average(self.prob_K, observation.train_prob_K, self.smoothing)
