"""Least squares with an intercept on raw shares: RegMix's baseline (arXiv 2407.01492).

y = a + sum_k b_k x_k        (with progress: on the amounts seen, x_k tau)
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

import numpy as np

from data_mixers.surrogates.base import Floats, PointSurrogate, amounts


@dataclass
class LinearSurrogate(PointSurrogate):
    """Shares are taken as they stand in the table (rounded ones do not add up to 1), as the published baseline does."""

    name: ClassVar[str] = "linear"
    renormalize: ClassVar[bool] = False

    _coefficients: Floats = field(init=False, repr=False, default_factory=lambda: np.zeros(0))
    _centre: Floats = field(init=False, repr=False, default_factory=lambda: np.zeros(0))

    def _fit(self, X: Floats, y: Floats, tau: Floats | None, weights: Floats) -> None:
        X = amounts(X, tau)
        mean_K, mean = np.average(X, axis=0, weights=weights), np.average(y, weights=weights)
        root = np.sqrt(weights)[:, None]
        solved = np.linalg.lstsq((X - mean_K) * root, (y - mean) * root[:, 0], rcond=None)[0]
        self._centre, self._coefficients = np.r_[mean_K, mean], np.asarray(solved, dtype=np.float64)

    def _mean(self, X: Floats, tau: Floats | None) -> Floats:
        return self._centre[-1] + (amounts(X, tau) - self._centre[:-1]) @ self._coefficients
