"""Dynamic Weight Averaging: tasks whose loss falls slowly get more weight.

    rate_k = mean loss of task k in the last window / mean loss in the window before
    w_K    = K * softmax(rate_K / temperature)

Liu, Johns & Davison, "End-to-End Multi-Task Learning with Attention" (CVPR 2019, arXiv 1803.10704), where a window
is an epoch. Language-model runs have few epochs, so a window here is a fixed number of optimizer steps.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, ClassVar

import torch
from pydantic import Field
from torch import Tensor

from mtft.losses.balancers.base import Balancer, Observation


@dataclass(eq=False)
class DynamicWeightAverage(Balancer):
    """One knob that matters: `temperature` (large = uniform). `window`: optimizer steps.

    Costs nothing: it reads the training losses that the step has computed anyway.
    A task that is absent from a whole window keeps its last rate.
    """

    temperature: Annotated[float, Field(gt=0)] = 2.0
    window: Annotated[int, Field(ge=1)] = 50
    NAME: ClassVar[str] = "dwa"
    STATE: ClassVar[tuple[str, ...]] = ("sum_K", "count_K", "steps", "mean_K", "rate_K")

    def reset(self) -> None:
        self.sum_K = torch.zeros(self.K, dtype=torch.float64)
        self.count_K = torch.zeros(self.K, dtype=torch.float64)
        self.steps = torch.zeros((), dtype=torch.int64)
        self.mean_K = torch.full((self.K,), torch.nan, dtype=torch.float64)  # of the last full window
        self.rate_K = torch.ones(self.K, dtype=torch.float64)

    def balance(self, step: int, step_loss_K: Tensor | None) -> Tensor:
        return torch.softmax(self.rate_K / self.temperature, dim=0)

    def observe(self, observation: Observation) -> None:
        if observation.step == 0:
            return
        present_K = observation.train_loss_K.isfinite()
        self.sum_K = self.sum_K + torch.where(present_K, observation.train_loss_K, 0.0)
        self.count_K = self.count_K + present_K
        self.steps = self.steps + 1
        if int(self.steps) % self.window == 0:
            self._close_window()

    def _close_window(self) -> None:
        mean_K = self.sum_K / self.count_K  # 0/0 = NaN: absent all window long
        rate_K = mean_K / self.mean_K
        self.rate_K = torch.where(rate_K.isfinite(), rate_K, self.rate_K)
        self.mean_K = mean_K
        self.sum_K, self.count_K = torch.zeros_like(self.sum_K), torch.zeros_like(self.count_K)
