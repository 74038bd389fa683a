"""Which mixtures to try.

regmix_dirichlet     the sampler of RegMix (Liu et al., ICLR 2025, arXiv 2407.01492), bit for bit
batch_compositions   DaMo's P_fix (arXiv 2510.19336): every way to fill a batch of b examples with K tasks
damo                 n of these, drawn evenly from those inside the bounds
space_filling        Sobol points mapped to the bounds, maximin, with the current mixture repeated (measures the noise)
cocktail_grid        single tasks, pairs, all, all minus one (in cocktail.py)
"""

from __future__ import annotations

import itertools
import math
import random

import numpy as np
from numpy.typing import ArrayLike, NDArray

from data_mixers.common.errors import MixError
from data_mixers.mixture.bounds import Bounds
from data_mixers.mixture.mixture import Floats, Mixture

STRENGTHS = (0.3, 10.0)  # total of the Dirichlet's parameters: corners ... middles
MANY_COMPOSITIONS = 50_000  # more are not listed but drawn
ALL_COMPOSITIONS = 20_000_000  # more rows than this are refused: draw n of them instead


def regmix_dirichlet(
    prior: Mixture | ArrayLike,
    n: int,
    *,
    temperature: float = 0.5,
    strengths: tuple[float, float, int] = (0.1, 5.0, 15),
    max_usage: float = 15,
    minimum: float = 2e-4,
    multiplier: int = 100,
    seed: int = 42,
) -> Floats:
    """[n, K] mixtures around the prior; rows are multiples of `minimum` and add up to 1 within rounding.

    q = prior ** temperature, renormalised. n * multiplier times: one Dirichlet(q s) for each of 15 strengths s
    (log-spaced), one of them picked; rejected where a share is over min(max_usage * prior_k, 1). Shares below `minimum`
    become 0; renormalise; round to multiples of `minimum`; sort, drop duplicates, take n without replacement.
    The draws are numpy's legacy RandomState(seed), whose stream is frozen; picks are random.Random(seed).
    """
    prior_K = np.array(prior.shares if isinstance(prior, Mixture) else prior, dtype=np.float64)
    if prior_K.ndim != 1 or np.any(prior_K < 0) or not prior_K.sum() > 0 or n < 1:
        raise MixError(f"prior of shape {prior_K.shape}, n {n}", do="one share >= 0 per task, n >= 1")
    tempered_K = prior_K**temperature if temperature < 1 else prior_K
    tempered_K = tempered_K / tempered_K.sum()
    limit_K = np.minimum(prior_K * max_usage, 1.0)
    low, high, count = strengths
    alpha = np.logspace(np.log10(low), np.log10(high), count)[:, None] * tempered_K
    draws, picks = np.random.RandomState(seed), random.Random(seed)
    accepted = []
    total = n * multiplier
    for first in range(0, total, 4096):
        size = min(4096, total - first)
        # RandomState.dirichlet(a, 1) is one gamma after the other, divided by their running sum: drawn in one go here.
        gamma = draws.standard_gamma(np.broadcast_to(alpha, (size, *alpha.shape)))
        which = np.array([picks.choice(range(count)) for _ in range(size)])
        gamma = gamma[np.arange(size), which]
        with np.errstate(divide="ignore", invalid="ignore"):
            rows = gamma * (1.0 / np.cumsum(gamma, axis=1)[:, -1:])
        accepted.append(rows[np.all(np.isfinite(rows) & (rows <= limit_K), axis=1)])
    rows = np.concatenate(accepted)
    rows = np.where(rows < minimum, 0.0, rows)
    rows = np.round(rows / rows.sum(axis=1).reshape(-1, 1) / minimum) * minimum
    kept = _sorted_distinct(rows)
    if len(kept) < n:
        raise MixError(
            f"only {len(kept)} distinct mixtures of {total} draws pass the limit of {max_usage} x prior "
            f"({len(rows)} accepted, {100 * len(rows) / total:.2g} %), {n} are asked",
            do="raise max_usage or multiplier, or use space_filling",
        )
    return np.stack(picks.sample(list(kept), n))


def _sorted_distinct(rows: Floats, threshold: float = 1e-5) -> Floats:
    """Rows sorted with the last column as the main key; one within L1 `threshold` of the last kept is dropped."""
    rows = rows[np.lexsort(rows.T)]
    kept = list(rows[:1])
    for row in rows[1:]:
        if np.abs(row - kept[-1]).sum() > threshold:
            kept.append(row)
    return np.array(kept)


