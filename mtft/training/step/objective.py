"""What is minimized, apart from the task weights, and its ordinary gradient.

Objective          from a batch to its token losses and their coefficients
StepContext        what the parts of an optimizer step get to see of a run
forward_backward   one forward and one backward pass a micro-batch
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from mtft.data.batching.batch import Batch
from mtft.gradients.capture.task_gradients import TaskGradients
from mtft.losses.orthogonality_penalty import adapter_orthogonality
from mtft.losses.sample_weights import SampleWeights
from mtft.losses.task_reduction import TaskCounts, TaskSums, coefficients, task_sums
from mtft.losses.token_nll import token_nll
from mtft.losses.validation_stream import ValidationStream
from mtft.training.step.neftune import Neftune
from mtft.training.step.task_gradients import TaskGradientStep


@dataclass(frozen=True)
class Objective:
    """The recipe's `loss`, resolved.

    normalise  what the mean runs over (mtft.losses.task_reduction)
    path       how the per-token losses are computed (mtft.losses.token_nll)
    attention  attention implementation of the model
    isolated   it is proven not to cross the examples of a row; None: asked at each forward
    valid      held-out micro-batches of a step, for balancers that ask for them (Needs.valid_every)
    noise      NEFTune's, which is drawn while the model is in training
    sample_weights, label_smoothing, z_loss, orthogonal: as in the recipe
    """

    normalise: str
    path: str
    attention: str
    isolated: bool | None = None
    valid: ValidationStream | None = None
    sample_weights: SampleWeights | None = None
    label_smoothing: float = 0.0
    z_loss: float = 0.0
    orthogonal: float = 0.0
    noise: Neftune | None = None

    def nll(self, model: nn.Module, batch: Batch) -> Tensor:
        """fp32 [B, T]: loss of every supervised token, 0 elsewhere."""
        with nullcontext() if self.noise is None else self.noise.on(batch):
            return token_nll(
                model,
                batch,
                path=self.path,
                attention=self.attention,
                isolated=self.isolated,
                label_smoothing=self.label_smoothing,
                z_loss=self.z_loss,
            )

    def loss(self, nll_BT: Tensor, batch: Batch, counts: TaskCounts, w_K: Tensor, step: int) -> Tensor:
        """This micro-batch's part of the loss of step `step`; the parts of all micro-batches and ranks add up to it."""
        c_BT = coefficients(batch, counts, w_K, self.normalise, nll_BT.dtype)
        if self.sample_weights is not None:
            c_BT = c_BT * self.sample_weights.factors(step, nll_BT, batch, len(w_K))
        return (c_BT * nll_BT).sum()

    def penalty(self, model: nn.Module) -> Tensor | None:
        """What is added to the loss of the whole step, whatever is in it; None: nothing."""
        return self.orthogonal * adapter_orthogonality(model) if self.orthogonal > 0 else None


@dataclass(frozen=True)
class StepContext:
    """What the parts of an optimizer step see of a run.

    model      the bare model (under FSDP: sharded in place)
    wrapped    what the engine made of it
    tasks      names, in the order of the batches' task ids
    optimizer  None before training (an evaluation alone)
    told       called after each micro-batch of a step with (done, of how many)
    """

    model: nn.Module
    wrapped: nn.Module
    objective: Objective
    accelerator: Accelerator
    tasks: tuple[str, ...]
    device: torch.device
    optimizer: Any
    seed: int
    deepspeed: bool
    told: Callable[[int, int], None] | None = None


def forward_backward(
    context: StepContext,
    model: nn.Module,
    batches: Sequence[Batch],
    counts: TaskCounts,
    w_K: Tensor,
    step: int,
    measured: tuple[TaskGradientStep, TaskGradients] | None = None,
) -> list[TaskSums]:
    """Gradients of step `step` in .grad (or in the engine), averaged over ranks; the task sums of its batches.

    counts: of the whole step, over all ranks. measured: captures the task gradients on the way
    (mtft.gradients.capture.task_gradients).
    """
    objective, accelerator = context.objective, context.accelerator
    parts: list[TaskSums] = []
    for index, batch in enumerate(batches):
        last = index == len(batches) - 1
        accelerator.gradient_state._set_sync_gradients(last)
        with nullcontext() if last else _accumulating(accelerator, model):
            if measured is not None:
                measured[0].begin(batch, last=last)
            nll_BT = objective.nll(model, batch)
            # Gradients are averaged over ranks but the coefficients are those of the global step: times R.
            loss = objective.loss(nll_BT, batch, counts, w_K, step) * accelerator.num_processes
            penalty = objective.penalty(model)
            if penalty is not None:  # the same on every rank, so the average over ranks is right
                loss = loss + penalty / len(batches)
            if measured is not None:
                measured[1].watch(loss)
            accelerator.backward(loss, **({"scale_wrt_gas": False} if context.deepspeed else {}))
        parts.append(task_sums(nll_BT, batch, len(context.tasks)))
        if context.told is not None:
            context.told(index + 1, len(batches))
    return parts


def _accumulating(accelerator: Accelerator, model: nn.Module) -> AbstractContextManager[None]:
    """Around a backward pass that is not the last one of its step: gradients are averaged over ranks after the last.

    Not under FSDP: without averaging every rank keeps the whole fp32 gradient of all that is trained (28 GB of a 7 B
    model in full fine-tuning). There each pass averages, and a rank keeps its part.
    """
    return nullcontext() if accelerator.is_fsdp2 else accelerator.no_sync(model)
