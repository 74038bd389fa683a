"""The test of "drawn alike": its error rate is what it says, and it sees mixtures that people would choose."""

import numpy as np
import pytest

from data_mixers.fitting.distribution_shift import same_distribution

PRIOR = np.array([0.4, 0.3, 0.2, 0.05, 0.05])


def dirichlet(n, strength, seed):
    return np.random.default_rng(seed).dirichlet(PRIOR * strength, n)


def test_energy_is_the_definition():
    """Against double loops, for the given sides and one other deal."""
    from data_mixers.fitting.distribution_shift import _energy

    rng = np.random.default_rng(0)
    points, n, q = rng.normal(size=(9, 3)), 5, 4
    distance = np.sqrt(np.sum((points[:, None] - points[None]) ** 2, axis=-1))
    deals = np.zeros((2, 9))
    deals[0, :5] = 1
    deals[1, [0, 2, 4, 6, 8]] = 1
    for deal, found in zip(deals, _energy(distance, deals, n, q), strict=True):
        a, b = points[deal == 1], points[deal == 0]
        mean = lambda x, y: np.mean([np.linalg.norm(i - j) for i in x for j in y])  # noqa: E731
        assert found == pytest.approx(2 * mean(a, b) - mean(a, a) - mean(b, b), abs=1e-12)


def test_error_rate():
    """Drawn alike: p below 0.05 in about 5 % of 200 cases, and p is uniform enough."""
    p = np.array([same_distribution(dirichlet(24, 1.0, 2 * i), dirichlet(12, 1.0, 2 * i + 1)) for i in range(200)])
    assert 2 <= np.sum(p <= 0.05) <= 20
    assert 0.4 < p.mean() < 0.6


@pytest.mark.parametrize("n", [32, 128, 700])
def test_candidates_are_told_from_a_design(n):
    design, candidates = dirichlet(n, 1.0, 0), dirichlet(32, 30.0, 1)
    assert same_distribution(design, candidates) == 1 / 2000
    assert same_distribution(design, dirichlet(300, 1.0, 2)) > 0.01


def test_is_reproducible():
    a, b = dirichlet(20, 1.0, 0), dirichlet(20, 2.0, 1)
    assert same_distribution(a, b, seed=3) == same_distribution(a, b, seed=3)
