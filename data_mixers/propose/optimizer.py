"""Minimising over allowed mixtures: many starts at once, a polish at the end, always exactly feasible.

    min_p  f(p) + kl * KL(p || prior)      over Bounds

f is any function of rows [m, K]; gradients are forward differences, since a stack may hold trees. Moves follow the
mirror gradient (p + d) (g - <g>) with a small d, which lets a share leave 0 and does not let small shares jump.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from data_mixers.mixture.bounds import Bounds
from data_mixers.mixture.mixture import Floats
from data_mixers.mixture.projection import project
from data_mixers.propose.interior_point import minimize_barrier

Value = Callable[[Floats], Floats]  # rows [m, K] -> [m]
STEP = 1e-4  # of forward differences
OFFSET = 1e-3  # d of the mirror gradient


def kl_to(prior_K: Floats, rows: Floats) -> Floats:
    """KL(p || prior) [m]; a prior share of 0 counts as 1e-6, so that the objective stays finite."""
    q = np.maximum(prior_K, 1e-6)
    return np.sum(np.where(rows > 0, rows * np.log(np.maximum(rows, 1e-300) / q), 0.0), axis=1)


def minimize(
    value: Value,
    bounds: Bounds,
    starts: Floats,
    *,
    kl: float = 0.0,
    prior_K: Floats | None = None,
    iterations: int = 60,
) -> tuple[Floats, float]:
    """(p [K], objective) of the best of all starts [m, K] (projected on the bounds first)."""
    bounds.check_feasible()
    low_K, high_K, groups = bounds.lower(), bounds.upper(), bounds._intervals()

    def onto(rows: Floats, metric: str = "l2") -> Floats:
        return project(rows, low_K, high_K, groups, metric)

    def total(rows: Floats) -> Floats:
        out = value(rows)
        return out if kl == 0 or prior_K is None else out + kl * kl_to(prior_K, rows)

    points = onto(np.atleast_2d(starts), "kl")
    best_m = total(points)
    keep = np.argsort(best_m, kind="stable")[:20]
    points, best_m = points[keep], best_m[keep]
    step_m = np.full(len(points), 0.5)
    for _ in range(iterations):
        active = np.flatnonzero(step_m > 1e-5)
        if not len(active):
            break
        here = points[active]
        gradient = _forward_differences(total, here, best_m[active])
        weight = np.clip(here, OFFSET, None)
        mean = np.sum(weight * gradient, axis=1, keepdims=True) / weight.sum(axis=1, keepdims=True)
        direction = -weight * (gradient - mean)
        size = np.abs(direction).sum(axis=1, keepdims=True)
        direction = direction / np.maximum(size, 1e-12)
        factors = np.array([2.0, 0.5, 0.1])
        moves = (step_m[active, None] * factors)[..., None] * direction[:, None]
        tries = onto((here[:, None] + moves).reshape(-1, here.shape[1]))
        values = total(tries).reshape(len(active), -1)
        choice = np.argmin(values, axis=1)
        reached = values[np.arange(len(active)), choice]
        better = reached < best_m[active] - 1e-12
        moved = tries.reshape(len(active), len(factors), -1)[np.arange(len(active)), choice]
        points[active] = np.where(better[:, None], moved, here)
        best_m[active] = np.where(better, reached, best_m[active])
        step_m[active] = np.where(better, step_m[active] * factors[choice], step_m[active] * 0.05)
    winner = int(np.argmin(best_m))
    return bounds.project_exact(points[winner]), float(best_m[winner])


def _forward_differences(value: Value, points: Floats, at_m: Floats) -> Floats:
    m, K = points.shape
    moved = np.repeat(points, K, axis=0)
    moved[np.arange(m * K), np.tile(np.arange(K), m)] += STEP
    moved = moved / moved.sum(axis=1, keepdims=True)
    return ((value(moved) - np.repeat(at_m, K)) / STEP).reshape(m, K)


def minimize_convex(
    value: Callable[[Floats], tuple[float, Floats]], bounds: Bounds, *, kl: float = 0.0, prior_K: Floats | None = None
) -> tuple[Floats, float]:
    """(p, objective) for a convex f given with its gradient, by the barrier method. Within 1e-6 of the optimum (tests
    compare a thousand random problems with a convex solver)."""
    bounds.check_feasible()
    K = len(bounds.lower())
    q = np.maximum(prior_K, 1e-6) if prior_K is not None else np.full(K, 1 / K)

    def total(p: Floats) -> tuple[float, Floats]:
        p = np.maximum(p, 1e-15)
        f, g = value(p)
        return (f, g) if kl == 0 else (f + kl * float(p @ np.log(p / q)), g + kl * (np.log(p / q) + 1))

    inner = np.clip(q / q.sum(), 1e-6, None)
    start = bounds.project(inner / inner.sum())
    found = bounds.project(np.maximum(minimize_barrier(total, bounds), 0.0), "l2")
    p, best = min(((row, total(row)[0]) for row in (start, found)), key=lambda pair: pair[1])
    return bounds.project_exact(p), best
