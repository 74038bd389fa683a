"""Attention within the examples of packed rows, without a mask: transformers' attention "segments".

transformers keeps packed examples apart by a dense mask [B, 1, T, T] and computes all T x T scores: the cost of packing
grows with the row. Here each example attends to itself, by its borders (`cu_seq_lens_q`, the keyword that transformers
hands through to flash attention; mtft.data.batching.packed_attention makes it):

buckets   examples of similar length together, [n, L, H, D], through torch's causal attention, and back. Padding on the
          right of a bucket is nothing that a causal query sees. The indices are made once for a batch's borders, and
          all layers and the recomputation of checkpointing share them. A layer's sliding window is a band within L.
varlen    on CUDA in 16 bit, where torch has it: its flash kernel for rows of many lengths.

Where no borders come (generation, a family that drops the keyword, attention with dropout, whose draws would differ)
the mask is made after all, then and there, and transformers' sdpa does the work: right everywhere, fast where it can
be. Logits that are capped before the softmax, attention sinks and biases by position are not in these kernels: families
with them keep transformers' own attention (mtft.common.packed_families).
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from functools import cache
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from mtft.common.packed_families import BY_BORDERS

NAME = "segments"
# A bucket's longest example is at most so many times its shortest, or so many tokens more.
_RATIO, _TOKENS = 1.2, 8


def register() -> None:
    """Makes the name known to transformers. Safe to call again."""
    from transformers import AttentionInterface, AttentionMaskInterface

    AttentionInterface.register(NAME, segment_attention)
    AttentionMaskInterface.register(NAME, segment_mask)


def prefers_segments(config: Any) -> bool:
    """Whether `model.attention: auto` is "segments" here: on CPUs, where it is measured to be faster, for families for
    which it is proven. On GPUs it is there when asked for.
    """
    return not torch.accelerator.is_available() and segments_refusal(config) is None


def segments_refusal(config: Any) -> str | None:
    """Why a model can't have this attention; None: it can. config: of the (text) model."""
    if config.model_type not in BY_BORDERS:
        return f"attention {NAME!r} is not proven for models of type {config.model_type!r}"
    return None


def auto_attention(config: Any) -> str:
    """What `model.attention: auto` is for a model for which transformers chose what its config says."""
    own = str(config._attn_implementation)
    return NAME if own == "sdpa" and prefers_segments(config) else own


def use_segments(model: Any) -> None:
    """Turns the attention of a model that was made with `auto` to segments, where they are chosen."""
    if auto_attention(model.config) == NAME:
        register()
        model.set_attn_implementation(NAME)


class DeferredMask:
    """A mask of packed rows, made when a layer asks for it; layers share it."""

    def __init__(self, make: Callable[[], Tensor | None]) -> None:
        self._make, self._made = make, False
        self._mask: Tensor | None = None

    def __call__(self) -> Tensor | None:
        if not self._made:
            self._mask, self._made = self._make(), True
        return self._mask


def segment_mask(**asked: Any) -> Tensor | DeferredMask | None:
    """The mask function of transformers for this attention. Asked for packed rows: as late as possible."""
    from transformers.masking_utils import sdpa_mask

    packed = asked.get("attention_mask") is None and not asked.get("allow_is_causal_skip", True)
    if packed and asked["q_length"] == asked["kv_length"]:
        return DeferredMask(lambda: sdpa_mask(**asked))
    return sdpa_mask(**asked)


