"""A short vector for a long gradient, with its inner products kept: the count sketch.

    s[h(i)] += sigma(i) g_i,      h(i) in 0 .. D - 1 and sigma(i) = +-1 drawn once for every coordinate i

E <s(a), s(b)> = <a, b>, with an error of about |a| |b| / sqrt(D) (Charikar, Chen & Farach-Colton 2002; Weinberger et
al., ICML 2009, 0902.2206). Unlike a dense projection it holds no matrix: the draws of a parameter come from the seed
and its name, a piece at a time, so memory on top of the gradient is a few megabytes whatever the model.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from mtft.common.fingerprint import hash_number

PIECE = 1 << 20  # coordinates at a time


def sketch(gradient: Mapping[str, Tensor], size: int, *, seed: int = 0) -> Tensor:
    """float64 [size] on the CPU, of {parameter: its gradient}; the same draws for the same seed and names."""
    out_D = torch.zeros(size, dtype=torch.float64)
    for name in sorted(gradient):
        generator = torch.Generator().manual_seed(hash_number(f"{seed} {name}", "big") >> 1)
        for piece_N in gradient[name].detach().flatten().split(PIECE):
            place_N = torch.randint(2 * size, (len(piece_N),), generator=generator)
            value_N = piece_N.double().cpu()
            out_D.index_add_(0, place_N % size, torch.where(place_N < size, value_N, -value_N))
    return out_D
