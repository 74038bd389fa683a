"""The grid's mixtures, and synergies planted and found."""

import numpy as np
import pytest

from data_mixers import MixError, TrialLedger, make_trials
from data_mixers.design.cocktail import cocktail_grid, synergy
from data_mixers.sweep.trial import done_records

TASKS = ("a", "b", "c", "d")


def test_the_grid():
    grid = cocktail_grid(4)
    assert grid.shape == (15, 4)
    np.testing.assert_allclose(grid.sum(axis=1), 1)
    assert sorted(np.count_nonzero(grid, axis=1).tolist()) == [1] * 4 + [2] * 6 + [3] * 4 + [4]
    assert len(cocktail_grid(3)) == 7  # all minus one is a pair
    assert len(cocktail_grid(2)) == 3
    with pytest.raises(MixError, match="a cocktail of 1 task"):
        cocktail_grid(1)


def test_a_planted_synergy_is_found():
    rng, ledger = np.random.default_rng(0), TrialLedger()
    for trial in make_trials(TASKS, np.repeat(cocktail_grid(4), 5, axis=0)):
        used = {name for name, share in trial.mixture.as_dict().items() if share > 0}
        scores = {
            f"{task}/loss": 1 - 0.3 * (task == "a" and "b" in used) + 0.02 * rng.standard_normal() for task in TASKS
        }
        ledger.append(done_records(trial, [(1.0, scores)], 1.0))
    found = synergy(ledger, TASKS)
    assert found.mean[0, 1] == pytest.approx(0.3, abs=0.05)
    assert found.lower[0, 1] > 0.2
    assert abs(found.mean[1, 0]) < 0.05
    assert found.gain_all[0] == pytest.approx(0.3, abs=0.05)
    assert found.leave_one_out[0, 1] == pytest.approx(0.3, abs=0.05)
    assert found.text().splitlines()[2].split()[:3] == ["a", f"{found.gain_all[0]:.4g}", "-"]
    part = synergy(TrialLedger(None, ledger.records[:20]), TASKS)  # the single tasks only
    assert np.isnan(part.mean).all()
    assert np.isnan(part.gain_all).all()
