"""Cross-entropy of rows in the memory of their logits: one [n, V] buffer from the forward to the gradient.

F.cross_entropy holds three: logits, log-probabilities, gradient. Here the logits become exp(logits - max) in the
forward and the gradient in the backward:

    nll = log sum e + max - logit[label],   e = exp(logits - max)
    d nll / d logits = e / sum e - onehot(label)

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
        e_NV = logits_NV.sub_(highest_N1).exp_()
        sum_N1 = e_NV.sum(dim=1, keepdim=True)
        ctx.save_for_backward(e_NV, sum_N1, labels_N)
        return (sum_N1.log() + highest_N1 - label_logit_N1)[:, 0]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_N: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        e_NV, sum_N1, labels_N = ctx.saved_tensors
        gradient_NV = e_NV.mul_(grad_N[:, None] / sum_N1)
        return gradient_NV.scatter_add_(1, labels_N[:, None], -grad_N[:, None]), None
