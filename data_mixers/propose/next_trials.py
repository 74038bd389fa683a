"""Which mixtures to try next: where the optimum may be, given all trials so far.

thompson   n draws of the whole surface from the posterior, each minimised; what one draw finds best is worth a look
           exactly as often as it may be the best (Thompson 1933)
ei         expected improvement, one after the other; each choice is believed at its mean (kriging believer), which
           takes its neighbourhood's uncertainty away from the next (Ginsbourger et al. 2010)

Both work on the joint posterior over a pool: random allowed mixtures, and the surroundings of the present optimum.
"""

from __future__ import annotations

from typing import Literal

import numpy as np
from scipy.stats import norm

from data_mixers.common.errors import MixError
from data_mixers.design.designs import candidate_mixtures
from data_mixers.fitting.surrogate_fits import SurrogateFits, objective_sd
from data_mixers.mixture.bounds import Bounds
from data_mixers.mixture.mixture import Floats, Mixture
from data_mixers.mixture.projection import project
from data_mixers.propose.optimizer import kl_to, minimize
from data_mixers.propose.proposal import Objective, standardised, target_weights

NEAR = 1e-3  # L1 distance below which two mixtures are the same trial


def next_batch(
    fits: SurrogateFits,
    objective: Objective = "mean",
    bounds: Bounds | None = None,
    n: int = 8,
    method: Literal["thompson", "ei"] = "thompson",
    seed: int = 0,
    *,
    prior: Mixture | None = None,
    kl: float = 0.0,
    repeats: bool = False,
    pool_size: int = 600,
) -> Floats:
    """[n, K] mixtures to run next. Mixtures that the trials have already are not proposed again unless `repeats`;
    a repeated choice is replaced by the allowed mixture farthest from all trials and choices."""
    if method not in ("thompson", "ei"):
        raise MixError(f"method {method!r}", do="thompson or ei")
    prior = (prior or Mixture(fits.names, np.full(len(fits.names), 1 / len(fits.names)))).over(fits.names)
    bounds = (bounds or Bounds()).over(fits.names)
    weight_J, rng = target_weights(fits, objective), np.random.default_rng(seed)

    def value(rows: Floats) -> Floats:
        g = standardised(fits, rows)
        return g.max(axis=0) if objective == "worst" else weight_J @ g

    random_rows = candidate_mixtures(bounds, pool_size // 2, prior=prior, seed=seed)
    tried = np.unique(
        np.vstack([f.arrays.X / f.arrays.X.sum(axis=1, keepdims=True) for f in fits.targets.values()]), axis=0
    )
    best_K, _ = minimize(
        value, bounds, np.vstack([random_rows, bounds.project(tried)]), kl=kl, prior_K=prior.shares, iterations=30
    )
    around = best_K + 0.15 * rng.dirichlet(np.ones(len(best_K)), pool_size // 2) * rng.choice(
        [0.1, 0.3, 1.0], (pool_size // 2, 1)
    )
    around = project(
        around / around.sum(axis=1, keepdims=True), bounds.lower(), bounds.upper(), bounds._intervals(), "l2"
    )
    pool = np.vstack([best_K, around, random_rows])
    mean_m = value(pool) + kl * kl_to(prior.shares, pool)
    covariance = _joint_covariance(fits, weight_J, pool)
    order = (
        thompson(mean_m, covariance, n, rng)
        if method == "thompson"
        else expected_improvement(mean_m, covariance, n, value(tried))
    )
    chosen: list[Floats] = []
    for index in order:
        row = pool[index]
        known = np.vstack([tried, *chosen]) if not repeats else np.vstack([np.full((1, len(row)), 9.0), *chosen])
        if np.abs(known - row).sum(axis=1).min() < NEAR:
            far = np.min(
                np.linalg.norm(np.sqrt(pool)[:, None] - np.sqrt(np.vstack([tried, *chosen]))[None], axis=2), axis=1
            )
            row = pool[int(np.argmax(far))]
        chosen.append(row)
    return np.stack(chosen)


def _joint_covariance(fits: SurrogateFits, weight_J: Floats, pool: Floats) -> Floats:
    """Posterior covariance [m, m] of the standardised objective (targets taken as independent)."""
    total = np.zeros((len(pool), len(pool)))
    for weight, sd, fitted in zip(weight_J, objective_sd(fits), fits.targets.values(), strict=True):
        if weight > 0 and fitted.model.constant is None:
            total += (weight / sd) ** 2 * fitted.model.carrier().covariance(pool)
    return total


def thompson(mean_m: Floats, covariance: Floats, n: int, rng: np.random.Generator) -> list[int]:
    """Indices (with repeats) of the minima of n joint draws."""
    values, vectors = np.linalg.eigh(covariance)
    root = vectors * np.sqrt(np.maximum(values, 0.0))
    draws = mean_m + rng.standard_normal((n, len(mean_m))) @ root.T
    return np.argmin(draws, axis=1).tolist()


def expected_improvement(mean_m: Floats, covariance: Floats, n: int, tried_value: Floats) -> list[int]:
    """n different indices by expected improvement over the best of `tried_value` and the mean's minimum."""
    best, covariance, chosen = float(min(tried_value.min(), mean_m.min())), covariance.copy(), []
    noise = 1e-6 * max(float(np.trace(covariance)) / len(mean_m), 1e-12)
    for _ in range(n):
        sd = np.sqrt(np.maximum(np.diag(covariance), 1e-18))
        z = (best - mean_m) / sd
        gain = sd * (z * norm.cdf(z) + norm.pdf(z))
        gain[chosen] = -1.0
        index = int(np.argmax(gain))
        chosen.append(index)
        column = covariance[:, index]
        covariance = covariance - np.outer(column, column) / (column[index] + noise)
        best = min(best, float(mean_m[index]))
    return chosen


def best_progress(
    fits: SurrogateFits, mixture: Mixture, grid: Floats, *, level: float = 0.9
) -> dict[str, tuple[float, float, float, float]]:
    """{target: (progress with the best predicted score, its mean, lower, upper)} for a mixture over a grid of progress.

    Needs fits of all checkpoints (`fit(..., progress="all")`); feeds `max_epochs` per task: a task whose score is best
    at half of the run should not be seen more often than it is by then.
    """
    rows = np.tile(mixture.over(fits.names).shares, (len(grid), 1))
    out = {}
    for name, fitted in fits.targets.items():
        if fitted.model.data["tau"] is None:
            raise MixError(
                f"{name} was fitted without progress", do='fit(..., progress="all") on trials with several checkpoints'
            )
        mean, lower, upper = fitted.model.predict(rows, progress=np.asarray(grid), level=level)
        at = int(np.argmin(mean) if fitted.goal == "min" else np.argmax(mean))
        out[name] = (float(grid[at]), float(mean[at]), float(lower[at]), float(upper[at]))
    return out