def segment_attention(
    module: nn.Module,
    query_BHTD: Tensor,
    key_BGTD: Tensor,
    value_BGTD: Tensor,
    attention_mask: Tensor | DeferredMask | None,
    *,
    dropout: float = 0.0,
    scaling: float | None = None,
    sliding_window: int | None = None,
    cu_seq_lens_q: Tensor | None = None,
    **more: Any,
) -> tuple[Tensor, None]:
    """The attention function of transformers: [B, T, H, D], and no weights. H heads of queries, G of keys."""
    for part in ("softcap", "s_aux"):
        if more.get(part) is not None:  # of a family that isn't listed: ignored, its losses would be others
            raise ValueError(f"attention {NAME!r} has no {part}, which {type(module).__name__} asks for")
    in_mask = not isinstance(attention_mask, DeferredMask) or more.get("position_bias") is not None
    if cu_seq_lens_q is None or in_mask or dropout:
        from transformers.integrations.sdpa_attention import sdpa_attention_forward

        mask = attention_mask() if isinstance(attention_mask, DeferredMask) else attention_mask
        return sdpa_attention_forward(
            module,
            query_BHTD,
            key_BGTD,
            value_BGTD,
            mask,
            dropout=dropout,
            scaling=scaling,
            **more,  # pyright: ignore[reportArgumentType]
        )
    B, H, T, D = query_BHTD.shape
    q_NHD, k_NGD, v_NGD = (x.transpose(1, 2).flatten(0, 1) for x in (query_BHTD, key_BGTD, value_BGTD))
    if torch.is_autocast_enabled(q_NHD.device.type):
        dtype = torch.get_autocast_dtype(q_NHD.device.type)
        q_NHD, k_NGD, v_NGD = (x.to(dtype) for x in (q_NHD, k_NGD, v_NGD))
    if varlen_fits(q_NHD, v_NGD):
        longest = int(more["max_length_q"])
        out_NHD = by_varlen(q_NHD, k_NGD, v_NGD, cu_seq_lens_q, longest, scaling, sliding_window)
    else:
        out_NHD = _by_buckets(q_NHD, k_NGD, v_NGD, buckets_of(cu_seq_lens_q), scaling, sliding_window)
    return out_NHD.view(B, T, H, -1), None


def varlen_fits(q_NHD: Tensor, v_NGD: Tensor) -> bool:
    """Whether torch's flash kernel for rows of many lengths takes these."""
    if q_NHD.device.type != "cuda" or q_NHD.dtype not in (torch.bfloat16, torch.float16) or not _has_varlen():
        return False
    size = q_NHD.shape[-1]
    return size == v_NGD.shape[-1] and size <= 256 and size % 8 == 0 and torch.cuda.get_device_capability()[0] >= 8


@cache
def _has_varlen() -> bool:
    try:
        from torch.nn.attention.varlen import varlen_attn
    except ImportError:
        return False
    return {"window_size", "enable_gqa", "scale"} <= inspect.signature(varlen_attn).parameters.keys()


def by_varlen(
    q_NHD: Tensor,
    k_NGD: Tensor,
    v_NGD: Tensor,
    cu_seq_lens: Tensor,
    longest: int,
    scaling: float | None,
    window: int | None,
) -> Tensor:
    """[N, H, D] by torch's flash kernel. cu_seq_lens: int32 on the device; longest: of the examples."""
    from torch.nn.attention.varlen import varlen_attn

    borders = cu_seq_lens.int()
    seen = (-1 if window is None or window >= longest else window - 1, 0)  # to the left of a query, to its right
    return varlen_attn(  # pyright: ignore[reportReturnType]
        *(q_NHD.contiguous(), k_NGD.contiguous(), v_NGD.contiguous()),
        *(borders, borders, longest, longest),
        scale=scaling,
        window_size=seen,
        enable_gqa=q_NHD.shape[1] != k_NGD.shape[1],
    )


class Buckets(NamedTuple):
    """Examples by length, as indices of tokens.

    sizes   (n, L) of each bucket: n examples of at most L tokens
    take_M  int64: the tokens of all buckets, one bucket after the other; beyond an example's end its last token again
    back_N  int64: where each token stands in `take_M`
    padded  there is something beyond an end
    bands   {(L, window): bool [L, L]} of layers with a window, made when one asks; they go with the batch
    """

    sizes: list[tuple[int, int]]
    take_M: Tensor
    back_N: Tensor
    padded: bool
    bands: dict[tuple[int, int], Tensor]

    def band(self, length: int, window: int) -> Tensor:
        """bool [L, L]: a causal query's last `window` positions, its own among them."""
        if (length, window) not in self.bands:
            at_L = torch.arange(length, device=self.take_M.device)
            back_LL = at_L[:, None] - at_L
            self.bands[length, window] = (back_LL >= 0) & (back_LL < window)
        return self.bands[length, window]


