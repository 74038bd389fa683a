"""The passes that a step towards a flat minimum takes (`loss.gradients.flat`, mtft/experimental/flat_minima.py).

The gradient of one task at moved weights is taken on the bare model with `autograd.grad`: no engine sees it, and the
gradients that the engine holds stay as they are. It is summed over ranks by us. Random numbers (dropout) are those of
the step's own pass. Where that pass drew none, rows without a token of the task are left out, which changes nothing
and makes K passes as cheap as the batch allows: a row of one task is computed once, a row of all tasks K times.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from mtft.common.device_copy import to_device
from mtft.common.state_tree import random_state, restore_random_state
from mtft.data.batching.batch import IGNORE, Batch
from mtft.experimental.flat_minima import RHO, Mix, Named, f_mtl, samo
from mtft.gradients.gramian import ranks_of, sum_over_ranks
from mtft.losses.task_reduction import TaskCounts, coefficients
from mtft.recipe.schema.loss import FlatMinimaSection
from mtft.training.step.extra_losses import global_losses
from mtft.training.step.objective import StepContext


class SharpnessAwareStep:
    """One step's passes; called with its captured gradients it gives the direction to follow.

    section  loss.gradients.flat;  factor  what the engine multiplies gradients by (TaskGradients.factor)
    batches  this rank's micro-batches;  counts  of all ranks;  random  the random state before the step's forward
    """

    def __init__(
        self,
        context: StepContext,
        section: FlatMinimaSection,
        batches: Sequence[Batch],
        counts: TaskCounts,
        random: dict[str, Any],
        step: int,
        factor: float,
    ) -> None:
        self.context, self.section, self.factor = context, section, factor
        self.batches, self.counts, self.random, self.step = batches, counts, random, step
        now = random_state()  # dropout on the way: every row has its part of the random numbers
        self.drew = any(not torch.equal(random[name], now[name]) for name in ("torch", "cuda") if name in now)

    def __call__(self, jacobian: Named, mix: Mix, p_K: Tensor) -> tuple[Named, Tensor]:
        """(direction, Gram matrix of the unmoved gradients). p_K: 0 for tasks that take no part. Collective."""
        section = self.section
        every = dict(self.context.model.named_parameters())
        self.parameters = {name: every[name] for name in jacobian}
        rho = RHO[section.name] if section.rho is None else section.rho
        present_K = p_K > 0
        if section.name == "f_mtl":
            return f_mtl(self.parameters, jacobian, self.gradient, mix, present_K, rho=rho, adaptive=section.adaptive)
        return samo(
            self.parameters, jacobian, self.gradient, self.losses, mix, present_K,
            p_K=p_K, noise=self.noise, rho=rho, beta=section.beta, probe=section.probe,
        )  # fmt: skip

    def gradient(self, task: int) -> Named:
        """Gradient of the task's loss (its mean as the objective has it) at the weights as they are. Collective."""
        context, factor, names = self.context, self.factor, list(self.parameters)
        alone_K = torch.zeros(len(context.tasks), dtype=torch.float64)
        alone_K[task] = 1.0
        total = {name: torch.zeros_like(p, dtype=torch.float32) for name, p in self.parameters.items()}
        present = random_state()
        restore_random_state(self.random)
        for batch in self.batches:
            batch = batch if self.drew else rows_of(batch, task)
            if batch is None:
                continue
            nll_BT = context.objective.nll(context.model, batch)
            c_BT = coefficients(batch, self.counts, alone_K, context.objective.normalise)
            loss = (c_BT * nll_BT).sum() * factor  # as large as the engine makes it: fp16 would lose small gradients
            gradients = torch.autograd.grad(loss, list(self.parameters.values()), allow_unused=True)
            for name, value in zip(names, gradients, strict=True):
                if value is not None:
                    total[name] += value.float() / factor
        restore_random_state(present)
        if ranks_of() > 1:
            sum_over_ranks(total.values())
        return total

    def losses(self) -> Tensor:
        """Losses of all tasks at the weights as they are, with the step's own random numbers. Collective."""
        return global_losses(self.context, self.context.model, self.batches, self.random)

    def noise(self) -> Iterator[Tensor]:
        """Normal numbers for each parameter, the same on every rank and at every call."""
        generator = torch.Generator().manual_seed(1_000_003 * self.context.seed + self.step)
        for parameter in self.parameters.values():
            yield to_device(torch.randn(parameter.shape, generator=generator), parameter.device)


def rows_of(batch: Batch, task: int) -> Batch | None:
    """The rows with a supervised token of the task; None: there is none."""
    has_B = ((batch.host.task_ids_BT == task) & (batch.host.labels_BT != IGNORE)).any(dim=1)
    if bool(has_B.all()):
        return batch
    if not bool(has_B.any()):
        return None
    return batch.host.map(lambda x: x[has_B]).to(batch.labels_BT.device)
