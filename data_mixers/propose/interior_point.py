"""Interior-point minimisation of a smooth convex function over a bounded simplex with groups.

    min_p f(p) - mu sum log(b - A p)   s.t.  sum p = 1        for mu = 0.1, 0.01, ..., 1e-12

Newton steps with backtracking for each mu (Boyd & Vandenberghe 2004, ch. 11); the rows of A are the floors, caps and
group limits, so m of them leave the optimum by at most m mu. The Hessian of f comes from central differences of its
gradient: K <= a few dozen tasks. Where the limits leave no room at all (caps that add up to 1, a group held at one
value) they are widened by 1e-9 and the result is moved back by the caller.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from data_mixers.mixture.bounds import Bounds
from data_mixers.mixture.mixture import Floats
from data_mixers.mixture.projection import interior_point

Smooth = Callable[[Floats], tuple[float, Floats]]  # p [K] -> value, gradient [K]
FIXED = 1e-11  # a task whose floor and cap are this near has no freedom
ROOM = 1e-7  # an interior point nearer to its limits than this counts as having no room
WIDER = 1e-9
LAST = 1e-12
STEP = 1e-5  # of central differences, relative to the entry


def minimize_barrier(value: Smooth, bounds: Bounds) -> Floats:
    """p [K] near the optimum: inside the limits (widened by 1e-9 where there is no room), sum 1."""
    low_K, high_K, groups = bounds.lower(), bounds.upper(), bounds._intervals()
    p = np.clip(interior_point(low_K, high_K, groups), low_K, high_K)
    free = high_K - low_K > FIXED
    if free.sum() < 2:
        return bounds.project_exact(p)
    A, b = _rows(low_K, high_K, groups, free)
    fixed_part = np.where(free, 0.0, low_K)
    A, b = A[:, free], b - A @ fixed_part
    x, total = p[free], 1.0 - fixed_part.sum()
    x = x + (total - x.sum()) / len(x)
    if np.min(b - A @ x) < ROOM:
        b = b + WIDER + np.maximum(0.0, -(b - A @ x))

    def inside(x: Floats) -> Floats:
        whole = fixed_part.copy()
        whole[free] = x
        return whole

    mu = 0.1
    while mu >= LAST:
        x = _newton(lambda y: value(inside(y)), x, A, b, mu, free)
        mu *= 0.1
    return inside(x)


def _rows(
    low_K: Floats, high_K: Floats, groups: list[tuple[NDArray[np.bool_], float, float]], free: NDArray[np.bool_]
) -> tuple[Floats, Floats]:
    """A [m, K], b [m] of A p <= b for what can bind: limits of free tasks, and groups with a free member."""
    K = len(low_K)
    A, b = [-np.eye(K)[free], np.eye(K)[free]], [-low_K[free], high_K[free]]
    for mask, low, high in groups:
        if np.any(mask & free):
            A.append(np.stack([mask.astype(float), -mask.astype(float)]))
            b.append(np.array([high, -low]))
    return np.vstack(A), np.concatenate(b)


def _newton(value: Smooth, x: Floats, A: Floats, b: Floats, mu: float, free: NDArray[np.bool_]) -> Floats:
    """Minimum of value - mu sum log(b - A x) with sum x kept, from x inside."""

    def barrier(x: Floats) -> float:
        slack = b - A @ x
        return np.inf if slack.min() <= 0 else value(x)[0] - mu * float(np.log(slack).sum())

    here = barrier(x)
    for _ in range(40):
        slack = b - A @ x
        gradient = value(x)[1][free] + mu * A.T @ (1 / slack)
        hessian = _hessian(value, x, slack, A, free) + mu * (A / slack[:, None] ** 2).T @ A
        scale = 1 / np.sqrt(np.maximum(np.diag(hessian), 1e-300))
        scaled = hessian * scale * scale[:, None] + 1e-13 * np.eye(len(x))
        system = np.block([[scaled, scale[:, None]], [scale[None], np.zeros((1, 1))]])
        step = scale * np.linalg.lstsq(system, np.r_[-gradient * scale, 0.0], rcond=None)[0][:-1]
        step -= step.mean()
        slope = float(gradient @ step)
        if slope > -1e-3 * mu or not np.isfinite(slope):  # the Newton decrement: far below what mu leaves open
            return x
        toward = A @ step
        limit = np.min(np.where(toward > 0, slack / np.where(toward > 0, toward, 1.0), np.inf))
        size = min(1.0, 0.99 * limit)
        while size > 1e-12:
            reached = barrier(x + size * step)
            if reached <= here + 0.1 * size * slope:
                break
            size *= 0.5
        else:
            return x
        x, here = x + size * step, reached
    return x


def _hessian(value: Smooth, x: Floats, slack: Floats, A: Floats, free: NDArray[np.bool_]) -> Floats:
    """[K, K] of `value` by central differences of the gradient, symmetric; steps stay inside the limits."""
    size = len(x)
    out = np.empty((size, size))
    for k in range(size):
        column = np.abs(A[:, k])
        room = np.min(np.where(column > 0, slack, np.inf))
        h = min(STEP * max(abs(x[k]), 1e-3), 0.3 * room)
        moved = np.zeros(size)
        moved[k] = h
        out[k] = (value(x + moved)[1][free] - value(x - moved)[1][free]) / (2 * h)
    return 0.5 * (out + out.T)
