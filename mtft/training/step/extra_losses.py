"""Losses that a balancer asks for besides the step's own: before it, after it, on held-out rows. No gradients."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from mtft.common.state_tree import random_state, restore_random_state
from mtft.data.batching.batch import Batch
from mtft.evaluation.evaluation_mode import evaluation_mode
from mtft.evaluation.task_scores import TaskScores
from mtft.losses.task_reduction import reduce_sums, step_counts, task_losses, task_sums
from mtft.losses.validation_stream import ValidationStream
from mtft.training.optim.schedule_free import evaluation_weights
from mtft.training.step.objective import StepContext


def global_losses(
    context: StepContext, model: nn.Module, batches: Sequence[Batch], random: dict[str, Any] | None = None
) -> Tensor:
    """Losses of each task over all ranks, float64 [K]; the random state stays where it is. A collective call.

    random: the state to draw dropout from (None: the present one, so that the backward to come draws the same).
    """
    K, device, objective = len(context.tasks), context.device, context.objective
    present = random_state()
    if random is not None:
        restore_random_state(random)
    with torch.no_grad():
        parts = [task_sums(objective.nll(model, batch), batch, K) for batch in batches]
    restore_random_state(present)
    counts = step_counts(batches, K, device=device)
    return task_losses(reduce_sums(parts, K, device=device), counts, objective.normalise)


def valid_losses(context: StepContext, stream: ValidationStream, step: int) -> Tensor:
    """Losses of a small held-out stream, float64 [K], in evaluation mode. A collective call."""
    batches = [batch.to(context.device) for batch in stream.batches(step)]
    with evaluation_weights(context.optimizer), evaluation_mode(context.wrapped):
        return global_losses(context, context.wrapped, batches)


def heldout_losses(scores: Sequence[TaskScores], normalise: str) -> Tensor:
    """Loss of every held-out example, by task and averaged as the objective averages: float64 [K]."""
    if normalise in ("sample", "task_sample"):
        means = [float((of_task.nll_N / of_task.tokens_N).mean()) for of_task in scores]
    else:
        means = [of_task.summary()["loss"] for of_task in scores]
    return torch.tensor(means, dtype=torch.float64)
