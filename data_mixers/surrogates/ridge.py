"""Ridge regression on standardised features of the shares, penalty by exact leave-one-out.

    [x, sqrt x, log(x + 3e-3)]      (with progress: x tau in place of x)

alpha from 15 log-spaced values 1e-4 ... 1e3 times n / 100, by the leave-one-out error e_i / (1 - h_ii) (groups of equal
mixtures are left out together), all from one singular value decomposition.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

import numpy as np

from data_mixers.surrogates.base import Floats, PointSurrogate, amounts

OFFSET = 3e-3  # one step of a share that matters; between the smallest share tried and the mean share


@dataclass
class Ridge(PointSurrogate):
    """A linear model of shares, roots and logs, its penalty `alpha` found by the fit."""

    name: ClassVar[str] = "ridge"

    alpha: float = field(init=False, default=0.0)
    _scale: tuple[Floats, Floats] = field(
        init=False, repr=False, default_factory=lambda: (np.zeros(0), np.ones(0))
    )  # mean and sd of each column
    _beta: Floats = field(init=False, repr=False, default_factory=lambda: np.zeros(0))
    _offset: float = field(init=False, repr=False, default=0.0)

    def _columns(self, X: Floats, tau: Floats | None) -> Floats:
        amount = amounts(X, tau)
        return np.hstack([amount, np.sqrt(amount), np.log(amount + OFFSET)])

    def _design(self, X: Floats, tau: Floats | None) -> Floats:
        mean, scale = self._scale
        return (self._columns(X, tau) - mean) / scale

    def _fit(self, X: Floats, y: Floats, tau: Floats | None, weights: Floats) -> None:
        raw = self._columns(X, tau)
        deviation = raw.std(axis=0)
        self._scale = raw.mean(axis=0), np.where(deviation < 1e-9, 1.0, deviation)  # a share of 0 in all trials: 1
        design = self._design(X, tau)
        root = np.sqrt(weights / weights.mean())
        self._offset = float(np.average(y, weights=weights))
        left, singular, right = np.linalg.svd(design * root[:, None], full_matrices=False)
        target = (y - self._offset) * root
        projected = left.T @ target
        best = np.inf
        for alpha in np.logspace(-4, 3, 15) * max(1.0, len(y) / 100):
            shrink = singular**2 / (singular**2 + alpha)
            hat = np.einsum("ij,j,ij->i", left, shrink, left) + 1.0 / len(y)  # 1/n: the mean is fitted too
            error = float(np.mean(((target - left @ (shrink * projected)) / np.maximum(1 - hat, 1e-6)) ** 2))
            if error < best:
                best, self.alpha = error, float(alpha)
        self._beta = right.T @ (singular / (singular**2 + self.alpha) * projected)

    def _mean(self, X: Floats, tau: Floats | None) -> Floats:
        return self._offset + self._design(X, tau) @ self._beta
