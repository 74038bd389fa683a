"""RegMix's sampler against a plain re-telling of its loop; compositions by hand; designs stay inside their bounds."""

import random

import numpy as np
import pytest

from data_mixers import Bounds, Group, MixError, Mixture, uniform
from data_mixers.design.designs import (
    _maximin,
    batch_compositions,
    candidate_mixtures,
    damo,
    regmix_dirichlet,
    sobol_mixtures,
    space_filling,
)

PILE = (
    "0.113285273 0.079608651 0.003913491 0.185375901 0.051081359 0.015962925 0.101750772 0.003707518 0.066529351 "
    "0.001750772 0.027085479 0.236869207 0.01184346 0.007929969 0.008032956 0.038825953 0.046446962"
)
PRIOR = np.array([float(share) for share in PILE.split()])


def test_regmix_golden():
    rows = regmix_dirichlet(PRIOR, 8)
    first = np.zeros(17)
    first[[0, 1, 3, 11]] = 0.942, 0.0532, 0.0006, 0.0044
    np.testing.assert_allclose(rows[0], first, atol=1e-12)
    assert rows.shape == (8, 17)


def test_regmix_equals_the_published_loop_bit_for_bit():
    """The loop as the paper's script describes it: one dirichlet call per strength, one pick per round."""
    draws, picks = np.random.RandomState(7), random.Random(7)
    q = PRIOR**0.5 / np.sum(PRIOR**0.5)
    accepted = []
    for _ in range(4 * 100):
        samples = [draws.dirichlet(q * s, 1) for s in np.logspace(np.log10(0.1), np.log10(5.0), 15)]
        sample = picks.choice(samples)
        if np.any(sample[0] > np.minimum(PRIOR * 15, 1.0)):
            continue
        sample = np.where(sample < 2e-4, 0.0, sample)
        sample = sample / np.sum(sample, axis=1).reshape(-1, 1)
        accepted.append((np.round(sample / 2e-4) * 2e-4)[0])
    rows = np.array(accepted)
    rows = rows[np.lexsort(rows.T)]
    kept = [rows[0]]
    for row in rows[1:]:
        if np.sum(np.abs(row - kept[-1])) > 1e-5:
            kept.append(row)
    assert np.array_equal(regmix_dirichlet(PRIOR, 4, seed=7), np.stack(picks.sample(kept, 4)))


def test_regmix_says_when_the_caps_are_too_tight():
    with pytest.raises(MixError, match="max_usage"):
        regmix_dirichlet(PRIOR, 8, max_usage=1.01)


def test_compositions():
    assert ["".join(map(str, row)) for row in batch_compositions(3, 2)] == ["002", "011", "020", "101", "110", "200"]
    assert len(batch_compositions(12, 4)) == 1365
    some = batch_compositions(12, 16, n=500, seed=3)
    assert np.all(some.sum(axis=1) == 16)
    assert len(np.unique(some, axis=0)) == 500
    np.testing.assert_allclose(some.mean(axis=0), 16 / 12, rtol=0.2)
    with pytest.raises(MixError, match="give n"):
        batch_compositions(12, 20)
    with pytest.raises(MixError, match="there are 6"):
        batch_compositions(3, 2, n=7)


def test_compositions_are_the_published_list():
    """DaMo's get_P_fix (OPPO-Mente-Lab/DaMo), told anew: for each number in the first box all ways for the rest."""

    def boxes(m, k):
        if m == 1:
            return [[k]]
        return [[first, *rest] for first in range(k + 1) for rest in boxes(m - 1, k - first)]

    assert batch_compositions(4, 5).tolist() == boxes(4, 5)
    assert batch_compositions(2, 3).tolist() == [[0, 3], [1, 2], [2, 1], [3, 0]]
    with pytest.raises(MixError, match="21474180 compositions of 17 over 12 tasks"):
        batch_compositions(12, 17)