def batch_compositions(K: int, batch: int, n: int | None = None, seed: int = 0) -> NDArray[np.int64]:
    """Integer compositions [n, K] of a batch (rows add up to `batch`): all in lexicographic order, or n distinct ones.

    There are C(batch + K - 1, K - 1). With a plan of G = batch each is realised exactly in every step.
    """
    total = math.comb(batch + K - 1, K - 1)
    if n is None:
        if total > ALL_COMPOSITIONS:
            raise MixError(f"{total} compositions of {batch} over {K} tasks", do="give n to draw some of them")
        bars = np.fromiter(
            itertools.chain.from_iterable(itertools.combinations(range(batch + K - 1), K - 1)),
            dtype=np.int64,
            count=total * (K - 1),
        ).reshape(total, K - 1)
        return _compositions(bars, batch, K)
    if n > total:
        raise MixError(f"{n} compositions asked, there are {total}", do="ask for fewer, or a larger batch")
    rng, seen = random.Random(seed), {}
    while len(seen) < n:  # stars and bars: a sorted choice of K - 1 out of batch + K - 1 places is uniform
        seen[tuple(sorted(rng.sample(range(batch + K - 1), K - 1)))] = None
    return _compositions(np.array(list(seen), dtype=np.int64).reshape(n, K - 1), batch, K)


