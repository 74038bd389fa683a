"""MeZO: the gradient from two forward passes, with nothing kept for a backward pass (Malladi et al. 2023, 2305.17333).

    g = (L(w + e z) - L(w - e z)) / 2e * z,   z ~ N(0, 1) over all trained weights, new in every step

An unbiased estimate (up to e^2) of the gradient of the exact multi-task loss of the step, L, whatever its split: both
passes see the same examples, task weights and dropout. It then goes to the optimizer like any gradient. Its variance
grows with the number of trained weights, so it is for adapters, for many more steps, for sgd without clipping.

Where the paper perturbs in place and walks back, which rounds, the weights are put aside here (an adapter is small) and
come back bit for bit. z is a function of (seed, step), the same on every rank and in a resumed run.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
import torch.distributed as dist
from torch import Tensor, nn

from mtft.common.state_tree import random_state, restore_random_state
from mtft.data.batching.batch import Batch
from mtft.distributed.sharding import trainable
from mtft.losses.task_reduction import TaskCounts, TaskSums, task_sums
from mtft.training.step.objective import StepContext


def directions(parameters: Sequence[Tensor], seed: int, step: int) -> Iterator[Tensor]:
    """z of each parameter, one after the other, fp32 on its device."""
    for index, parameter in enumerate(parameters):
        generator = torch.Generator(device=parameter.device)
        generator.manual_seed((seed * 1_000_003 + step) * 65_537 + index)
        yield torch.randn(parameter.shape, generator=generator, device=parameter.device)


def mezo_step(
    context: StepContext,
    model: nn.Module,
    batches: Sequence[Batch],
    counts: TaskCounts,
    w_K: Tensor,
    step: int,
    *,
    epsilon: float,
    seed: int,
) -> list[TaskSums]:
    """Leaves the estimate in the gradients of the trained weights; returns the task sums, mean of the two passes.

    A collective call: the loss is that of all ranks.
    """
    parameters = list(trainable(context.model).values())
    objective, random = context.objective, random_state()
    sides: list[list[TaskSums]] = []
    losses: list[float] = []
    with torch.no_grad():
        aside = [parameter.clone() for parameter in parameters]
        for sign in (1.0, -1.0):
            restore_random_state(random)
            for parameter, start, z in zip(parameters, aside, directions(parameters, seed, step), strict=True):
                parameter.copy_(start + sign * epsilon * z)
            loss, parts = torch.zeros((), dtype=torch.float64, device=context.device), []
            for batch in batches:
                nll_BT = objective.nll(model, batch)
                loss += objective.loss(nll_BT, batch, counts, w_K, step).double()
                parts.append(task_sums(nll_BT, batch, len(context.tasks)))
            if dist.is_initialized():
                dist.all_reduce(loss)
            penalty = objective.penalty(model)
            losses.append(float(loss) + (0.0 if penalty is None else float(penalty)))
            sides.append(parts)
        for parameter, start in zip(parameters, aside, strict=True):
            parameter.copy_(start)
        slope = (losses[0] - losses[1]) / (2 * epsilon)
        for parameter, z in zip(parameters, directions(parameters, seed, step), strict=True):
            parameter.grad = (slope * z).to(parameter.dtype)
    context.accelerator.gradient_state._set_sync_gradients(True)
    return [TaskSums(*((one + two) / 2 for one, two in zip(*pair, strict=True))) for pair in zip(*sides, strict=True)]
