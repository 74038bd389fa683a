"""Gaussian process of the log of a loss above a bound: small losses are told apart finely, large ones coarsely.

    log(y' - c) = GP(x),   c = min y' - gap sd(y'),   y = s y',   s = 1 for losses, -1 for scores

A mixture without any data of a task has a loss far above all others, and most of the variance is between such corners
and the rest; what a user chooses among lies where losses are small. Warped Gaussian processes: Snelson, Rasmussen &
Ghahramani (NeurIPS 2003); the bound is fixed here, as the exponential law's asymptote. The prediction is the median,
s (c + e^m). Chosen by cross-validation on training trials only (docs/mixing.md).
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

import numpy as np

from data_mixers.surrogates.base import Floats, PointSurrogate
from data_mixers.surrogates.gaussian_process import GaussianProcess
from data_mixers.sweep.trial import Goal


@dataclass
class WarpedGP(PointSurrogate):
    """`transform`, `noise`: of the GP. `gap`: how far the bound lies below the best trial, in sd of trials."""

    name: ClassVar[str] = "warped"
    transform: str = "quarter+root"
    noise: float | None = -5.0
    gap: float = 2.0
    goal: Goal = "min"

    _process: GaussianProcess = field(init=False, repr=False, default_factory=GaussianProcess)
    _bound: float = field(init=False, repr=False, default=0.0)

    @property
    def _sign(self) -> float:
        return 1.0 if self.goal == "min" else -1.0

    def _fit(self, X: Floats, y: Floats, tau: Floats | None, weights: Floats) -> None:
        turned = self._sign * y
        self._bound = float(turned.min() - self.gap * turned.std())
        logs = self.data._replace(y=np.log(turned - self._bound))
        if self._start is not None:
            self._process = self._start._process.refit(logs)
        else:
            self._process = GaussianProcess(transform=self.transform, noise=self.noise).fit(**logs._asdict())

    def _mean(self, X: Floats, tau: Floats | None) -> Floats:
        return self._sign * (self._bound + np.exp(self._process.mean(X, tau)))

    def observation_variance(self, X: Floats, tau: Floats | None) -> Floats:
        """Variance [m] of a new observation, to first order: e^2m times the process's with its noise."""
        latent = self._process.observation_variance(X, tau)
        return np.exp(2 * self._process.mean(X, tau)) * np.expm1(np.minimum(latent, 1.0))