def buckets_of(cu_seq_lens: Tensor) -> Buckets:
    """The buckets for cumulative lengths, int [examples + 1]: made once a tensor, and kept with it."""
    kept = getattr(cu_seq_lens, "_buckets", None)
    if kept is None:
        kept = make_buckets(cu_seq_lens.tolist(), cu_seq_lens.device)
        cu_seq_lens._buckets = kept  # pyright: ignore[reportAttributeAccessIssue]
    return kept


def make_buckets(borders: Sequence[int], device: torch.device | str = "cpu") -> Buckets:
    """Each example in the bucket of the first one, by falling length, of which it is not much shorter."""
    starts = torch.tensor(borders[:-1], dtype=torch.long)
    lengths = torch.tensor(borders[1:], dtype=torch.long) - starts
    order = lengths.argsort(descending=True, stable=True)
    sizes: list[tuple[int, int]] = []
    for length in lengths[order].tolist():
        longest = sizes[-1][1] if sizes else 0
        if sizes and longest <= max(_RATIO * length, length + _TOKENS):
            sizes[-1] = (sizes[-1][0] + 1, longest)
        else:
            sizes.append((1, length))
    take, back, begin, place = [], torch.empty(borders[-1], dtype=torch.long), 0, 0
    for n, longest in sizes:
        own = order[begin : begin + n]
        at_nL = torch.arange(longest)
        token_nL = starts[own, None] + torch.minimum(at_nL, lengths[own, None] - 1)
        take.append(token_nL.flatten())
        real = (at_nL < lengths[own, None]).flatten()
        back[take[-1][real]] = place + real.nonzero().squeeze(1)
        begin, place = begin + n, place + n * longest
    return Buckets(sizes, torch.cat(take).to(device), back.to(device), place > borders[-1], {})


def _by_buckets(
    q_NHD: Tensor, k_NGD: Tensor, v_NGD: Tensor, buckets: Buckets, scaling: float | None, window: int | None
) -> Tensor:
    counts = [n * longest for n, longest in buckets.sizes]
    parts = [_Rows.apply(x, buckets.take_M, buckets.back_N).split(counts) for x in (q_NHD, k_NGD, v_NGD)]
    grouped, out = q_NHD.shape[1] != k_NGD.shape[1], []
    for (n, longest), *qkv in zip(buckets.sizes, *parts, strict=True):
        q, k, v = (x.unflatten(0, (n, longest)).transpose(1, 2) for x in qkv)
        band = None if window is None or window >= longest else buckets.band(longest, window)
        done = F.scaled_dot_product_attention(
            q, k, v, attn_mask=band, is_causal=band is None, scale=scaling, enable_gqa=grouped
        )
        out.append(done.transpose(1, 2).flatten(0, 1))
    out_MHD = torch.cat(out) if len(out) > 1 else out[0]
    return _RowsBack.apply(out_MHD, buckets.take_M, buckets.back_N, buckets.padded)


class _Rows(torch.autograd.Function):
    """x[take]. Its gradient is a gather too, since what is beyond an example's end has the gradient zero."""

    @staticmethod
    def forward(ctx: Any, x_N: Tensor, take_M: Tensor, back_N: Tensor) -> Tensor:
        ctx.save_for_backward(back_N)
        return x_N.index_select(0, take_M)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_M: Tensor) -> tuple[Tensor, None, None]:  # type: ignore[override]
        return grad_M.index_select(0, ctx.saved_tensors[0]), None, None


class _RowsBack(torch.autograd.Function):
    """x[back]: the inverse of _Rows."""

    @staticmethod
    def forward(ctx: Any, x_M: Tensor, take_M: Tensor, back_N: Tensor, padded: bool) -> Tensor:
        ctx.save_for_backward(take_M, back_N)
        ctx.padded = padded
        return x_M.index_select(0, back_N)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_N: Tensor) -> tuple[Tensor, None, None, None]:  # type: ignore[override]
        take_M, back_N = ctx.saved_tensors
        if not ctx.padded:
            return grad_N.index_select(0, take_M), None, None, None
        grad_M = grad_N.new_zeros(len(take_M), *grad_N.shape[1:])
        return grad_M.index_copy_(0, back_N, grad_N), None, None, None
