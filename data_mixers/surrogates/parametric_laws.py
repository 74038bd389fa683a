"""Two laws of the loss by mixture, found by L-BFGS with exact gradients from three starts.

    exp     y = c + exp(b + t.x)               Data Mixing Laws (Ye et al., ICLR 2025, arXiv 2403.16952)
    power   y = c + A (e0 + s.x) ** -a         diminishing returns in the amount of useful data; A, e0, s, a > 0

They assume a loss: lower is better. For a score (goal "max") y' = max(y) + sd(y) - y is fitted and mapped back. They
say less than a GP inside the trials' range, and hold better outside: at other scales, at corners of the simplex.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import ClassVar, Self

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import minimize

from data_mixers.surrogates.base import Floats, PointSurrogate
from data_mixers.sweep.trial import Goal

Objective = Callable[[Floats], tuple[float, Floats]]
BEYOND = 0.25  # of the range of the trials' scores


@dataclass
class Law(PointSurrogate):
    """Base of the laws. theta = SHARED entries, then one block of K entries for each value of UNUSED."""

    SHARED: ClassVar[int]
    UNUSED: ClassVar[tuple[float, ...]]  # of each block: the entry of a task that no trial uses
    goal: Goal = "min"

    _theta: Floats | None = field(init=False, repr=False, default=None)
    _map: tuple[float, float] = field(init=False, repr=False, default=(0.0, 1.0))  # y = shift + scale * y'
    _start: Floats | None = field(init=False, repr=False, default=None)
    _worst: float = field(init=False, repr=False, default=0.0)  # of the trials, in units of y'
    _range: float = field(init=False, repr=False, default=0.0)

    @property
    def _fitted(self) -> Floats:
        if self._theta is None:
            raise RuntimeError(f"{type(self).__name__}: no law before fit, nor where all trials have the same score")
        return self._theta

    def refit(self, X: Floats, y: Floats, groups: NDArray[np.int64], tau: Floats | None, weights: Floats) -> Self:
        model = self.clone()
        model._start = self._theta
        return model.fit(X, y, groups=groups, progress=tau, weights=weights)

    def _fit(self, X: Floats, y: Floats, tau: Floats | None, weights: Floats) -> None:
        X = X if tau is None else X * tau[:, None]
        spread = float(y.std())
        unit = 1.0 if 0.02 <= spread <= 5 else spread  # the starts below are meant for losses; other units are scaled
        self._map = (0.0, unit) if self.goal == "min" else (float(y.max()) + spread, -unit)
        loss = (y - self._map[0]) / self._map[1]
        self._worst, self._range = float(loss.max()), float(np.ptp(loss))
        weight = weights / weights.sum()
        used = np.flatnonzero(X.max(axis=0) > 0)  # a task that no trial uses has no part in the search
        K = X.shape[1]
        blocks = [self.SHARED + number * K + used for number in range(len(self.UNUSED))]
        inner = np.r_[np.arange(self.SHARED), *blocks]
        X = X[:, used]
        objective = self._objective(X, loss, weight / float(loss.var()))
        starts = self._starts(X, loss) if self._start is None else [self._start[inner]]
        found = [
            minimize(objective, start, jac=True, method="L-BFGS-B", bounds=self._limits(len(start)),
                     options={"maxiter": 300})
            for start in starts
        ]  # fmt: skip
        theta = np.r_[np.zeros(self.SHARED), np.repeat(self.UNUSED, K)]
        theta[inner] = min(found, key=lambda end: end.fun).x
        self._theta = theta

    def _mean(self, X: Floats, tau: Floats | None) -> Floats:
        X = X if tau is None else X * tau[:, None]
        # A power of an amount near 0 may grow without bound: no mixture is predicted far worse than the worst trial.
        worst = self._worst + BEYOND * self._range
        return self._map[0] + self._map[1] * np.minimum(self._law(self._fitted, X), worst)

    def _law(self, theta: Floats, X: Floats) -> Floats:
        raise NotImplementedError

    def _objective(self, X: Floats, y: Floats, weight: Floats) -> Objective:
        raise NotImplementedError

    def _starts(self, X: Floats, y: Floats) -> list[Floats]:
        raise NotImplementedError

    def _limits(self, size: int) -> list[tuple[float | None, float | None]] | None:
        return None


@dataclass
class ExpLaw(Law):
    """y = c + exp(b + t.x); minimises mean squared error / var(y) + 1e-4 |t|^2. theta = [c, b, t]."""

    name: ClassVar[str] = "exp"
    SHARED: ClassVar[int] = 2
    UNUSED: ClassVar[tuple[float, ...]] = (0.0,)

    def _law(self, theta: Floats, X: Floats) -> Floats:
        return theta[0] + np.exp(np.clip(theta[1] + X @ theta[2:], -20, 5))

    def value_and_gradient(self, p: Floats) -> tuple[float, Floats]:
        """Prediction and its gradient at one mixture [K]; convex in p where the goal is min."""
        theta = self._fitted
        raw = float(theta[1] + p @ theta[2:])
        power = np.exp(np.clip(raw, -20, 5))
        mean = self._map[0] + self._map[1] * (theta[0] + power)
        return float(mean), self._map[1] * power * theta[2:] * (-20 < raw < 5)

    def _objective(self, X: Floats, y: Floats, weight: Floats) -> Objective:
        def value(theta: Floats) -> tuple[float, Floats]:
            raw = theta[1] + X @ theta[2:]
            power = np.exp(np.clip(raw, -20, 5))
            error = theta[0] + power - y
            slope = 2 * weight * error
            inner = slope * power * ((raw > -20) & (raw < 5))
            gradient = np.r_[slope.sum(), inner.sum(), inner @ X + 2e-4 * theta[2:]]
            return float(weight @ error**2 + 1e-4 * theta[2:] @ theta[2:]), gradient

        return value

    def _starts(self, X: Floats, y: Floats) -> list[Floats]:
        starts = []
        for c in (y.min() - 0.05, 0.8 * y.min(), 0.4 * y.min()):
            target = np.log(np.maximum(y - c, 1e-3))
            centre = X.mean(axis=0)
            t = np.linalg.solve(
                (X - centre).T @ (X - centre) + 1e-2 * np.eye(X.shape[1]), (X - centre).T @ (target - target.mean())
            )
            starts.append(np.r_[c, target.mean() - centre @ t, t])
        return starts


@dataclass
class PowerLaw(Law):
    """y = c + A (e0 + s.x)^-a; penalty 1e-3 sum (log s + 3)^2. theta = [c, log A, log a, log e0, log s]."""

    name: ClassVar[str] = "power"
    SHARED: ClassVar[int] = 4
    UNUSED: ClassVar[tuple[float, ...]] = (-3.0,)

    def _law(self, theta: Floats, X: Floats) -> Floats:
        base = np.exp(theta[3]) + X @ np.exp(theta[4:])
        return theta[0] + np.exp(theta[1] - np.exp(theta[2]) * np.log(base))

    def _objective(self, X: Floats, y: Floats, weight: Floats) -> Objective:
        def value(theta: Floats) -> tuple[float, Floats]:
            a, e0, s = np.exp(theta[2]), np.exp(theta[3]), np.exp(theta[4:])
            base = e0 + X @ s
            logs = np.log(base)
            term = np.exp(np.minimum(theta[1] - a * logs, 50.0))
            error = theta[0] + term - y
            slope = 2 * weight * error
            by_term = slope * term
            by_base = -a * by_term / base
            penalty = theta[4:] + 3
            gradient = np.r_[
                slope.sum(),
                by_term.sum(),
                -a * (by_term @ logs),
                by_base.sum() * e0,
                (by_base @ X) * s + 2e-3 * penalty,
            ]
            return float(weight @ error**2 + 1e-3 * penalty @ penalty), gradient

        return value

    def _starts(self, X: Floats, y: Floats) -> list[Floats]:
        root = np.sqrt(X)
        deviation = root.std(axis=0) * y.std()
        with np.errstate(divide="ignore", invalid="ignore"):
            correlation = ((root - root.mean(axis=0)) * (y - y.mean())[:, None]).mean(axis=0) / deviation
        log_s = np.where(np.nan_to_num(correlation) < -0.3, 0.0, -3.0)
        starts = []
        for c, log_a, log_e0 in (
            (y.min() - 0.5, np.log(0.3), -3.0),
            (0.5 * y.min(), np.log(0.1), -4.0),
            (y.min() - 0.1, np.log(0.7), -2.0),
        ):
            base = (np.exp(log_e0) + X @ np.exp(log_s)) ** -np.exp(log_a)
            log_A = np.log(max(float(base @ (y - c) / (base @ base)), 1e-3))
            starts.append(np.r_[c, log_A, log_a, log_e0, log_s])
        return starts

    def _limits(self, size: int) -> list[tuple[float | None, float | None]]:
        return [(None, None), (-30.0, 30.0), (-5.0, 1.5), *[(-12.0, 6.0)] * (size - 3)]
