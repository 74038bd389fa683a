"""Cross-entropy of rows in the memory of their logits: one [n, V] buffer from the forward to the gradient.

F.cross_entropy holds three: logits, log-probabilities, gradient. Here the logits become probabilities p in the forward
and the gradient in the backward:

    nll = max - log max p - logit[label],   as the largest probability is 1 / sum exp(logits - max)
    d nll / d logits = p - onehot(label)

About a quarter less time for head and loss together on a CPU, where fresh memory is dear (scripts/bench_losses.py).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

# What made the logits, if nothing needs their values any more: these operations keep their inputs, not their result.
_RESULT_IS_FREE = frozenset(
    {
        "MmBackward0",
        "AddmmBackward0",
        "UnsafeViewBackward0",
        "MulBackward0",
        "DivBackward0",
        "ToCopyBackward0",
        "IndexBackward0",
    }
)


def row_nll_in_place(logits_NV: Tensor, labels_N: Tensor) -> Tensor:
    """fp32 [n]: -log softmax(logits)[label] of each row. Destroys `logits_NV` (a copy of it where autograd needs it).

    One backward only: a second one through the same graph is torch's error about an in-place operation.
    """
    logits_NV = logits_NV.float()
    if logits_NV.grad_fn is None or logits_NV.grad_fn.name() not in _RESULT_IS_FREE:
        logits_NV = logits_NV.clone()
    return _RowNLL.apply(logits_NV, labels_N)


class _RowNLL(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits_NV: Tensor, labels_N: Tensor) -> Tensor:
        highest_N1 = logits_NV.amax(dim=1, keepdim=True)
        label_logit_N1 = logits_NV.gather(1, labels_N[:, None])
        p_NV = _softmax_in_place(logits_NV, highest_N1)
        ctx.save_for_backward(p_NV, labels_N)
        return (highest_N1 - p_NV.amax(dim=1, keepdim=True).log() - label_logit_N1)[:, 0]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_N: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        p_NV, labels_N = ctx.saved_tensors
        gradient_NV = p_NV.mul_(grad_N[:, None])
        return gradient_NV.scatter_add_(1, labels_N[:, None], -grad_N[:, None]), None


def _softmax_in_place(logits_NV: Tensor, highest_N1: Tensor) -> Tensor:
    """One pass, row by row, on the CPU, whose kernel reads a row before it writes it; elsewhere in steps."""
    if logits_NV.device.type == "cpu":
        return torch.softmax(logits_NV, dim=1, out=logits_NV)
    e_NV = logits_NV.sub_(highest_N1).exp_()
    return e_NV.div_(e_NV.sum(dim=1, keepdim=True))
