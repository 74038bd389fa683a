"""Weights that don't look at the losses: uniform, fixed, random, and tempered by the size of the data."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Annotated, ClassVar

import numpy as np
import torch
from pydantic import Field
from torch import Tensor

from mtft.common.errors import UserError
from mtft.losses.balancers.base import Balancer


@dataclass(eq=False)
class Uniform(Balancer):
    """Every task 1: the user's weights alone."""

    NAME: ClassVar[str] = "uniform"


@dataclass(eq=False)
class Fixed(Balancer):
    """The weights that the recipe gives: `balancer: {name: fixed, values: {sql: 2, math: 1}}`."""

    values: Mapping[str, Annotated[float, Field(ge=0)]] = field(default_factory=dict)
    NAME: ClassVar[str] = "fixed"

    def reset(self) -> None:
        self.fixed_K = self.per_task("values", self.values)

    def balance(self, step: int, step_loss_K: Tensor | None) -> Tensor:
        return self.fixed_K


@dataclass(eq=False)
class Random(Balancer):
    """Random loss weighting: w = K softmax(n), n ~ normal(0, 1)^K, fresh at every step.

    Lin et al., "Reasonable Effectiveness of Random Weighting" (arXiv 2111.10603): the baseline to beat.
    The draw depends on (seed, step) only, so it is the same on every rank and after a restart.
    """

    NAME: ClassVar[str] = "random"

    def balance(self, step: int, step_loss_K: Tensor | None) -> Tensor:
        # Mixed to 32 bits first: torch's CPU generator looks at no more of a seed.
        mixed = int(np.random.SeedSequence([self.run.seed, step]).generate_state(1)[0])
        generator = torch.Generator().manual_seed(mixed)
        return torch.softmax(torch.randn(self.K, generator=generator, dtype=torch.float64), dim=0)


@dataclass(eq=False)
class Temperature(Balancer):
    """Task shares of the loss q_k ~ n_k^(1/tau), n_k = size of the task's data: tau 1 is natural, large tau uniform.

    In the task modes the weights are the shares; in the token and sample modes a task has its natural share already, so
    w_k ~ q_k / n_k (n in supervised tokens or examples). Meant for data drawn in its natural shares: sampling with a
    temperature as well (data_mixers) multiplies the two.
    """

    temperature: Annotated[float, Field(gt=0)] = 1.0
    NAME: ClassVar[str] = "temperature"

    def reset(self) -> None:
        normalise = self.run.normalise
        size_K = self.run.tokens_K if normalise == "token" else self.run.examples_K
        if size_K is None:
            raise ValueError("balancer temperature: Context lacks the sizes of the tasks")
        size_K = size_K.double()
        if not bool((size_K > 0).all()):
            empty = self.run.tasks[int(size_K.argmin())]
            raise UserError(f"task {empty} has no data", where="loss.balancer", do="give it rows, or leave it out")
        self.tempered_K = (size_K / size_K.sum()) ** (1 / self.temperature)
        if normalise in ("token", "sample"):
            self.tempered_K = self.tempered_K / size_K

    def balance(self, step: int, step_loss_K: Tensor | None) -> Tensor:
        return self.tempered_K
