"""Penalties on the adapter, added to the loss.

OrthoReg (arXiv 2604.17078) asks the columns of each update D = s B A to be orthogonal, so that what tasks write into a
layer interferes less when it is merged:

    off_diagonal   sum of the squared off-diagonal entries of D^T D = tr(P Q P Q) - sum_j (a_j^T P a_j)^2      (default)
    full           |D^T D - I|^2                                    = tr(P Q P Q) - 2 tr(P Q) + n
    with P = s^2 B^T B and Q = A A^T, both [r, r]; a_j = column j of A; n = input width. D is never built.

Which of the two the paper means is open. The penalty is the same on every rank and micro-batch: add
lambda * penalty * scale / (R * number of micro-batches) to each micro-batch's loss.
"""

from __future__ import annotations

from typing import Literal, cast

import torch
from torch import Tensor, nn

Form = Literal["off_diagonal", "full"]


def orthogonality(A: Tensor, B: Tensor, scale: float, form: Form = "off_diagonal") -> Tensor:
    """OrthoReg's penalty of one update scale * B @ A, A [r, in], B [out, r]; fp32 or better, differentiable in both."""
    A, B = A if A.dtype == torch.float64 else A.float(), B if B.dtype == torch.float64 else B.float()
    P, Q = scale**2 * B.T @ B, A @ A.T
    PQ = P @ Q
    squared = (PQ * PQ.T).sum()
    if form == "off_diagonal":
        return squared - (A * (P @ A)).sum(dim=0).square().sum()
    return squared - 2 * PQ.diagonal().sum() + A.shape[1]


def adapter_orthogonality(model: nn.Module, adapter: str = "default", form: Form = "off_diagonal") -> Tensor:
    """Sum of `orthogonality` over the LoRA linears of a PEFT model. ValueError: none there, or sharded."""
    from peft.tuners.lora import LoraLayer
    from torch.distributed.tensor import DTensor

    layers = [m for m in model.modules() if isinstance(m, LoraLayer) and adapter in m.lora_A]
    if not layers:
        raise ValueError(f"the model has no LoRA linear with an adapter {adapter!r}")
    total = torch.zeros(())
    for layer in layers:
        A, B = cast(Tensor, layer.lora_A[adapter].weight), cast(Tensor, layer.lora_B[adapter].weight)
        if isinstance(A, DTensor) or isinstance(B, DTensor):
            raise ValueError("OrthoReg needs whole LoRA matrices, these are sharded: use one process or DDP")
        total = total.to(A.device) + orthogonality(A, B, layer.scaling[adapter], form)
    return total
