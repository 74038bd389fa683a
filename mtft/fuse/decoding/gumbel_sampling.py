"""Gumbel-max sampling with noise that is a pure function of (seed, sample, position, id).

    argmax_v (log p(v) + G_v),  G_v = -log(-log u_v)      is a draw from p (Gumbel 1954; Maddison et al., 1411.0030)

The uniforms are SplitMix64's output function at counter v under a key (Steele, Lea & Flood, OOPSLA 2014). So a row's
tokens never depend on its neighbours, on the batch, on the device or on how many tokens were drafted.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

_MASK = (1 << 64) - 1
_GOLDEN = 0x9E3779B97F4A7C15
_MUL_1, _MUL_2 = 0xBF58476D1CE4E5B9, 0x94D049BB133111EB
TOKEN, ACCEPT, RESIDUAL = 1, 2, 3  # streams: one key never serves two purposes
GREEDY = 1e-30  # temperature: at and below, fp32 scores / T overflow, and no draw could differ from the best token


def is_greedy(temperature: float | None) -> bool:
    """Whether sampling at this temperature is taking the best token. None: 1."""
    return temperature is not None and temperature <= GREEDY


def key(seed: int, sample: int, position: int, stream: int = TOKEN) -> int:
    """A 64-bit key; `position` counts the tokens of this row that were generated before."""
    value = 0
    for part in (seed, sample, position, stream):
        value = _mix((value + _GOLDEN + (part & _MASK)) & _MASK)
    return value


def uniform(keys: Sequence[int], size: int, device: torch.device | str = "cpu") -> Tensor:
    """float64 [len(keys), size], in the open interval (0, 1)."""
    counter = torch.arange(1, size + 1, device=device) * _signed(_GOLDEN)  # int64 wraps around: arithmetic mod 2^64
    x = torch.tensor([_signed(k) for k in keys], device=device)[:, None] + counter
    x = (x ^ _shift_right(x, 30)) * _signed(_MUL_1)
    x = (x ^ _shift_right(x, 27)) * _signed(_MUL_2)
    x = x ^ _shift_right(x, 31)
    return (_shift_right(x, 11).double() + 0.5) * 2.0**-53


def gumbel(keys: Sequence[int], size: int, device: torch.device | str = "cpu") -> Tensor:
    """Standard Gumbel noise, float64 [len(keys), size]."""
    return uniform(keys, size, device).log_().neg_().log_().neg_()


def sample(scores_NV: Tensor, keys: Sequence[int]) -> Tensor:
    """One id per row, int64 [N], drawn from softmax(scores) with the row's key. Ids at -inf are never drawn."""
    noise_NV = gumbel(keys, scores_NV.shape[-1], scores_NV.device)
    return (torch.log_softmax(scores_NV.double(), -1) + noise_NV).argmax(-1)


def _mix(x: int) -> int:
    x = ((x ^ (x >> 30)) * _MUL_1) & _MASK
    x = ((x ^ (x >> 27)) * _MUL_2) & _MASK
    return x ^ (x >> 31)


def _signed(x: int) -> int:
    return x - (1 << 64) if x >> 63 else x


def _shift_right(x: Tensor, bits: int) -> Tensor:
    """Logical shift: torch's >> on int64 copies the sign."""
    return (x >> bits) & ((1 << (64 - bits)) - 1)
