"""New mixtures are allowed, new, near the optimum, and reach it in fewer trials than random ones; best_progress."""

import numpy as np
import pytest

from data_mixers import Bounds, MixError, Mixture
from data_mixers.fitting.surrogate_fits import fit_surrogates
from data_mixers.propose.next_trials import best_progress, next_batch
from data_mixers.sweep.ledger import Trial, TrialLedger, done_records

NAMES = ("a", "b", "c")
BEST = np.array([0.6, 0.3, 0.1])


def surface(rows):
    return np.sum((np.sqrt(rows) - np.sqrt(BEST)) ** 2, axis=-1)


def ledger_of(rows, noise=0.003):
    rng = np.random.default_rng(1)
    ledger = TrialLedger()
    for seed, row in enumerate(rows):
        score = float(surface(row) + noise * rng.standard_normal())
        ledger.append(done_records(Trial(Mixture(NAMES, row), seed=seed), [(1.0, {"loss": score})], 1.0))
    return ledger


@pytest.mark.parametrize("method", ["thompson", "ei"])
def test_allowed_new_and_near_the_optimum(method):
    rows = np.random.default_rng(0).dirichlet(np.ones(3), 20)
    bounds = Bounds(caps={"a": 0.5})
    batch = next_batch(fit_surrogates(ledger_of(rows), surrogate="gp"), bounds=bounds, n=6, method=method, seed=3)
    assert batch.shape == (6, 3)
    assert all(bounds.over(NAMES).violations(row) == [] for row in batch)
    assert min(np.abs(rows - row).sum(axis=1).min() for row in batch) > 1e-3
    assert len(np.unique(np.round(batch, 6), axis=0)) == 6
    assert np.abs(batch - [0.5, 0.36, 0.14]).sum(axis=1).min() < 0.15
    again = next_batch(fit_surrogates(ledger_of(rows), surrogate="gp"), bounds=bounds, n=6, method=method, seed=3)
    assert np.array_equal(batch, again)


@pytest.mark.slow
def test_fewer_trials_than_random():
    """Distance of the best tried mixture to the optimum after 8 + 2 x 4 trials, median over 10 starts."""
    ours, random = [], []
    for seed in range(10):
        rng = np.random.default_rng(seed)
        rows = rng.dirichlet(np.ones(3), 8)
        more = np.vstack([rows, rng.dirichlet(np.ones(3), 8)])
        for step in range(2):
            rows = np.vstack(
                [
                    rows,
                    next_batch(
                        fit_surrogates(ledger_of(rows), surrogate="gp"), n=4, method="ei", seed=10 * seed + step
                    ),
                ]
            )
        ours.append(surface(rows).min())
        random.append(surface(more).min())
    assert np.median(ours) < 0.3 * np.median(random)


def test_best_progress_finds_where_a_task_overfits():
    ledger, rng = TrialLedger(), np.random.default_rng(0)
    for seed, row in enumerate(rng.dirichlet(np.ones(3), 25)):
        points = [
            (t, {"loss": float((row[0] * t - 0.3) ** 2 + 0.01 * rng.standard_normal())}) for t in (0.25, 0.5, 0.75, 1.0)
        ]
        ledger.append(done_records(Trial(Mixture(NAMES, row), seed=seed), points, 1.0))
    fits = fit_surrogates(ledger, surrogate="gp", progress="all")
    grid = np.linspace(0.25, 1, 16)
    at, mean, lower, upper = best_progress(fits, Mixture(NAMES, np.array([0.6, 0.2, 0.2])), grid)["loss"]
    assert at == pytest.approx(0.5, abs=0.15)
    assert lower < mean < upper
    with pytest.raises(MixError, match="without progress"):
        best_progress(fit_surrogates(ledger, surrogate="gp"), Mixture(NAMES, np.array([0.6, 0.2, 0.2])), grid)
