"""What is minimised, apart from the task weights: from a batch to its token losses and their coefficients."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import dataclass

from torch import Tensor, nn

from mtft.data.batching.batch import Batch
from mtft.losses.orthogonality_penalty import adapter_orthogonality
from mtft.losses.sample_weights import SampleWeights
from mtft.losses.task_reduction import TaskCounts, coefficients
from mtft.losses.token_nll import token_nll
from mtft.losses.validation_stream import ValidationStream
from mtft.training.step.neftune import Neftune


@dataclass(frozen=True)
class Objective:
    """The recipe's `loss`, resolved.

    normalise  what the mean runs over (mtft.losses.task_reduction)
    path       how the per-token losses are computed (mtft.losses.token_nll)
    attention  attention implementation of the model
    valid      held-out micro-batches of a step, for balancers that ask for them (Needs.valid_every)
    noise      NEFTune's, which is drawn while the model is in training
    sample_weights, label_smoothing, z_loss, orthogonal: as in the recipe
    """

    normalise: str
    path: str
    attention: str
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
                label_smoothing=self.label_smoothing,
                z_loss=self.z_loss,
            )

    def loss(self, nll_BT: Tensor, batch: Batch, counts: TaskCounts, w_K: Tensor, step: int) -> Tensor:
        """This micro-batch's part of the loss of step `step`; the parts of all micro-batches and ranks add up to it."""
        c_BT = coefficients(batch, counts, w_K, self.normalise)
        if self.sample_weights is not None:
            c_BT = c_BT * self.sample_weights.factors(step, nll_BT, batch, len(w_K))
        return (c_BT * nll_BT).sum()

    def penalty(self, model: nn.Module) -> Tensor | None:
        """What is added to the loss of the whole step, whatever is in it; None: nothing."""
        return self.orthogonal * adapter_orthogonality(model) if self.orthogonal > 0 else None
