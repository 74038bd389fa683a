"""FAMO: all tasks improve at about the same relative rate, without task gradients.

    z = softmax(xi);  D_k = L_k - b_k + 1e-8;  w = (z / D) / sum(z / D)
    after the step:  delta = log D(before) - log D(after),  Adam on xi with the gradient (dz/dxi)^T delta

Liu et al., "FAMO: Fast Adaptive Multitask Optimization" (NeurIPS 2023, arXiv 2306.03792). b: lower bounds.
A task that improved more than the others loses weight. Weight decay pulls xi back to uniform z, where w ~ 1/D.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Annotated, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from mtft.losses.balancers.base import BalancerNeeds, Observation, fill_missing_weights, update_moving_average
from mtft.losses.balancers.uncertainty import LearnedBalancer

EPSILON = 1e-8
log = logging.getLogger(__name__)


@dataclass(eq=False)
class Famo(LearnedBalancer):
    """Options.

    after         where the losses after the step come from. reuse: the next step's training losses, averaged by
                  `smoothing` (free, noisy); exact: a second forward on the same batch (the paper); valid: validation
    step_loss     lagged: D from the averaged losses; exact: from the step's own (Needs.step_loss)
    lower_bounds  {task: b}; 0 where not given
    decay         of Adam on xi (paper and torchjd 1e-3; the authors' code differs)
    """

    after: Literal["reuse", "exact", "valid"] = "reuse"
    step_loss: Literal["lagged", "exact"] = "lagged"
    smoothing: Annotated[float, Field(ge=0, lt=1)] = 0.9
    decay: Annotated[float, Field(ge=0)] = 1e-3
    lower_bounds: Mapping[str, float] = field(default_factory=dict)
    valid_every: Annotated[int, Field(ge=1)] = 10
    NAME: ClassVar[str] = "famo"
    STATE: ClassVar[tuple[str, ...]] = (*LearnedBalancer.STATE, "mean_K", "valid_K", "clamped")

    def declare(self) -> BalancerNeeds:
        return BalancerNeeds(
            step_loss=self.step_loss == "exact",
            valid_every=self.valid_every if self.after == "valid" else None,
            after_step=self.after == "exact",
        )

    def reset(self) -> None:
        super().reset()
        self.bound_K = self.per_task("lower_bounds", self.lower_bounds, default=0.0)
        self.mean_K = torch.full((self.K,), torch.nan, dtype=torch.float64)
        self.valid_K = self.mean_K.clone()  # the last validation loss of each task
        self.clamped = torch.zeros((), dtype=torch.int64)  # losses seen at or below their bound

    def balance(self, step: int, step_loss_K: Tensor | None) -> Tensor:
        loss_K = self.mean_K if step_loss_K is None else torch.where(step_loss_K.isnan(), self.mean_K, step_loss_K)
        return fill_missing_weights(torch.softmax(self.value_K, dim=0) / self._distance(loss_K))

    def observe(self, observation: Observation) -> None:
        mean_K = update_moving_average(self.mean_K, observation.train_loss_K, self.smoothing)
        if self.after == "exact" and observation.after_loss_K is not None:
            self._learn(observation.train_loss_K, observation.after_loss_K)
        elif self.after == "reuse":
            self._learn(self.mean_K, mean_K)
        elif self.after == "valid" and observation.valid_loss_K is not None:
            self._learn(self.valid_K, observation.valid_loss_K)
            self.valid_K = torch.where(observation.valid_loss_K.isnan(), self.valid_K, observation.valid_loss_K)
        self.mean_K = mean_K

    def _learn(self, before_K: Tensor, after_K: Tensor) -> None:
        if not (before_K.isfinite() & after_K.isfinite()).any():
            return
        gain_K = (self._distance(before_K).log() - self._distance(after_K).log()).nan_to_num(nan=0.0)
        z_K = torch.softmax(self.value_K, dim=0)
        self.descend(z_K * (gain_K - (z_K * gain_K).sum()), decay=self.decay)  # (dz/dxi)^T gain

    def _distance(self, loss_K: Tensor) -> Tensor:
        distance_K = loss_K - self.bound_K + EPSILON
        low_K = distance_K <= 0
        if low_K.any():
            if not self.clamped:
                names = ", ".join(self.run.tasks[k] for k in low_K.nonzero().flatten().tolist())
                log.warning("FAMO: the loss of %s is at its lower bound; lower lower_bounds", names)
            self.clamped = self.clamped + low_K.sum()
        return distance_K.clamp(min=EPSILON)