def test_damo_draws_compositions_inside_the_bounds():
    names = ("a", "b", "c", "d")
    free = Bounds(names=names)
    rows = damo(free, 8, 40, seed=1)
    assert rows.shape == (40, 4)
    assert np.array_equal(rows * 8, np.round(rows * 8))
    np.testing.assert_allclose(rows.sum(axis=1), 1)
    assert len(np.unique(rows, axis=0)) == 40
    assert np.array_equal(rows, damo(free, 8, 40, seed=1))
    assert not np.array_equal(rows, damo(free, 8, 40, seed=2))
    every = damo(free, 8, 165)  # all of them: C(11, 3)
    assert {tuple(row) for row in every * 8} == {tuple(row) for row in batch_compositions(4, 8).tolist()}
    bounds = Bounds(floors={"a": 0.125}, caps={"b": 0.25}, groups=(Group("g", ("c", "d"), 0.25, 0.75),), names=names)
    some = damo(bounds, 16, 60, seed=3)
    assert all(bounds.violations(row) == [] for row in some)
    assert np.array_equal(some * 16, np.round(some * 16))
    # 12 tasks in batches of 16: 13 million compositions, each as likely as another (mean share 1/12, 7.1 tasks in use)
    many = damo(Bounds(names=tuple("abcdefghijkl")), 16, 2000, seed=4)
    np.testing.assert_allclose(many.mean(axis=0), 1 / 12, atol=0.01)
    assert (many > 0).sum(axis=1).mean() == pytest.approx(12 * 16 / 27, abs=0.1)


def test_damo_says_when_there_are_too_few():
    names = ("a", "b", "c")
    with pytest.raises(MixError, match=r"7 mixtures asked, but 6 of the 6 compositions of 2 examples over 3 tasks"):
        damo(Bounds(names=names), 2, 7)
    with pytest.raises(MixError, match="space_filling"):
        damo(Bounds(floors={"a": 0.9}, names=names), 8, 5)


def test_space_filling_keeps_bounds_and_spreads():
    prior = Mixture.of({"a": 0.6, "b": 0.2, "c": 0.1, "d": 0.1})
    bounds = Bounds(caps={"a": 0.7}, floors={"b": 0.05}, groups=(Group("g", ("c", "d"), 0.1, 0.6),))
    rows = space_filling(bounds, prior=prior, current=uniform(prior.names), repeats=3, seed=1)
    named = bounds.over(prior.names)
    assert rows.shape == (15, 4)
    assert all(named.violations(row) == [] for row in rows)
    assert np.all(rows[:3] == rows[0])
    np.testing.assert_allclose(rows[3], prior.shares, atol=1e-9)
    distinct = np.sqrt(np.unique(np.round(rows, 9), axis=0))
    gaps = np.linalg.norm(distinct[:, None] - distinct[None], axis=2) + 9 * np.eye(len(distinct))
    random_rows = np.sqrt(candidate_mixtures(named, len(distinct), prior=prior, seed=5))
    random_gaps = np.linalg.norm(random_rows[:, None] - random_rows[None], axis=2) + 9 * np.eye(len(random_rows))
    assert gaps.min() > 2 * random_gaps.min()
    assert np.array_equal(rows, space_filling(bounds, prior=prior, current=uniform(prior.names), seed=1))


def test_sobol_mixtures_are_allowed_and_more_even_than_random_ones():
    names = ("a", "b", "c", "d", "e")
    bounds = Bounds(caps={"a": 0.3}, floors={"b": 0.1}, groups=(Group("g", ("c", "d"), 0.2, 0.5),), names=names)
    rows = sobol_mixtures(bounds, 200, prior=uniform(names), seed=4)
    assert all(bounds.violations(row) == [] for row in rows)
    assert np.array_equal(rows, sobol_mixtures(bounds, 200, prior=uniform(names), seed=4))
    free, errors, random_errors = Bounds(names=names), [], []
    for seed in range(10):  # strength K: uniform on the simplex, where E p = 1/K and E p^2 = 2 / (K (K + 1))
        flat = sobol_mixtures(free, 256, prior=uniform(names), seed=seed, strengths=(5.0, 5.0))
        errors.append(np.abs(np.mean(flat**2, axis=0) - 2 / 30).max())
        plain = np.random.default_rng(seed).dirichlet(np.ones(5), 256)
        random_errors.append(np.abs(np.mean(plain**2, axis=0) - 2 / 30).max())
    assert np.mean(errors) < 0.5 * np.mean(random_errors)


def test_exchanges_only_widen_the_smallest_gap():
    rng = np.random.default_rng(0)
    fixed, pool = np.sqrt(rng.dirichlet(np.ones(4), 2)), np.sqrt(rng.dirichlet(np.ones(4), 400))

    def gap(passes):
        points = np.vstack([fixed, pool[_maximin(fixed, pool, 15, passes)]])
        return (np.linalg.norm(points[:, None] - points[None], axis=2) + 9 * np.eye(len(points))).min()

    assert gap(3) >= gap(0)
    by_hand = [max(range(400), key=lambda i: min(np.linalg.norm(pool[i] - row) for row in fixed))]
    assert _maximin(fixed, pool, 1) == by_hand
