"""Gradient surgery as task weights, for every engine: measure now and then, weigh in between.

    every `gram_every` steps   G = EMA of the Gram matrix of the task gradients;  alpha = A(G, p)
    every step                 w_k ~ max(alpha_k / (p_k m), 1e-3),  m = mean of max(alpha_k / p_k, 0)

A is any aggregator of mtft.gradients.aggregators; p_k = user weight x the task's part of the objective at equal weights
(1/K in the task modes, its part of the tokens or samples in the others), so that the gradient of the weighted loss,
sum_k w_k p_k g_k, points along J^T alpha at the measuring point. Its length is not kept, and where alpha is negative
(imtl_g, aligned_mtl) the direction isn't either: such clamps are counted. Ours; exact gradient surgery at every step
is `loss.gradients.aggregator`, at the price of all task gradients at every step.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Annotated, ClassVar

import torch
from pydantic import Field
from torch import Tensor

from mtft.gradients.aggregators import make_aggregator
from mtft.losses.balancers.base import Balancer, BalancerNeeds, Observation, fill_missing_weights, update_moving_average

FLOOR = 1e-3  # of the mean weight: a task that gets none is not seen by the next measurement either


@dataclass(eq=False)
class LaggedAggregation(Balancer):
    """`aggregator` with its `options`; `gram_every` steps between measures; `smoothing`: share of the old mean kept."""

    aggregator: str = "upgrad"
    options: Mapping[str, float | str] = field(default_factory=dict)
    gram_every: Annotated[int, Field(ge=1)] = 20
    smoothing: Annotated[float, Field(ge=0, lt=1)] = 0.5
    NAME: ClassVar[str] = "lagged"
    STATE: ClassVar[tuple[str, ...]] = ("gram_KK", "share_K", "current_K", "measures", "clamped")

    def declare(self) -> BalancerNeeds:
        return BalancerNeeds(gram_every=self.gram_every)

    def reset(self) -> None:
        self.method = make_aggregator(self.aggregator, self.options, seed=self.run.seed, where="loss.balancer")
        self.method.check_from_gram("a lagged balancer sees inner products, and these now and then")
        self.gram_KK = torch.full((self.K, self.K), torch.nan, dtype=torch.float64)
        self.share_K = torch.full((self.K,), torch.nan, dtype=torch.float64)
        self.current_K = torch.ones(self.K, dtype=torch.float64)  # w without the user's weights
        self.measures = torch.zeros((), dtype=torch.int64)
        self.clamped = torch.zeros((), dtype=torch.int64)  # weights that were raised to the floor, over all measures

    def balance(self, step: int, step_loss_K: Tensor | None) -> Tensor:
        return self.current_K

    def observe(self, observation: Observation) -> None:
        if observation.gram_KK is None:
            return
        self.measures = self.measures + 1
        self.gram_KK = update_moving_average(self.gram_KK, observation.gram_KK, self.smoothing)
        present_K = observation.gram_KK.diagonal().isfinite()
        share_K = torch.ones_like(self.share_K) if observation.share_K is None else observation.share_K
        self.share_K = update_moving_average(self.share_K, torch.where(present_K, share_K, torch.nan), self.smoothing)
        p_K = torch.nan_to_num(self.share_K, nan=0.0) * self.user_K
        if not (p_K > 0).any():
            return
        alpha_K = self.method.weights(nearest_gram(self.gram_KK), p_K, step=observation.step)
        self.current_K = self._relative(alpha_K, p_K / p_K.sum())

    def figures(self) -> dict[str, float]:
        return {"measures": int(self.measures), "clamped": int(self.clamped)}

    def _relative(self, alpha_K: Tensor, p_K: Tensor) -> Tensor:
        """alpha / p of mean 1 with its floor; 1 for a task that was never seen or that the user gives no weight."""
        known_K = p_K > 0
        ratio_K = torch.where(known_K, alpha_K / p_K.clamp(min=1e-300), torch.nan)
        mean = ratio_K[known_K].clamp(min=0).mean()
        if not mean > 0:  # nothing points downhill for any task: as if nothing had been measured
            return torch.ones_like(ratio_K)
        ratio_K = ratio_K / mean
        self.clamped = self.clamped + (ratio_K < FLOOR).sum()
        return fill_missing_weights(ratio_K.clamp(min=FLOOR))


def nearest_gram(gram_KK: Tensor) -> Tensor:
    """A mean over steps that held different tasks need not be a Gram matrix: the part of it that is (NaN stays)."""
    seen_K = gram_KK.diagonal().isfinite()
    part = torch.nan_to_num(gram_KK[seen_K][:, seen_K], nan=0.0)  # two tasks never seen together: as if orthogonal
    if not len(part):
        return gram_KK
    value, vector = torch.linalg.eigh((part + part.T) / 2)
    if value[0] < -1e-12 * value[-1]:
        part = vector * value.clamp(min=0) @ vector.T
    out = torch.full_like(gram_KK, torch.nan)
    out[seen_K[:, None] & seen_K] = part.flatten()
    return out
