"""The ordinary gradient of a step: one forward and one backward pass a micro-batch."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from typing import TYPE_CHECKING

from torch import Tensor, nn

from mtft.data.batching.batch import Batch
from mtft.losses.task_reduction import TaskCounts, TaskSums, task_sums

if TYPE_CHECKING:
    from mtft.gradients.capture.task_gradients import TaskGradients
    from mtft.training.trainer import MultiTaskTrainer


def forward_backward(
    trainer: MultiTaskTrainer,
    model: nn.Module,
    batches: Sequence[Batch],
    counts: TaskCounts,
    w_K: Tensor,
    step: int,
    taps: TaskGradients | None,
) -> list[TaskSums]:
    """Gradients of step `step` in .grad (or in the engine), averaged over ranks once; the task sums of its batches.

    counts: of the whole step, over all ranks. taps: capture the task gradients on the way
    (mtft.gradients.capture.task_gradients).
    """
    parts: list[TaskSums] = []
    for index, batch in enumerate(batches):
        last = index == len(batches) - 1
        trainer.accelerator.gradient_state._set_sync_gradients(last)
        with contextlib.nullcontext() if last else trainer.accelerator.no_sync(model):
            if taps is not None:
                trainer.surgery.begin(batch, last=last)
            nll_BT = trainer.token_losses(model, batch)
            # Gradients are averaged over ranks but the coefficients are those of the global step: times R.
            loss = trainer.objective.loss(nll_BT, batch, counts, w_K, step) * trainer.accelerator.num_processes
            penalty = trainer.objective.penalty(model)
            if penalty is not None:  # the same on every rank, so the average over ranks is right
                loss = loss + penalty / len(batches)
            if taps is not None:
                taps.watch(loss)
            engine = {"scale_wrt_gas": False} if trainer.is_deepspeed_enabled else {}
            trainer.accelerator.backward(loss, **engine)
        parts.append(task_sums(nll_BT, batch, len(trainer.tasks)))
    return parts
