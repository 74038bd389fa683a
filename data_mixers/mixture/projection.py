"""The geometry under Bounds: projection on box, simplex and groups; the smallest violation; a point inside.

All functions take l, u [K] and groups as (mask [K], low, high). `project` works on many rows [n, K] at once, since the
optimiser of propose/ moves twenty starts together.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from data_mixers.mixture.mixture import Floats

Interval = tuple[np.ndarray, float, float]
NOTHING = -1e3  # log of a share of 0: grows only once all positive shares stand at their caps


def project(q: Floats, low_K: Floats, high_K: Floats, groups: list[Interval], metric: str) -> Floats:
    """Nearest rows [n, K] to q [n, K] in KL or L2. The bounds must be feasible."""
    if metric not in ("kl", "l2"):
        raise ValueError(f"metric {metric!r}: kl or l2")
    start = _logs(q) if metric == "kl" else np.array(q, dtype=np.float64)
    if not groups or np.sum([mask for mask, _, _ in groups], axis=0).max() <= 1:  # disjoint
        return _with_groups(start, low_K, high_K, groups, metric)
    return np.stack([_dykstra(row, low_K, high_K, groups, metric) for row in start])


def _logs(p: Floats) -> Floats:
    return np.where(p > 0, np.log(np.maximum(p, 1e-300)), NOTHING)


def _shares(start: Floats, m: Floats, low_K: Floats, high_K: Floats, metric: str) -> Floats:
    moved = start + m[:, None]
    return np.clip(np.exp(np.minimum(moved, 1.0)) if metric == "kl" else moved, low_K, high_K)


def _bisected(
    start: Floats, low_K: Floats, high_K: Floats, metric: str, over: Callable[[Floats], NDArray[np.bool_]]
) -> Floats:
    """Rows clip(f(start + m), l, u) with the largest m, by bisection, whose rows are not `over` ([n])."""
    span = 1.0 + (np.abs(start).max() if start.size else 0.0) + (60.0 if metric == "kl" else 1.0)
    left, right = np.full(len(start), -span), np.full(len(start), span)
    for _ in range(70):
        middle = 0.5 * (left + right)
        beyond = over(_shares(start, middle, low_K, high_K, metric))
        right, left = np.where(beyond, middle, right), np.where(beyond, left, middle)
    return _shares(start, left, low_K, high_K, metric)


def _level(start: Floats, low_K: Floats, high_K: Floats, target_n: Floats, metric: str) -> Floats:
    """Rows clip(f(start + m), l, u) that add up to their targets; exact finish."""
    if start.shape[1] == 0:
        return start
    rows = _bisected(start, low_K, high_K, metric, lambda rows: rows.sum(axis=1) > target_n)
    # Bisection leaves rounding errors: hand them to the entries that are free to move, in proportion to their room.
    for _ in range(2):
        gap_n = target_n - rows.sum(axis=1)
        room = np.where(gap_n[:, None] > 0, high_K - rows, rows - low_K)
        free = np.where((rows > low_K) & (rows < high_K), room, 0.0)
        free = np.where(free.sum(axis=1, keepdims=True) >= np.abs(gap_n)[:, None], free, room)
        total_n = free.sum(axis=1)
        rows = rows + np.where(total_n > 0, gap_n / np.where(total_n > 0, total_n, 1.0), 0.0)[:, None] * free
        rows = np.clip(rows, low_K, high_K)
    return rows


def _with_groups(start: Floats, low_K: Floats, high_K: Floats, groups: list[Interval], metric: str) -> Floats:
    """Disjoint groups: a common m for all, but a group whose sum would leave its interval is settled at the limit."""
    ones = np.ones(len(start))
    if not groups:
        return _level(start, low_K, high_K, ones, metric)
    alone = ~np.any([mask for mask, _, _ in groups], axis=0)
    limits = [(mask, max(low, low_K[mask].sum()), min(high, high_K[mask].sum())) for mask, low, high in groups]

    def over(shares: Floats) -> NDArray[np.bool_]:
        total_n = shares[:, alone].sum(axis=1)
        for mask, low, high in limits:
            total_n = total_n + np.clip(shares[:, mask].sum(axis=1), low, high)
        return total_n > 1.0

    shares = _bisected(start, low_K, high_K, metric, over)
    # Sums of the groups, and of the tasks in no group, then each part by itself with its sum given.
    if alone.any():
        limits.append((alone, low_K[alone].sum(), high_K[alone].sum()))
    parts = [mask for mask, _, _ in limits]
    floor_P, roof_P = np.array([low for _, low, _ in limits]), np.array([high for _, _, high in limits])
    sums = np.clip(np.stack([shares[:, part].sum(axis=1) for part in parts], axis=1), floor_P, roof_P)
    gap_n = 1.0 - sums.sum(axis=1)
    room = np.where(gap_n[:, None] > 0, roof_P - sums, sums - floor_P)
    total_n = room.sum(axis=1)
    sums = sums + np.where(total_n > 0, gap_n / np.where(total_n > 0, total_n, 1.0), 0.0)[:, None] * room
    out = np.empty_like(shares)
    for position, part in enumerate(parts):
        out[:, part] = _level(start[:, part], low_K[part], high_K[part], sums[:, position], metric)
    return out


def _dykstra(start_K: Floats, low_K: Floats, high_K: Floats, groups: list[Interval], metric: str) -> Floats:
    """Overlapping groups: Dykstra's alternating projections (Bregman form for KL), then an exact finish by LP."""

    def onto_group(x_K: Floats, interval: Interval) -> Floats:
        mask, low, high = interval
        out = x_K.copy()
        if metric == "kl":
            total = np.exp(np.minimum(x_K[mask], 50.0)).sum()
            out[mask] += (
                np.log(max(low, 1e-300) / total) if total < low else (np.log(high / total) if total > high else 0.0)
            )
        else:
            total = x_K[mask].sum()
            out[mask] += (np.clip(total, low, high) - total) / mask.sum()
        return out

    def onto_box(x_K: Floats) -> Floats:
        p_K = _level(x_K[None], low_K, high_K, np.ones(1), metric)[0]
        return _logs(p_K) if metric == "kl" else p_K

    x_K, memory = start_K.copy(), [np.zeros_like(start_K) for _ in range(len(groups) + 1)]
    for _ in range(500):
        before_K = x_K
        for position in range(len(groups) + 1):
            y_K = x_K + memory[position]
            x_K = onto_group(y_K, groups[position]) if position < len(groups) else onto_box(y_K)
            memory[position] = np.maximum(y_K - x_K, NOTHING)
        if np.abs(x_K - before_K).max() < 1e-11:
            break
    return _nearest_by_lp(np.exp(np.minimum(x_K, 0.0)) if metric == "kl" else x_K, low_K, high_K, groups)


