"""Gaussian process of the score over transformed shares: the surrogate that knows what it does not know.

    k = s_f^2 (1 + r + r^2/3) e^-r  +  s_l^2 z.z'/d  +  s_n^2 delta,     r^2 = 5 sum_k (dz_k / l_k)^2

z = phi(x) standardised by column, y standardised; Matern 5/2 with one length per task, plus a linear part. MAP by
L-BFGS with exact gradients under log-normal priors (log l ~ N(log sqrt d, 1), the variances wide), at 192 of the trials
where there are more: a step of the search costs n^3, the posterior of all trials costs it once. phi is a log or a
root: raw shares are the usual mistake (a share of 0.001 against 0 matters as much as 0.1 against 0.2).
Rasmussen & Williams (2006), ch. 5. Sampling is exact (joint posterior), and leaving trials out is closed form.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import ClassVar

import numpy as np
from numpy.typing import NDArray
from scipy.linalg import cho_solve, solve_triangular
from scipy.linalg.lapack import dpotrf, dpotri, dpotrs  # type: ignore[attr-defined]  # scipy makes these names at run time
from scipy.optimize import minimize

from data_mixers.surrogates.base import Floats, PointSurrogate, grouped_folds, shares

TRANSFORMS: dict[str, Callable[[Floats], Floats]] = {
    "root": np.sqrt,
    "quarter": lambda x: x**0.25,
    "log1": lambda x: np.log(x + 1e-3),
    "log3": lambda x: np.log(x + 3e-3),
    "quarter+root": lambda x: np.hstack([x**0.25, np.sqrt(x)]),  # two lengths a task: small and large shares apart
    "log1+root": lambda x: np.hstack([np.log(x + 1e-3), np.sqrt(x)]),
}
JITTER = 1e-8
SEARCH = 192  # trials at which lengths and variances are looked for; all trials make the posterior
LIMITS = ((-3.0, 6.0), (-6.0, 6.0), (-10.0, 6.0), (-12.0, 1.0))  # log l, log s_f^2, log s_l^2, log s_n^2


@dataclass
class GaussianProcess(PointSurrogate):
    """`transform`: a name of TRANSFORMS (log1, log3: offsets 1e-3, 3e-3). `noise`: centre of the prior of
    log s_n^2: -5 suits losses, -0.5 benchmark scores; None: a stack chooses (by itself: -5).

    `tied`: sd of the tasks' log lengths around one common length, itself N(log sqrt d, 1); None: each by itself,
    N(log sqrt d, 1). With few or noisy trials independent lengths overfit (ADMIRE 3B, CV rho: 76.5, tied 0.1: 79.9).
    `iterations`: of L-BFGS. The posterior is of the noise-free score; predict adds the noise.
    """

    name: ClassVar[str] = "gp"
    transform: str = "log3"
    noise: float | None = -5.0
    iterations: int = 60
    tied: float | None = None

    theta: Floats | None = field(init=False, repr=False, default=None)  # [log l_d, log s_f^2, log s_l^2, log s_n^2]
    _active: int = field(init=False, repr=False, default=1)
    _standard: tuple[Floats, Floats, float, float] | None = field(init=False, repr=False, default=None)
    _z: Floats = field(init=False, repr=False, default_factory=lambda: np.zeros((0, 0)))
    _chol: Floats = field(init=False, repr=False, default_factory=lambda: np.zeros((0, 0)))
    _alpha: Floats = field(init=False, repr=False, default_factory=lambda: np.zeros(0))

    @property
    def _fitted(self) -> tuple[Floats, tuple[Floats, Floats, float, float]]:
        """theta, and (mean, scale) of the features and of y."""
        if self.theta is None or self._standard is None:
            raise RuntimeError("GaussianProcess: no posterior before fit, nor where all trials have the same score")
        return self.theta, self._standard

    def features(self, X: Floats, tau: Floats | None) -> Floats:
        """z [n, d], standardised as the trials are."""
        mean, scale, _, _ = self._fitted[1]
        return (self._raw_features(X, tau) - mean) / scale

    def _raw_features(self, X: Floats, tau: Floats | None) -> Floats:
        columns = TRANSFORMS[self.transform](X)
        if tau is None:
            return columns
        return np.hstack([columns, TRANSFORMS[self.transform](X * tau[:, None])])  # the mixture, and the amounts seen

    def _fit(self, X: Floats, y: Floats, tau: Floats | None, weights: Floats) -> None:
        raw = self._raw_features(X, tau)
        deviation = raw.std(axis=0)
        mean, scale = raw.mean(axis=0), np.where(deviation < 1e-6, 1.0, deviation)
        self._standard = (mean, scale, float(y.mean()), float(y.std()))
        self._z = (raw - mean) / scale
        target = (y - self._standard[2]) / self._standard[3]
        noise_scale = weights.mean() / weights
        d = self._z.shape[1]
        self._active = max(1, int(np.sum(deviation >= 1e-6)))  # a task that no trial uses counts for nothing
        length, noise = np.full(d, 0.5 * np.log(self._active)), -5.0 if self.noise is None else self.noise
        centre = np.r_[length, 0.0, 0.0, noise]
        spread = np.r_[np.ones(d), 2.0, 2.0, 2.0]
        start, iterations = np.r_[length, 0.0, -1.0, noise], self.iterations
        if self._start is not None:
            start, iterations = self._start.theta, min(iterations, 15)
        limits = [LIMITS[0]] * d + list(LIMITS[1:])
        some = _some_trials(len(y))
        z, seen, noise_of = self._z[some], target[some], noise_scale[some]
        linear = z @ z.T / self._active

        def value(theta: Floats) -> tuple[float, Floats]:
            value, gradient = _negative_log_likelihood(theta, z, linear, seen, noise_of)
            prior, slope = _negative_log_prior(theta, centre, spread, self.tied, deviation >= 1e-6)
            return value + prior, gradient + slope

        if iterations > 0:
            options = {"maxiter": iterations}
            start = minimize(value, start, jac=True, method="L-BFGS-B", bounds=limits, options=options).x
        self.theta = start
        matern, _ = _matern(self._z / np.exp(start[:d]))
        kernel = np.exp(start[d]) * matern + np.exp(start[d + 1]) * (self._z @ self._z.T / self._active)
        kernel[np.diag_indices_from(kernel)] += np.exp(start[d + 2]) * noise_scale + JITTER
        self._chol = np.asarray(np.linalg.cholesky(kernel), dtype=np.float64)
        self._alpha = cho_solve((self._chol, True), target)

    def _cross(self, z: Floats) -> Floats:
        """Covariance [m, n] of the noise-free score at z with the trials'."""
        theta, d = self._fitted[0], self._z.shape[1]
        length = np.exp(theta[:d])
        matern, _ = _matern(z / length, self._z / length)
        return np.exp(theta[d]) * matern + np.exp(theta[d + 1]) * (z @ self._z.T) / self._active

    def _mean(self, X: Floats, tau: Floats | None) -> Floats:
        _, (_, _, centre, scale) = self._fitted
        return centre + scale * (self._cross(self.features(X, tau)) @ self._alpha)

    def variance(self, X: Floats, tau: Floats | None = None) -> Floats:
        """Posterior variance [m] of the noise-free score, in units of y squared."""
        (theta, (_, _, _, scale)), z, d = self._fitted, self.features(X, tau), self._z.shape[1]
        half = solve_triangular(self._chol, self._cross(z).T, lower=True, check_finite=False)
        prior = np.exp(theta[d]) + np.exp(theta[d + 1]) * np.sum(z**2, axis=1) / self._active
        return scale**2 * np.maximum(prior - np.sum(half**2, axis=0), 0.0)

    def observation_variance(self, X: Floats, tau: Floats | None) -> Floats:
        """Variance [m] of a new observation, in units of y squared; X as it comes."""
        if self.constant is not None:
            return np.zeros(len(X))
        return self.variance(shares(X, renormalize=True), tau) + self.noise_variance

    def covariance(self, X: Floats) -> Floats:
        """Joint posterior covariance [m, m] of the noise-free score, in units of y squared."""
        (theta, (_, _, _, scale)), rows = self._fitted, shares(X, renormalize=True)
        z, d = self.features(rows, self._tau(None, len(rows))), self._z.shape[1]
        half = solve_triangular(self._chol, self._cross(z).T, lower=True, check_finite=False)
        matern, _ = _matern(z / np.exp(theta[:d]))
        joint = np.exp(theta[d]) * matern + np.exp(theta[d + 1]) * (z @ z.T) / self._active - half.T @ half
        return scale**2 * 0.5 * (joint + joint.T)

    def difference_variance(self, a: Floats, b: Floats) -> float:
        """Posterior variance of score(a) - score(b), noise-free, in units of y squared."""
        joint = self.covariance(np.stack([a, b]))
        return max(0.0, float(joint[0, 0] + joint[1, 1] - 2 * joint[0, 1]))

    @property
    def noise_variance(self) -> float:
        """Variance of the noise, in units of y squared."""
        theta, (_, _, _, scale) = self._fitted
        return float(np.exp(theta[-1])) * scale**2

    def left_out(self, folds: list[NDArray[np.intp]]) -> tuple[Floats, Floats]:
        """Mean and sd [n] of each trial's (noisy) score from the trials of the other folds, hyper-parameters kept:
        mean_f = y_f - (K^-1_ff)^-1 (K^-1 y)_f, covariance (K^-1_ff)^-1."""
        if self.constant is not None:
            return np.full(len(self.data.y), self.constant), np.zeros(len(self.data.y))
        _, (_, _, centre, scale) = self._fitted
        inverse = _inverse(self._chol)
        target = (self.data.y - centre) / scale
        mean, variance = np.empty(len(target)), np.empty(len(target))
        for held in folds:
            block = np.linalg.inv(inverse[np.ix_(held, held)])
            mean[held] = target[held] - block @ self._alpha[held]
            variance[held] = np.diag(block)
        return centre + scale * mean, scale * np.sqrt(np.maximum(variance, 0.0))

    def _cross_validate(self) -> Floats:
        mean, sigma = self.left_out(grouped_folds(self.data.groups, 5, seed=0))
        self._ratios = np.abs(self.data.y - mean) / np.maximum(sigma, 1e-300)
        return self._ratios

    def _sigma(self, X: Floats, tau: Floats | None) -> Floats:
        return np.sqrt(self.observation_variance(X, tau))

    def sample(self, X: Floats, size: int, seed: int) -> Floats:
        """[size, m] exact joint draws of the noise-free score."""
        rows = shares(X, renormalize=self.renormalize)
        if self.constant is not None:
            return np.full((size, len(rows)), self.constant)
        values, vectors = np.linalg.eigh(self.covariance(rows))
        root = vectors * np.sqrt(np.maximum(values, 0.0))
        return self.mean(rows) + np.random.default_rng(seed).standard_normal((size, len(rows))) @ root.T