def damo(bounds: Bounds, batch: int, n: int, *, seed: int = 0) -> Floats:
    """[n, K] mixtures: n different compositions of a batch of `batch` examples, drawn evenly from all that are inside
    the bounds (which know their tasks). Nothing is projected: every share is a whole number of examples in a batch.
    """
    K, total = len(bounds.lower()), math.comb(batch + len(bounds.lower()) - 1, len(bounds.lower()) - 1)
    if total <= MANY_COMPOSITIONS:
        drawn = np.random.default_rng(seed).permutation(batch_compositions(K, batch))
    else:
        drawn = batch_compositions(K, batch, n=min(MANY_COMPOSITIONS, total // 2), seed=seed)
    rows = drawn / batch
    kept = rows[_inside(bounds, rows)][:n]
    if len(kept) < n:
        seen = f"the {total} compositions" if len(drawn) == total else f"{len(drawn)} drawn compositions"
        raise MixError(
            f"{n} mixtures asked, but {len(kept)} of {seen} of {batch} examples over {K} tasks are inside the bounds",
            do="fewer trials, a larger batch, wider bounds, or the design space_filling",
        )
    return kept


def _inside(bounds: Bounds, rows: Floats) -> NDArray[np.bool_]:
    """Which rows [m, K] keep the bounds."""
    fits = np.all((rows >= bounds.lower() - 1e-9) & (rows <= bounds.upper() + 1e-9), axis=1)
    for mask, low, high in bounds._intervals():
        total = rows[:, mask].sum(axis=1)
        fits &= (total >= low - 1e-9) & (total <= high + 1e-9)
    return fits


def _compositions(bars: NDArray[np.int64], batch: int, K: int) -> NDArray[np.int64]:
    edges = np.hstack([np.full((len(bars), 1), -1), bars, np.full((len(bars), 1), batch + K - 1)])
    return np.diff(edges, axis=1) - 1


def space_filling(
    bounds: Bounds | None,
    n: int | None = None,
    *,
    prior: Mixture,
    current: Mixture | None = None,
    repeats: int = 3,
    seed: int = 0,
) -> Floats:
    """[n, K] mixtures inside the bounds, far from each other in ||sqrt p - sqrt q||. Default n = 3 (K + 1).

    Always in: the current mixture (`repeats` times: run them with different seeds), the prior, uniform if allowed.
    Then maximin: the farthest points, one after the other, among scrambled Sobol points mapped to the bounds
    and a hit-and-run walk inside them, and exchanges as long as the smallest distance grows.
    """
    names = prior.names
    bounds = (bounds or Bounds()).over(names)
    bounds.check_feasible()
    K = len(names)
    n = 3 * (K + 1) if n is None else n
    fixed = [] if current is None else [bounds.project(current.over(names))] * max(1, repeats)
    fixed.append(bounds.project(prior))
    even = np.full(K, 1 / K)
    if not bounds.violations(even) and all(np.abs(even - row).sum() > 1e-6 for row in fixed):
        fixed.append(even)
    rows = fixed[:n]
    pool_size = max(2000, 50 * n)
    rng = np.random.default_rng([seed, 1])
    candidates = np.vstack(
        [sobol_mixtures(bounds, pool_size // 2, prior=prior, seed=seed), hit_and_run(bounds, pool_size // 2, rng)]
    )
    chosen = _maximin(np.sqrt(rows), np.sqrt(candidates), n - len(rows))
    return np.vstack([rows, candidates[chosen]])


def _maximin(fixed: Floats, pool: Floats, n: int, passes: int = 3) -> list[int]:
    """Indices of n points of `pool` [M, K] that keep far from `fixed` [F, K] and from each other: greedy, then each is
    exchanged for the pool's farthest from all others wherever that is farther."""
    if n <= 0:
        return []
    to_fixed = np.min(np.stack([np.linalg.norm(pool - row, axis=1) for row in fixed]), axis=0)
    distance, chosen = to_fixed.copy(), []
    for _ in range(n):
        chosen.append(int(np.argmax(distance)))
        distance = np.minimum(distance, np.linalg.norm(pool - pool[chosen[-1]], axis=1))
    between = np.stack([np.linalg.norm(pool - pool[index], axis=1) for index in chosen], axis=1)  # [M, n]
    for _ in range(passes):
        moved = False
        nearest, first, second = _two_nearest(between)
        for position in range(n):
            free = np.minimum(to_fixed, np.where(nearest == position, second, first))
            best = int(np.argmax(free))
            if free[best] > free[chosen[position]] + 1e-12:
                chosen[position], moved = best, True
                between[:, position] = np.linalg.norm(pool - pool[best], axis=1)
                nearest, first, second = _two_nearest(between)
        if not moved:
            break
    return chosen


def _two_nearest(between: Floats) -> tuple[NDArray[np.intp], Floats, Floats]:
    """Which of the n points is nearest to each of M, its distance, and the distance of the second nearest."""
    nearest = np.argmin(between, axis=1)
    at = np.arange(len(between))
    first = between[at, nearest]
    between[at, nearest] = np.inf
    second = between.min(axis=1)
    between[at, nearest] = first
    return nearest, first, second


def candidate_mixtures(bounds: Bounds, n: int, *, prior: Mixture, seed: int) -> Floats:
    """[n, K] random mixtures inside the bounds: half tempered Dirichlets (projected), half a hit-and-run walk."""
    rng = np.random.default_rng(seed)
    half = n // 2
    strength = 10 ** rng.uniform(-1, 0.7, size=(half, 1))
    gamma = rng.standard_gamma(_dirichlet(bounds, prior, strength)) + 1e-300
    near = bounds.project(gamma / gamma.sum(axis=1, keepdims=True), "l2") if half else gamma
    return np.vstack([near, hit_and_run(bounds, n - half, rng)])


def sobol_mixtures(
    bounds: Bounds, n: int, *, prior: Mixture, seed: int, strengths: tuple[float, float] = STRENGTHS
) -> Floats:
    """[n, K] low-discrepancy mixtures inside the bounds (which know their tasks), the same for the same seed.

        p = l + (1 - sum l) d,   d = g / sum g,   g_k = F^-1(u_k; strength q_k),   q = tempered prior

    u are scrambled Sobol points of K + 1 dimensions (Owen 1995; Joe & Kuo 2008): K of them quantiles of Dirichlet's
    gammas, the last one the strength, log-uniform, so that corners and middles are both visited. Floors are kept by the
    affine map; what breaks a cap, an epoch cap or a group is projected in KL onto the bounds. Without limits, with a
    uniform prior and strength K, this is the uniform distribution on the simplex.
    """
    from scipy.special import gammaincinv
    from scipy.stats import qmc

    low_K, K = bounds.lower(), len(prior)
    points = qmc.Sobol(K + 1, scramble=True, rng=np.random.default_rng(seed)).random_base2(max(0, (n - 1).bit_length()))
    u = np.clip(points[:n], 1e-12, 1 - 1e-12)
    low, high = np.log(strengths)
    strength = np.exp(low + (high - low) * u[:, -1:])
    gamma = gammaincinv(_dirichlet(bounds, prior, strength), u[:, :K]) + 1e-300
    return bounds.project(low_K + max(0.0, 1 - low_K.sum()) * gamma / gamma.sum(axis=1, keepdims=True))


def _dirichlet(bounds: Bounds, prior: Mixture, strength: Floats) -> Floats:
    """Parameters [n, K] around the tempered prior, of sum `strength` [n, 1]."""
    tempered_K = np.sqrt(np.maximum(prior.over(bounds._named()).shares, 1e-6))
    return np.maximum(strength * tempered_K / tempered_K.sum(), 1e-3)


def hit_and_run(bounds: Bounds, n: int, rng: np.random.Generator, thin: int = 4) -> Floats:
    """[n, K] points of a hit-and-run walk inside the bounds (uniform in the limit), from the interior point."""
    low_K, high_K, groups = bounds.lower(), bounds.upper(), bounds._intervals()
    point, K = bounds.interior(), len(low_K)
    free_K = high_K - low_K > 1e-12
    walked = []
    for position in range(n * thin):
        direction = np.where(free_K, rng.standard_normal(K), 0.0)
        direction -= np.where(free_K, direction.sum() / max(1, free_K.sum()), 0.0)
        rows = [(direction, low_K, high_K, point)]
        rows += [(np.array([direction[m].sum()]), low, high, np.array([point[m].sum()])) for m, low, high in groups]
        back, ahead = -np.inf, np.inf
        for slope, low, high, at in rows:
            with np.errstate(divide="ignore", invalid="ignore"):
                to_low, to_high = (low - at) / slope, (high - at) / slope
            moves = np.abs(slope) > 1e-12
            if moves.any():
                ahead = min(ahead, float(np.where(slope > 0, to_high, to_low)[moves].min()))
                back = max(back, float(np.where(slope > 0, to_low, to_high)[moves].max()))
        if np.isfinite(ahead) and np.isfinite(back) and ahead > back:
            point = np.clip(point + rng.uniform(back, ahead) * direction, low_K, high_K)
        if position % thin == thin - 1:
            walked.append(bounds.project_exact(point))
    return np.array(walked).reshape(n, K)
