"""Ridge regression on standardised features of the shares, penalty by exact leave-one-out.

    linear      [x, sqrt x, log(x + 3e-3)]      (with progress: x tau in place of x)
    quadratic   all products of two columns of [1, u], u = standardised log(x + 3e-3)

alpha from 15 log-spaced values 1e-4 ... 1e3 times n / 100, by the leave-one-out error e_i / (1 - h_ii) (groups of equal
mixtures are left out together). Solved in the n x n dual, since the quadratic has more columns than there are trials.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar, Literal

import numpy as np

from data_mixers.surrogates.base import Floats, PointSurrogate, amounts

OFFSET = 3e-3  # one step of a share that matters; between the smallest share tried and the mean share


@dataclass
class Ridge(PointSurrogate):
    """`features`: "linear" or "quadratic"."""

    name: ClassVar[str] = "ridge"
    features: Literal["linear", "quadratic"] = "linear"

    alpha: float = field(init=False, default=0.0)
    _scale: tuple[Floats, Floats, Floats, Floats] = field(
        init=False, repr=False, default_factory=lambda: (np.zeros(0), np.ones(0), np.zeros(0), np.ones(0))
    )
    _beta: Floats = field(init=False, repr=False, default_factory=lambda: np.zeros(0))
    _offset: float = field(init=False, repr=False, default=0.0)

    def _columns(self, X: Floats, tau: Floats | None) -> Floats:
        amount = amounts(X, tau)
        if self.features == "linear":
            return np.hstack([amount, np.sqrt(amount), np.log(amount + OFFSET)])
        return np.log(amount + OFFSET)

    def _design(self, X: Floats, tau: Floats | None) -> Floats:
        mean, scale, mean2, scale2 = self._scale
        u = (self._columns(X, tau) - mean) / scale
        return u if self.features == "linear" else (_products(u) - mean2) / scale2

    def _fit(self, X: Floats, y: Floats, tau: Floats | None, weights: Floats) -> None:
        raw = self._columns(X, tau)
        mean, scale = raw.mean(axis=0), _deviation(raw)
        both = _products((raw - mean) / scale) if self.features == "quadratic" else raw
        self._scale = (mean, scale, both.mean(axis=0), _deviation(both))
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


def _products(u: Floats) -> Floats:
    """[u, u_i u_j for i <= j]."""
    i, j = np.triu_indices(u.shape[1])
    return np.hstack([u, u[:, i] * u[:, j]])


def _deviation(columns: Floats) -> Floats:
    deviation = columns.std(axis=0)
    return np.where(deviation < 1e-9, 1.0, deviation)  # a share that no trial uses says nothing
