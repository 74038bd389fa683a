"""The grid's size, its budgets, and synergies planted and found."""

import numpy as np
import pytest

from data_mixers import MixError
from data_mixers.design.cocktail import cocktail, synergy
from data_mixers.sweep.ledger import TrialLedger
from data_mixers.sweep.trial import done_records

TASKS = ("a", "b", "c", "d")


def test_the_grid():
    assert len({trial.mixture for trial in cocktail(TASKS, seeds=2)}) == 15
    trials = cocktail(TASKS, "chat", general_share=0.25, seeds=3)
    assert len(trials) == 90
    assert len({trial.id for trial in trials}) == 90
    assert len({trial.mixture for trial in trials}) == 30
    assert {trial.mixture["chat"] for trial in trials} == {0.0, 0.25}
    with pytest.raises(MixError, match="general apart"):
        cocktail(TASKS, "a")


def test_budgets():
    pair = {"per_task": 200, "total": 100}
    for budget, length in pair.items():
        trials = [t for t in cocktail(TASKS, budget=budget, rows=100) if t.mixture["a"] == t.mixture["b"] == 0.5]
        assert {trial.tokens for trial in trials} == {length}


def test_a_planted_synergy_is_found():
    rng, ledger = np.random.default_rng(0), TrialLedger()
    for trial in cocktail(TASKS, seeds=5):
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
    with pytest.raises(MixError, match="whole grid"):
        synergy(TrialLedger(None, ledger.records[:10]), TASKS)