def _some_trials(n: int) -> NDArray[np.intp]:
    """The trials that the search looks at, ascending: all, or SEARCH of them drawn evenly."""
    if n <= SEARCH:
        return np.arange(n)
    return np.sort(np.random.default_rng(0).permutation(n)[:SEARCH])


def _matern(a: Floats, b: Floats | None = None) -> tuple[Floats, Floats]:
    """Matern 5/2 correlation [m, n] of scaled features, and (1 + r) e^-r, of which its slope is made."""
    other = a if b is None else b
    cross = a @ other.T
    cross *= 2
    r = np.sum(a**2, axis=1)[:, None] + np.sum(other**2, axis=1)
    r -= cross  # in place from here on: with many trials, fresh memory is what costs
    np.maximum(r, 0.0, out=r)
    r *= 5
    np.sqrt(r, out=r)
    if b is None:
        r[np.diag_indices_from(r)] = 0.0
    decay = np.exp(np.negative(r, out=cross), out=cross)
    slope = 1 + r
    slope *= decay
    r *= r
    r /= 3
    r *= decay
    r += slope
    return r, slope


def _inverse(chol: Floats) -> Floats:
    """Of the matrix whose lower Cholesky factor this is, with zeros above the diagonal."""
    lower, _ = dpotri(chol, lower=1)
    inverse = lower + lower.T
    inverse[np.diag_indices_from(inverse)] = np.diag(lower)
    return inverse


