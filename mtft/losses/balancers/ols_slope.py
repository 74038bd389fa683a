"""How fast a curve moves: ordinary least squares with missing points."""

from __future__ import annotations

import torch
from torch import Tensor


def slopes(steps_N: Tensor, values_NK: Tensor) -> Tensor:
    """OLS slope of each column against the real step numbers, float64 [K]; NaN = missing, left out.

    0 where a column has fewer than two points. Missing points keep their place on the time axis, so a straight line has
    the same slope however many of them are dropped.
    """
    known_NK = values_NK.isfinite()
    n_K = known_NK.sum(dim=0)
    x_NK = torch.where(known_NK, steps_N.double()[:, None], 0.0)
    y_NK = torch.where(known_NK, values_NK, 0.0)
    dx_NK = torch.where(known_NK, x_NK - x_NK.sum(dim=0) / n_K.clamp(min=1), 0.0)
    dy_NK = torch.where(known_NK, y_NK - y_NK.sum(dim=0) / n_K.clamp(min=1), 0.0)
    spread_K = dx_NK.square().sum(dim=0)
    slope_K = (dx_NK * dy_NK).sum(dim=0) / spread_K.clamp(min=1e-300)
    return torch.where((n_K >= 2) & (spread_K > 0), slope_K, 0.0)
