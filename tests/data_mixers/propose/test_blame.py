"""What a dataset is worth: right verdicts where the truth is known, none where the trials can't say."""

import json

import numpy as np
import pytest

from data_mixers import MixError, Mixture
from data_mixers.fitting.surrogate_fits import fit_surrogates
from data_mixers.propose.blame import HELPS, HURTS, UNTOLD, blame
from data_mixers.sweep.trial import TrialRecord

NAMES = ("good", "bad", "plain", "idle")
EVEN = Mixture(NAMES, np.full(4, 0.25))


def truth(rows):
    """Loss. Falls with the part of `good` in the first three, rises with that of `bad`; `idle` only takes rows, in the
    same proportion from all: without it the others are as they were to each other."""
    good, bad, plain = (rows[:, k] + 0.02 for k in range(3))
    total = good + bad + plain
    return 2.0 - 0.8 * np.sqrt(good / total) + 0.8 * np.sqrt(bad / total)


def fitted(seed, n=40, noise=0.05, rows=None, surrogate="gp", goal="min", turn=1.0, tilt=None):
    rng = np.random.default_rng(seed)
    rows = rng.dirichlet(np.ones(4), n) if rows is None else rows
    y = turn * (truth(rows) + noise * rng.standard_normal(len(rows)))
    records = [
        TrialRecord(
            trial=str(i), status="done", mixture=dict(zip(NAMES, map(float, row), strict=True)),
            scores={"score": float(value)}, goal={"score": goal},
        )
        for i, (row, value) in enumerate(zip(rows, y, strict=True))
    ]  # fmt: skip
    return fit_surrogates(records, surrogate=surrogate)


def verdicts(found):
    return {worth.dataset: worth.verdict for worth in found.datasets}


def test_known_datasets_help_hurt_and_do_nothing():
    found = blame(fitted(0), current=EVEN)
    assert verdicts(found) | {"plain": None} == {"good": HELPS, "bad": HURTS, "plain": None, "idle": UNTOLD}
    worth = {each.dataset: each for each in found.datasets}
    assert found.datasets[0].dataset == "bad"  # what hurts stands first
    of_good = worth["good"].targets["score"]
    without = np.array([[0.0, 1 / 3, 1 / 3, 1 / 3]])
    true = float((truth(EVEN.shares[None]) - truth(without))[0])
    assert of_good.mean < 0 < worth["good"].objective.mean  # a loss: with it lower, and that is worth something
    assert of_good.lower - 0.05 <= true <= of_good.upper + 0.05
    assert worth["good"].objective.probability >= 0.95


def test_goal_max_mirrors():
    lower = blame(fitted(1, surrogate="ridge"), current=EVEN)
    higher = blame(fitted(1, surrogate="ridge", goal="max", turn=-1.0), current=EVEN)
    assert verdicts(lower) == verdicts(higher)
    for a, b in zip(lower.datasets, higher.datasets, strict=True):
        assert a.objective.mean == pytest.approx(b.objective.mean, abs=0.05)
        assert np.sign(a.targets["score"].mean) == -np.sign(b.targets["score"].mean)


@pytest.mark.slow
def test_error_rates_over_many_seeds():
    """At 95 % a side: `idle` is called either in at most 10 %, and what truly helps or hurts is found."""
    found = [verdicts(blame(fitted(seed, noise=0.1), current=EVEN, seed=seed)) for seed in range(60)]
    idle = np.mean([each["idle"] != UNTOLD for each in found])
    wrong = np.mean([(each["good"] == HURTS) or (each["bad"] == HELPS) for each in found])
    right = np.mean([(each["good"] == HELPS) + (each["bad"] == HURTS) for each in found]) / 2
    assert idle <= 0.10
    assert wrong == 0
    assert right >= 0.95


def test_shuffled_scores_blame_nobody():
    rng = np.random.default_rng(3)
    rows = rng.dirichlet(np.ones(4), 40)
    records = [
        TrialRecord(trial=str(i), status="done", mixture=dict(zip(NAMES, map(float, row), strict=True)),
                    scores={"score": float(value)})
        for i, (row, value) in enumerate(zip(rows, rng.permutation(truth(rows)), strict=True))
    ]  # fmt: skip
    found = blame(fit_surrogates(records, surrogate="ridge"), current=EVEN)
    assert set(verdicts(found).values()) == {UNTOLD}