def _negative_log_prior(
    theta: Floats, centre: Floats, spread: Floats, tied: float | None, live: NDArray[np.bool_]
) -> tuple[float, Floats]:
    """Normal around `centre`, and its gradient; the `live` lengths (among all but the last three) tied to a common one
    where asked: deviations u ~ N(0, tied^2 I + 1 1'), whose precision is (I - 1 1' / (d + tied^2)) / tied^2."""
    off = (theta - centre) / spread
    slope = off / spread
    if tied is None:
        return float(0.5 * off @ off), slope
    tied_to = np.r_[live, False, False, False]
    lengths = off[tied_to] * spread[tied_to]
    slope[tied_to] = (lengths - lengths.sum() / (len(lengths) + tied**2)) / tied**2
    return float(0.5 * lengths @ slope[tied_to] + 0.5 * off[~tied_to] @ off[~tied_to]), slope


def _negative_log_likelihood(
    theta: Floats, z: Floats, linear: Floats, y: Floats, noise_scale: Floats
) -> tuple[float, Floats]:
    n, d = z.shape
    s_f, s_l, s_n = np.exp(theta[d:])
    w = z / np.exp(theta[:d])
    matern, slope = _matern(w)
    kernel = s_f * matern + s_l * linear
    kernel[np.diag_indices(n)] += s_n * noise_scale + JITTER
    chol, info = dpotrf(kernel, lower=1, clean=1)
    if info != 0:
        return 1e25, np.zeros_like(theta)
    alpha, _ = dpotrs(chol, y, lower=1)
    inverse = _inverse(chol)
    value = 0.5 * y @ alpha + np.log(np.diag(chol)).sum()
    outer = inverse - np.outer(alpha, alpha)  # dNLL/dK * 2
    by_length = outer * slope
    # sum_ij H_ij (w_ik - w_jk)^2 = 2 (sum_i h_i w_ik^2 - (W' H W)_kk), with h the row sums of H
    quadratic = 2 * (by_length.sum(axis=1) @ w**2 - np.sum((by_length @ w) * w, axis=0))
    gradient = np.r_[
        0.5 * s_f * 5.0 / 3.0 * quadratic,
        0.5 * s_f * np.sum(outer * matern),
        0.5 * s_l * np.sum(outer * linear),
        0.5 * s_n * np.sum(np.diag(outer) * noise_scale),
    ]
    return float(value), gradient