def _nearest_by_lp(p_K: Floats, low_K: Floats, high_K: Floats, groups: list[Interval]) -> Floats:
    """Feasible point with the smallest sum of |change| (Dykstra ends within about 1e-8; this ends at 1e-10)."""
    K = len(p_K)
    rows, limits = _group_rows(groups, 2 * K)
    for sign in (1.0, -1.0):  # |p_new - p| <= t
        rows.append(np.hstack([sign * np.eye(K), -np.eye(K)]))
        limits.append(sign * p_K)
    box = [*zip(low_K, high_K, strict=True), *[(0, None)] * K]
    return np.clip(_solve("projection", np.r_[np.zeros(K), np.ones(K)], rows, limits, K, box)[:K], low_K, high_K)


def _solve(
    what: str, cost: Floats, rows: list[Floats], limits: list[Floats], K: int, box: Sequence[Any] = (0, None)
) -> Floats:
    """LP (HiGHS): x with the least cost.x, `rows` x <= `limits`, the first K entries (the shares) add up to 1."""
    from scipy.optimize import linprog  # slow to import, and few bounds need it

    solved = linprog(
        cost,
        A_ub=np.vstack(rows),
        b_ub=np.concatenate(limits),
        A_eq=(np.arange(len(cost)) < K).astype(float)[None],
        b_eq=[1.0],
        bounds=box,
        options={"primal_feasibility_tolerance": 1e-10},
    )
    if not solved.success:
        raise ArithmeticError(f"{what}: {solved.message}")
    return solved.x


def _group_rows(groups: list[Interval], columns: int) -> tuple[list[Floats], list[Floats]]:
    rows, limits = [], []
    for mask, low, high in groups:
        row = np.zeros((1, columns))
        row[0, : len(mask)] = mask
        rows += [row, -row]
        limits += [np.array([high]), np.array([-low])]
    return rows, limits


def smallest_violation(low_K: Floats, high_K: Floats, groups: list[Interval]) -> tuple[Floats, Floats, Floats]:
    """By how much each floor [K], cap [K] and group [G] must give way so that one mixture satisfies all: p >= 0, sum
    p = 1, every limit with its own slack, sum of slacks minimal."""
    K, G = len(low_K), len(groups)
    rows, limits = _group_rows(groups, 3 * K + G)
    for position in range(G):
        rows[2 * position][0, 3 * K + position] = rows[2 * position + 1][0, 3 * K + position] = -1.0
    nothing = np.zeros((K, G))
    rows += [
        np.hstack([np.eye(K), np.zeros((K, K)), -np.eye(K), nothing]),
        np.hstack([-np.eye(K), -np.eye(K), np.zeros((K, K)), nothing]),
    ]
    limits += [high_K, -low_K]
    x = np.maximum(_solve("feasibility", np.r_[np.zeros(K), np.ones(2 * K + G)], rows, limits, K), 0.0)
    return x[K : 2 * K], x[2 * K : 3 * K], x[3 * K :]


def interior_point(low_K: Floats, high_K: Floats, groups: list[Interval]) -> Floats:
    """Point whose smallest distance to the limits is largest. Entries and groups with low = high are left alone."""
    K = len(low_K)
    rows, limits = _group_rows(groups, K + 1)
    for position, (_, low, high) in enumerate(groups):
        if high > low:
            rows[2 * position][0, K] = rows[2 * position + 1][0, K] = 1.0
    wide_K = (high_K > low_K).astype(float)[:, None]
    rows += [np.hstack([np.eye(K), wide_K]), np.hstack([-np.eye(K), wide_K])]
    limits += [high_K, -low_K]
    return _solve("interior point", np.r_[np.zeros(K), -1.0], rows, limits, K)[:K]
