"""MFTCoder's self-paced weights: read off the slopes of the validation losses.

    a_k = OLS slope of task k's validation losses over the last `window` steps
    n = K a / sum |a|;   s = softmax(n) * (-n);   w = softmax(50 s)          uniform until the window is full

Rule of MFTCoder 0.3 and 0.4's code (removed later; no paper gives it). -n e^n peaks at n = -1: tasks of *average* speed
get the most, then fast ones; stalled and diverging tasks starve. Not monotone in speed; CoBa is its successor.
Differences: a missing loss keeps its place on the time axis, and validation runs every `valid_every` steps, not each.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, ClassVar

import torch
from pydantic import Field
from torch import Tensor

from mtft.losses.balancers.base import Balancer, BalancerNeeds, Observation
from mtft.losses.balancers.ols_slope import slopes

SHARPNESS = 50.0


@dataclass(eq=False)
class SelfPaced(Balancer):
    """`window`: steps that the slopes look back, and before which weights are uniform."""

    window: Annotated[int, Field(ge=2)] = 100
    valid_every: Annotated[int, Field(ge=1)] = 10
    NAME: ClassVar[str] = "self_paced"
    STATE: ClassVar[tuple[str, ...]] = ("steps_N", "loss_NK")

    def declare(self) -> BalancerNeeds:
        return BalancerNeeds(valid_every=self.valid_every)

    def reset(self) -> None:
        self.steps_N = torch.zeros(0, dtype=torch.int64)
        self.loss_NK = torch.zeros(0, self.K, dtype=torch.float64)

    def observe(self, observation: Observation) -> None:
        if observation.valid_loss_K is None or observation.step == 0:
            return
        recent_N = self.steps_N > observation.step - self.window
        self.steps_N = torch.cat([self.steps_N[recent_N], torch.tensor([observation.step])])
        self.loss_NK = torch.cat([self.loss_NK[recent_N], observation.valid_loss_K[None]])

    def balance(self, step: int, step_loss_K: Tensor | None) -> Tensor:
        uniform_K = torch.ones(self.K, dtype=torch.float64)
        return pace(slopes(self.steps_N, self.loss_NK)) if step > self.window else uniform_K


def pace(slope_K: Tensor) -> Tensor:
    """Weights (sum 1) of the slopes; uniform if all are 0."""
    total = slope_K.abs().sum()
    n_K = len(slope_K) * slope_K / total if total > 0 else torch.zeros_like(slope_K)
    return torch.softmax(SHARPNESS * torch.softmax(n_K, dim=0) * -n_K, dim=0)