def test_outside_the_trials_nothing_is_said():
    rng = np.random.default_rng(4)
    rows = rng.dirichlet(np.ones(4), 60)
    floor = 0.15 + 0.4 * rows  # at least 0.15 of every task, at most 0.55
    found = blame(fitted(5, rows=floor, surrogate="ridge"), current=EVEN)
    assert set(verdicts(found).values()) == {UNTOLD}
    assert all(worth.objective is None and "no trial has less than 0.15" in worth.why for worth in found.datasets)
    assert "let some trials do without it" in found.text()
    # share 0 was tried, but never with so much of another task as its absence gives
    narrow = rows[np.all(rows < 0.7, axis=1)]
    found = blame(fitted(6, rows=narrow, surrogate="ridge"), current=Mixture(NAMES, np.array([0.6, 0.36, 0.02, 0.02])))
    worth = {each.dataset: each for each in found.datasets}
    assert "without it bad has 0.9, more than in any trial" in worth["good"].why
    assert worth["idle"].objective is not None


def test_a_dataset_without_a_share_has_nothing_to_take_away():
    found = blame(fitted(7, surrogate="ridge"), current=Mixture(NAMES, np.array([0.5, 0.5, 0.0, 0.0])))
    worth = {each.dataset: each for each in found.datasets}
    assert worth["idle"].why == "its share is 0 already"


def test_too_few_trials_have_no_numbers():
    found = blame(fitted(8, n=12, surrogate="ridge"), current=EVEN)
    assert found.unsaid is not None
    assert "too few trials to say" in found.text()
    assert all(worth.objective is None for worth in found.datasets)


def test_worst_and_weights_and_json():
    rng = np.random.default_rng(9)
    rows = rng.dirichlet(np.ones(4), 40)
    records = [
        TrialRecord(trial=str(i), status="done", mixture=dict(zip(NAMES, map(float, row), strict=True)),
                    scores={"x": float(value), "y": float(rng.standard_normal())})
        for i, (row, value) in enumerate(zip(rows, truth(rows) + 0.02 * rng.standard_normal(40), strict=True))
    ]  # fmt: skip
    fits = fit_surrogates(records, surrogate="ridge")
    for objective in ("mean", "worst", {"x": 1.0}):
        found = blame(fits, objective, current=EVEN)
        text = json.dumps(found.as_dict(), allow_nan=False)
        assert json.loads(text)["datasets"]["good"]["targets"]["x"]["verdict"] == HELPS
    assert verdicts(found)["good"] == HELPS
    with pytest.raises(MixError, match="target"):
        blame(fits, {"z": 1.0}, current=EVEN)


def test_bounded_scores_are_told_in_their_units():
    rng = np.random.default_rng(10)
    rows = rng.dirichlet(np.ones(4), 48)
    right = rng.binomial(300, 1 / (1 + np.exp(4 * (truth(rows) - 1.6)))) / 300
    records = [
        TrialRecord(trial=str(i), status="done", mixture=dict(zip(NAMES, map(float, row), strict=True)),
                    scores={"acc": float(value)}, goal={"acc": "max"})
        for i, (row, value) in enumerate(zip(rows, right, strict=True))
    ]  # fmt: skip
    fits = fit_surrogates(records, surrogate="gp", bounds={"acc": (0.0, 1.0)}, link="logit")
    worth = {each.dataset: each for each in blame(fits, current=EVEN).datasets}
    assert worth["good"].verdict == HELPS
    assert 0 < worth["good"].targets["acc"].mean < 1
    predicted = fits.predict(np.stack([EVEN.shares, [0, 1 / 3, 1 / 3, 1 / 3]]))["acc"].mean
    assert worth["good"].targets["acc"].mean == pytest.approx(predicted[0] - predicted[1], abs=0.02)
