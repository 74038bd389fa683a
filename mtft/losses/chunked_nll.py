"""Output head and cross-entropy together, some rows at a time: the logits [n, V] are never whole.

Of each chunk of rows, while its logits are there:

    logits = s h W^T + b,   nll = logsumexp(logits) - logit[label],   d nll / d h = s (softmax - onehot) W

A token's loss is later multiplied by a factor g (the objective's coefficients), and g commutes with d nll / d h. So the
gradient of the states is formed in the forward pass and takes their place, [n, D]: with a frozen head, as under LoRA,
that is two products, as with whole logits. The gradient of W needs g inside its sum over tokens: a head that is trained
makes its chunks again in the backward (a third more time in the head). As Liger Kernel (arXiv 2410.10989) and cut
cross-entropy (arXiv 2411.09009) do it, here in plain torch, on any device and with a loss for each token.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

CHUNK_BYTES = {"cpu": 32 << 20, "cuda": 256 << 20}  # of a chunk's logits in fp32
MIN_ROWS = 128  # of a chunk: each is two passes over W, which fewer rows don't pay for


class Head(NamedTuple):
    """logits = factor * (h weight^T + bias)."""

    weight_VD: Tensor
    bias_V: Tensor | None = None
    factor: float = 1.0


def chunk_rows(vocabulary: int, device: str) -> int:
    """Rows whose logits are there at a time."""
    return max(MIN_ROWS, CHUNK_BYTES.get(device, CHUNK_BYTES["cuda"]) // (4 * vocabulary))


def chunked_nll(
    hidden_ND: Tensor,
    head: Head,
    labels_N: Tensor,
    *,
    rows: int | None = None,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
) -> Tensor:
    """fp32 [n]: the loss of each row, in nats, as `row_nll` of the head's logits has it.

    rows: of a chunk; None: by vocabulary and device. In the precision of autocast where it is on, else of the states.
    """
    weight_VD, device = head.weight_VD, hidden_ND.device.type
    rows = chunk_rows(weight_VD.shape[0], device) if rows is None else rows
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else hidden_ND.dtype
    settings = _Settings(dtype, rows, head.factor, label_smoothing, z_loss)
    return _ChunkedNLL.apply(hidden_ND, weight_VD, head.bias_V, labels_N, settings)


class _Settings(NamedTuple):
    dtype: torch.dtype
    rows: int
    factor: float
    label_smoothing: float
    z_loss: float


class _ChunkedNLL(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden_ND: Tensor, weight_VD: Tensor, bias_V: Tensor | None, labels_N: Tensor, settings: _Settings
    ) -> Tensor:
        of_hidden, of_weight, of_bias = ctx.needs_input_grad[:3]
        nll_N = torch.empty(len(labels_N), dtype=torch.float32, device=hidden_ND.device)
        again = of_weight or of_bias  # their gradients need the factors of the backward
        early = torch.empty_like(hidden_ND) if of_hidden and not again else None
        chunks = _Chunks(hidden_ND, weight_VD, bias_V, labels_N, settings)
        for part in chunks.parts:
            logits_RV = chunks.logits(part)
            nll_N[part], slope_RV = chunks.nll(logits_RV, part, slope=early is not None)
            if early is not None:
                early[part] = slope_RV @ chunks.weight_VD
        ctx.settings, ctx.again = settings, again
        ctx.save_for_backward(*((hidden_ND, weight_VD, bias_V, labels_N) if again else (early,)))
        return nll_N

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_N: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        if not ctx.again:
            (early,) = ctx.saved_tensors
            return None if early is None else (early * grad_N[:, None]).to(early.dtype), None, None, None, None
        hidden_ND, weight_VD, bias_V, labels_N = ctx.saved_tensors
        of_hidden, of_weight, of_bias = ctx.needs_input_grad[:3]
        chunks = _Chunks(hidden_ND, weight_VD, bias_V, labels_N, ctx.settings)
        d_hidden = torch.empty_like(hidden_ND) if of_hidden else None
        d_weight = torch.zeros_like(weight_VD, dtype=torch.float32) if of_weight else None
        d_bias = torch.zeros_like(bias_V, dtype=torch.float32) if of_bias else None
        for part in chunks.parts:
            _, slope_RV = chunks.nll(chunks.logits(part), part, slope=True, factor_R=grad_N[part])
            if d_hidden is not None:
                d_hidden[part] = slope_RV @ chunks.weight_VD
            if d_weight is not None:
                if slope_RV.dtype == d_weight.dtype:
                    d_weight.addmm_(slope_RV.mT, chunks.hidden_ND[part])
                else:  # sums over chunks in 16 bit would lose the small ones
                    d_weight += slope_RV.mT @ chunks.hidden_ND[part]
            if d_bias is not None:
                d_bias += slope_RV.sum(dim=0, dtype=torch.float32)
        d_weight = None if d_weight is None else d_weight.to(weight_VD.dtype)
        return d_hidden, d_weight, None if d_bias is None else d_bias.to(bias_V.dtype), None, None


class _Chunks:
    """The logits of some rows, always in the same buffer, and what becomes of them."""

    def __init__(
        self, hidden_ND: Tensor, weight_VD: Tensor, bias_V: Tensor | None, labels_N: Tensor, settings: _Settings
    ) -> None:
        n, rows = len(labels_N), settings.rows
        self.settings, self.labels_N = settings, labels_N
        self.hidden_ND, self.weight_VD = hidden_ND.to(settings.dtype), weight_VD.to(settings.dtype)
        self.bias_V = None if bias_V is None else bias_V.to(settings.dtype)
        self.parts = [slice(first, min(first + rows, n)) for first in range(0, n, rows)]
        self._buffer = hidden_ND.new_empty(min(rows, n), len(weight_VD), dtype=settings.dtype)

    def logits(self, part: slice) -> Tensor:
        """fp32 [R, V]; of 16-bit models a copy."""
        logits_RV = self._buffer[: part.stop - part.start]
        if self.bias_V is None:
            torch.mm(self.hidden_ND[part], self.weight_VD.mT, out=logits_RV)
        else:
            torch.addmm(self.bias_V, self.hidden_ND[part], self.weight_VD.mT, out=logits_RV)
        logits_RV = logits_RV.float()
        return logits_RV if self.settings.factor == 1.0 else logits_RV.mul_(self.settings.factor)

    def nll(
        self, logits_RV: Tensor, part: slice, *, slope: bool, factor_R: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """The losses [R] fp32, and their gradients by the head's product [R, V] in its precision. Uses up the logits.

        factor_R: of each row's gradient.
        """
        labels_R1, settings = self.labels_N[part, None], self.settings
        eps, z = settings.label_smoothing, settings.z_loss
        highest_R1 = logits_RV.amax(dim=1, keepdim=True)
        label_R1 = logits_RV.gather(1, labels_R1)
        mean_R1 = logits_RV.mean(dim=1, keepdim=True) if eps else None
        e_RV = logits_RV.sub_(highest_R1).exp_()
        sum_R1 = e_RV.sum(dim=1, keepdim=True)
        lse_R1 = sum_R1.log() + highest_R1
        nll_R1 = lse_R1 - label_R1
        if mean_R1 is not None:
            nll_R1 = (1 - eps) * nll_R1 + eps * (lse_R1 - mean_R1)
        if z:
            nll_R1 = nll_R1 + z * lse_R1.square()
        if not slope:
            return nll_R1[:, 0], e_RV
        factor_R1 = settings.factor * (torch.ones_like(sum_R1) if factor_R is None else factor_R[:, None])
        e_RV.mul_(factor_R1 * (1 + 2 * z * lse_R1) / sum_R1)
        if eps:
            e_RV.sub_(factor_R1 * (eps / e_RV.shape[1]))
        e_RV.scatter_add_(1, labels_R1, -(1 - eps) * factor_R1)
        return nll_R1[:, 0], e_RV.to(settings.dtype)
