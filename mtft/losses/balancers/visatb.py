"""VisATB: fixed weights from pilot runs that measured how much tasks help each other and how hard they are.

    w = 1/2 [ 1/2 (K softmax(o/T) + K softmax(-i/T)) + K softmax((1 - d)/T) ]

o_k contribution that task k gives to the others, i_k that it receives, d_k its score when trained alone relative to the
best possible. Helpful, unhelped and hard tasks get more. VisATB (WWW 2026). How to measure o and i is left open there;
use relative validation-loss gains of pairwise pilot runs.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Annotated, ClassVar

import torch
from pydantic import Field
from torch import Tensor

from mtft.losses.balancers.base import Balancer


@dataclass(eq=False)
class VisAtb(Balancer):
    """`given` o, `received` i, `alone` d: {task: number} for every task; `temperature` T."""

    given: Mapping[str, float] = field(default_factory=dict)
    received: Mapping[str, float] = field(default_factory=dict)
    alone: Mapping[str, float] = field(default_factory=dict)
    temperature: Annotated[float, Field(gt=0)] = 0.5
    NAME: ClassVar[str] = "visatb"

    def reset(self) -> None:
        o_K, i_K = self.per_task("given", self.given), self.per_task("received", self.received)
        d_K = self.per_task("alone", self.alone)
        helpful_K, unhelped_K, hard_K = (torch.softmax(x_K / self.temperature, 0) for x_K in (o_K, -i_K, 1 - d_K))
        self.fixed_K = (helpful_K + unhelped_K) / 2 + hard_K

    def balance(self, step: int, step_loss_K: Tensor | None) -> Tensor:
        return self.fixed_K
