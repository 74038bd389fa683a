"""Losses that a balancer asks for besides the step's own: before it, after it, on held-out rows. No gradients."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from mtft.common.state_tree import random_state, restore_random_state
from mtft.data.batching.batch import Batch
from mtft.evaluation.evaluation_mode import evaluation_mode
from mtft.losses.balancers import Observation
from mtft.losses.task_reduction import reduce_sums, step_counts, task_losses, task_sums
from mtft.training.optim.schedule_free import evaluation_weights

if TYPE_CHECKING:
    from mtft.losses.validation_stream import ValidationStream
    from mtft.training.trainer import MultiTaskTrainer


def global_losses(
    trainer: MultiTaskTrainer, model: nn.Module, batches: Sequence[Batch], random: dict[str, Any] | None = None
) -> Tensor:
    """Losses of each task over all ranks, float64 [K]; the random state stays where it is. A collective call.

    random: the state to draw dropout from (None: the present one, so that the backward to come draws the same).
    """
    K, device = len(trainer.tasks), trainer.args.device
    here = random_state()
    if random is not None:
        restore_random_state(random)
    with torch.no_grad():
        parts = [task_sums(trainer.token_losses(model, batch), batch, K) for batch in batches]
    restore_random_state(here)
    counts = step_counts(batches, K, device=device)
    return task_losses(reduce_sums(parts, K, device=device), counts, trainer.objective.normalise)


def valid_losses(trainer: MultiTaskTrainer, step: int, stream: ValidationStream | None = None) -> Tensor:
    """Losses of a small held-out stream (`mtft.losses.validation_stream`; None: the balancer's), in evaluation mode."""
    stream = stream or trainer.objective.valid
    if stream is None:
        raise ValueError(f"balancer {trainer.balancer.NAME} needs a held-out stream")
    batches = [batch.to(trainer.args.device) for batch in stream.batches(step)]
    with evaluation_weights(trainer.optimizer), evaluation_mode(trainer.model_wrapped):
        return global_losses(trainer, trainer.model_wrapped, batches)


def observe_start(trainer: MultiTaskTrainer) -> None:
    """Step 0 for balancers that watch validation: the loss of every held-out example, before training."""
    if trainer.balancer.needs.valid_every is None or trainer.state.global_step > 0:
        return
    if 0 not in trainer.evaluations:
        trainer.evaluate()
    found = [trainer.evaluations[0][task] for task in trainer.tasks]
    if trainer.objective.normalise in ("sample", "task_sample"):
        means = [float((scores.nll_N / scores.tokens_N).mean()) for scores in found]
    else:
        means = [scores.summary()["loss"] for scores in found]
    valid_K = torch.tensor(means, dtype=torch.float64)
    trainer.balancer.update(Observation(0, torch.full_like(valid_K, torch.nan), valid_K))
