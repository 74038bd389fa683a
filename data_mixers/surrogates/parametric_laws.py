"""Laws of the loss by mixture, found by L-BFGS with exact gradients.

    exp       y = c + exp(b + t.x)                        Data Mixing Laws (Ye et al., ICLR 2025, arXiv 2403.16952)
    power     y = c + A (e0 + s.x)^-b                     diminishing returns in the amount of useful data
    transfer  y = c + A (e0 + sum_k s_k x_k^a_k)^-b       of other tasks' data so much counts as one's own
    bimix     y = sum_k A_k (x_k + e)^-a_k                BiMix (Ge et al., arXiv 2405.14908), summed over tasks

with A, e0, e, s, a, b > 0. They assume a loss: lower is better. For a score (goal "max") y' = max(y) + sd(y) - y is
fitted and mapped back. They say less than a GP inside the trials' range, and hold better outside: at other scales, at
corners of the simplex. Each minimises (mean squared error) / var(y) plus its own penalty.

transfer: effective data transferred, N_i + sum_j k_j N_j^a_j examples (arXiv 2508.11953 for mixtures in fine-tuning;
the form goes back to Hernandez et al., arXiv 2102.01293). There the target is one of the tasks, whose own factor and
exponent are 1; here it need not be, so every task has both. Other surrogates are handed a root or a log of the shares;
here each task's exponent says how fast more of it stops to help. Penalties chosen by cross-validation on training
trials; within a factor of 3 they change little.

bimix: the paper fits the loss on one domain by that domain's own share, A / x^a; here the target need not be one of the
tasks, so every task has its term, and e keeps a share of 0 finite (a term with a_k near 0 is a constant).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import ClassVar

import numpy as np
from scipy.optimize import minimize, nnls

from data_mixers.surrogates.base import Floats, PointSurrogate, amounts
from data_mixers.sweep.trial import Goal

Objective = Callable[[Floats], tuple[float, Floats]]
Limits = list[tuple[float | None, float | None]]
BEYOND = 0.25  # of the range of the trials' scores


@dataclass
class Law(PointSurrogate):
    """Base of the laws. theta = SHARED entries, then one block of K entries for each value of UNUSED."""

    SHARED: ClassVar[int]
    UNUSED: ClassVar[tuple[float, ...]]  # of each block: the entry of a task that no trial uses
    goal: Goal = "min"

    _theta: Floats | None = field(init=False, repr=False, default=None)
    _map: tuple[float, float] = field(init=False, repr=False, default=(0.0, 1.0))  # y = shift + scale * y'
    _ceiling: float = field(init=False, repr=False, default=0.0)  # of predictions, in units of y'

    @property
    def _fitted(self) -> Floats:
        if self._theta is None:
            raise RuntimeError(f"{type(self).__name__}: no law before fit, nor where all trials have the same score")
        return self._theta

    def _fit(self, X: Floats, y: Floats, tau: Floats | None, weights: Floats) -> None:
        X = amounts(X, tau)
        spread = float(y.std())
        unit = 1.0 if 0.02 <= spread <= 5 else spread  # the starts below are meant for losses; other units are scaled
        self._map = (0.0, unit) if self.goal == "min" else (float(y.max()) + spread, -unit)
        loss = (y - self._map[0]) / self._map[1]
        # A power of an amount near 0 may grow without bound: no mixture is predicted far worse than the worst trial.
        self._ceiling = float(loss.max()) + BEYOND * float(np.ptp(loss))
        weight = weights / weights.sum()
        used = np.flatnonzero(X.max(axis=0) > 0)  # a task that no trial uses has no part in the search
        K = X.shape[1]
        blocks = [self.SHARED + number * K + used for number in range(len(self.UNUSED))]
        inner = np.r_[np.arange(self.SHARED), *blocks]
        X = X[:, used]
        objective = self._objective(X, loss, weight / float(loss.var()))
        starts = self._starts(X, loss) if self._start is None else [self._start._fitted[inner]]
        options, limits = {"maxiter": 300}, self._limits(len(used))
        ends = [minimize(objective, x, jac=True, method="L-BFGS-B", bounds=limits, options=options) for x in starts]
        theta = np.r_[np.zeros(self.SHARED), np.repeat(self.UNUSED, K)]
        theta[inner] = min(ends, key=lambda end: end.fun).x
        self._theta = theta

    def _mean(self, X: Floats, tau: Floats | None) -> Floats:
        loss = np.minimum(self._law(self._fitted, amounts(X, tau)), self._ceiling)
        return self._map[0] + self._map[1] * loss

    def _law(self, theta: Floats, X: Floats) -> Floats:
        raise NotImplementedError

    def _objective(self, X: Floats, y: Floats, weight: Floats) -> Objective:
        raise NotImplementedError

    def _starts(self, X: Floats, y: Floats) -> list[Floats]:
        raise NotImplementedError

    def _limits(self, K: int) -> Limits | None:
        return None


@dataclass
class ExpLaw(Law):
    """theta = [c, b, t]; penalty 1e-4 |t|^2."""

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
    """theta = [c, log A, log b, log e0, log s_k]; penalty 1e-3 sum (log s_k + 3)^2."""

    name: ClassVar[str] = "power"
    SHARED: ClassVar[int] = 4
    UNUSED: ClassVar[tuple[float, ...]] = (-3.0,)

    def _useful(self, theta: Floats, X: Floats) -> Floats:
        """The amount of useful data [n], without e0."""
        return X @ np.exp(theta[4:])

    def _law(self, theta: Floats, X: Floats) -> Floats:
        base = np.exp(theta[3]) + self._useful(theta, X)
        return theta[0] + np.exp(theta[1] - np.exp(theta[2]) * np.log(base))

    def _objective(self, X: Floats, y: Floats, weight: Floats) -> Objective:
        def value(theta: Floats) -> tuple[float, Floats]:
            s, penalty = np.exp(theta[4:]), theta[4:] + 3
            squares, slopes, by_base = _power_error(theta, X @ s, y, weight)
            gradient = np.r_[slopes, (by_base @ X) * s + 2e-3 * penalty]
            return float(squares + 1e-3 * penalty @ penalty), gradient

        return value

    def _starts(self, X: Floats, y: Floats) -> list[Floats]:
        root = np.sqrt(X)
        deviation = root.std(axis=0) * y.std()
        with np.errstate(divide="ignore", invalid="ignore"):
            correlation = ((root - root.mean(axis=0)) * (y - y.mean())[:, None]).mean(axis=0) / deviation
        log_s = np.where(np.nan_to_num(correlation) < -0.3, 0.0, -3.0)
        starts = []
        for c, log_b, log_e0 in (
            (y.min() - 0.5, np.log(0.3), -3.0),
            (0.5 * y.min(), np.log(0.1), -4.0),
            (y.min() - 0.1, np.log(0.7), -2.0),
        ):
            base = (np.exp(log_e0) + X @ np.exp(log_s)) ** -np.exp(log_b)
            log_A = np.log(max(float(base @ (y - c) / (base @ base)), 1e-3))
            starts.append(np.r_[c, log_A, log_b, log_e0, log_s])
        return starts

    def _limits(self, K: int) -> Limits | None:
        return [(None, None), (-30.0, 30.0), (-5.0, 1.5), *[(-12.0, 6.0)] * (K + 1)]


def _power_error(theta: Floats, useful: Floats, y: Floats, weight: Floats) -> tuple[float, list[float], Floats]:
    """Squared error of c + A (e0 + useful)^-b, its slopes by theta[:4], and by the base [n]."""
    b, e0 = np.exp(theta[2]), np.exp(theta[3])
    base = e0 + useful
    logs = np.log(base)
    term = np.exp(np.minimum(theta[1] - b * logs, 50.0))
    error = theta[0] + term - y
    slope = 2 * weight * error
    by_term = slope * term
    by_base = -b * by_term / base
    return weight @ error**2, [slope.sum(), by_term.sum(), -b * (by_term @ logs), by_base.sum() * e0], by_base


@dataclass
class TransferLaw(PowerLaw):
    """theta = [c, log A, log b, log e0, log s_k, log a_k]; penalty (0.03 sum (log s_k + 3)^2 + 0.3 sum (log a_k -
    log 0.4)^2) / n. With all a_k = 1 it is the power law, from whose starts it is searched."""

    name: ClassVar[str] = "transfer"
    UNUSED: ClassVar[tuple[float, ...]] = (-3.0, np.log(0.4))

    def _useful(self, theta: Floats, X: Floats) -> Floats:
        log_s, log_a = np.split(theta[4:], 2)
        return X ** np.exp(log_a) @ np.exp(log_s)

    def _objective(self, X: Floats, y: Floats, weight: Floats) -> Objective:
        logs_x, pull_s, pull_a = np.log(np.maximum(X, 1e-300)), 0.03 / len(y), 0.3 / len(y)

        def value(theta: Floats) -> tuple[float, Floats]:
            log_s, log_a = np.split(theta[4:], 2)
            s, a = np.exp(log_s), np.exp(log_a)
            amount = np.where(X > 0, np.exp(a * logs_x), 0.0)
            squares, slopes, by_base = _power_error(theta, amount @ s, y, weight)
            off_s, off_a = log_s + 3, log_a - self.UNUSED[1]
            gradient = np.r_[
                slopes,
                (by_base @ amount) * s + 2 * pull_s * off_s,
                (by_base @ (amount * logs_x)) * s * a + 2 * pull_a * off_a,
            ]
            return float(squares + pull_s * off_s @ off_s + pull_a * off_a @ off_a), gradient

        return value

    def _starts(self, X: Floats, y: Floats) -> list[Floats]:
        return [np.r_[start, np.full(X.shape[1], self.UNUSED[1])] for start in super()._starts(X, y)]

    def _limits(self, K: int) -> Limits | None:
        # b <= 1 and e0 >= 0.02: else one outlier makes a pole beside the trials (DaMo's table, mixtures left out)
        return [(None, None), (-30.0, 30.0), (-5.0, 0.0), (-4.0, 6.0), *[(-12.0, 6.0)] * K, *[(-3.0, 1.0)] * K]


@dataclass
class BiMix(Law):
    """theta = [log e, log A_k, log a_k]; penalty (0.1 sum (log a_k - log 0.2)^2 + 0.01 sum (log A_k - log mean|y| /
    K)^2) / n. Started from non-negative least squares at three common exponents."""

    name: ClassVar[str] = "bimix"
    SHARED: ClassVar[int] = 1
    UNUSED: ClassVar[tuple[float, ...]] = (-700.0, np.log(0.2))  # A = 0: its term is 0

    def _law(self, theta: Floats, X: Floats) -> Floats:
        log_A, log_a = np.split(theta[1:], 2)
        return np.exp(log_A - np.exp(log_a) * np.log(X + np.exp(theta[0]))).sum(axis=1)

    def _objective(self, X: Floats, y: Floats, weight: Floats) -> Objective:
        pull_a, pull_A, level = 0.1 / len(y), 0.01 / len(y), np.log(np.abs(y).mean() / X.shape[1])

        def value(theta: Floats) -> tuple[float, Floats]:
            log_A, log_a = np.split(theta[1:], 2)
            a, e = np.exp(log_a), np.exp(theta[0])
            logs = np.log(X + e)
            term = np.exp(np.minimum(log_A - a * logs, 50.0))
            error = term.sum(axis=1) - y
            slope = 2 * weight * error
            off_a, off_A = log_a - self.UNUSED[1], log_A - level
            gradient = np.r_[
                -slope @ (term / (X + e) @ a) * e,
                slope @ term + 2 * pull_A * off_A,
                -a * (slope @ (term * logs)) + 2 * pull_a * off_a,
            ]
            return float(weight @ error**2 + pull_a * off_a @ off_a + pull_A * off_A @ off_A), gradient

        return value

    def _starts(self, X: Floats, y: Floats) -> list[Floats]:
        starts = []
        for a in (0.05, 0.15, 0.4):
            A, _ = nnls((X + 3e-3) ** -a, y)
            log_A = np.log(np.maximum(A, 1e-4 * np.abs(y).mean() + 1e-12))
            starts.append(np.r_[np.log(3e-3), log_A, np.full(X.shape[1], np.log(a))])
        return starts

    def _limits(self, K: int) -> Limits | None:
        return [(-12.0, 0.0), *[(-30.0, 30.0)] * K, *[(-7.0, 1.0)] * K]
