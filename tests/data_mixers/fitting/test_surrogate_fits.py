"""fit: grouped folds, the report, bring-your-own CSV, and the figures that the published tables must give."""

import csv
import json
from dataclasses import replace

import numpy as np
import pytest

from data_mixers import MixError, Mixture
from data_mixers.fitting.surrogate_fits import fit_surrogates
from data_mixers.propose.from_csv import fit_csv, predict_csv
from data_mixers.surrogates.stack import spearman
from data_mixers.sweep.ledger import TrialLedger
from data_mixers.sweep.trial import Trial, done_records
from tests.data_mixers.published import path, regmix
from tests.slow import slow

NAMES = ("a", "b", "c")


def made_ledger(n=30, repeats=1, noise=0.02, points=(1.0,)):
    rng = np.random.default_rng(0)
    ledger = TrialLedger()
    for i, row in enumerate(rng.dirichlet(np.ones(3), n)):
        for seed in range(repeats):
            scores = [(p, {"a/loss": float(np.exp(-2 * row[0] * p) + noise * rng.standard_normal())}) for p in points]
            ledger.append(done_records(Trial(Mixture(NAMES, row), seed=100 * i + seed), scores, 1.0))
    return ledger


def test_report_is_json_and_says_what_was_left_out():
    ledger = made_ledger()
    ledger.append(
        done_records(Trial(Mixture(NAMES, np.array([0.2, 0.3, 0.5])), seed=9), [(1.0, {"a/loss": np.nan})], 1.0)
    )
    fits = fit_surrogates(ledger)
    report = json.loads(json.dumps(fits.report()))["targets"]["a/loss"]
    assert report["n"] == 30
    assert report["left_out_nulls"] == 1
    assert sum(candidate["weight"] for candidate in report["candidates"]) == pytest.approx(1)
    assert len(report["trials"]) == 30
    assert report["rho"] > 90
    assert "explains" in fits.text()


def test_repeats_give_the_noise_and_stay_in_one_fold():
    fits = fit_surrogates(made_ledger(n=25, repeats=3, noise=0.05), surrogate="ridge")
    fitted = fits["a/loss"]
    assert fitted.noise_sd == pytest.approx(0.05, rel=0.3)
    for group in np.unique(fitted.arrays.groups):
        assert len(set(fitted.model.fold_of[fitted.arrays.groups == group])) == 1


def test_only_last_checkpoints_unless_asked():
    ledger = made_ledger(points=(0.5, 1.0))
    assert len(fit_surrogates(ledger, surrogate="ridge")["a/loss"].arrays.y) == 30
    every = fit_surrogates(ledger, surrogate="gp", progress="all")["a/loss"]
    assert len(every.arrays.y) == 60
    early = every.model.mean(np.array([[0.5, 0.25, 0.25]]), 0.5)
    late = every.model.mean(np.array([[0.5, 0.25, 0.25]]), 1.0)
    assert early > late


def test_same_seed_same_bits():
    first, second = (fit_surrogates(made_ledger(), seed=3).predict(np.eye(3))["a/loss"] for _ in range(2))
    assert np.array_equal(np.stack(first), np.stack(second))


def test_pure_noise_has_no_signal_or_little():
    rng = np.random.default_rng(1)
    ledger = TrialLedger()
    for i, row in enumerate(rng.dirichlet(np.ones(3), 40)):
        ledger.append(
            done_records(Trial(Mixture(NAMES, row), seed=i), [(1.0, {"x": float(rng.standard_normal())})], 1.0)
        )
    assert fit_surrogates(ledger)["x"].r2 < 0.15


def test_a_constant_target_warns():
    ledger = TrialLedger()
    for i, row in enumerate(np.random.default_rng(1).dirichlet(np.ones(3), 8)):
        ledger.append(done_records(Trial(Mixture(NAMES, row), seed=i), [(1.0, {"x": 2.0})], 1.0))
    with pytest.warns(UserWarning, match="every trial has the score 2"):
        fits = fit_surrogates(ledger)
    assert fits.predict(np.eye(3))["x"].mean.tolist() == [2.0] * 3
    json.dumps(fits.report())


@pytest.mark.parametrize("n", [4, 8, *slow(5, 6)])
def test_few_trials_are_fitted_without_noise_on_the_way(n, recwarn):
    report = fit_surrogates(made_ledger(n=n)).report()
    json.dumps(report, allow_nan=False)
    assert not [warning for warning in recwarn if issubclass(warning.category, RuntimeWarning)]
    with pytest.raises(MixError, match="at least 5"):
        fit_surrogates(made_ledger(n=3))


def test_unknown_names():
    with pytest.raises(MixError, match="did you mean 'ridge'"):
        fit_surrogates(made_ledger(), surrogate="rigde")
    with pytest.raises(MixError, match="a/los"):
        fit_surrogates(made_ledger(), ["a/los"])


def test_csv_in_and_out(tmp_path):
    rows = np.random.default_rng(0).dirichlet(np.ones(3), 25)
    for name, header, body in (
        ("x.csv", ["id", *NAMES], rows),
        ("y.csv", ["id", "loss", "f1"], np.stack([np.exp(-rows[:, 0]), rows[:, 1]], axis=1)),
        ("z.csv", ["id", "c", "a", "b"], rows[:5][:, [2, 0, 1]]),
    ):
        with open(tmp_path / name, "w", newline="") as file:
            csv.writer(file).writerows([header, *([i, *row] for i, row in enumerate(body))])
    fits = fit_csv(
        tmp_path / "x.csv", tmp_path / "y.csv", goal={"loss": "min", "f1": "max"}, surrogate="gp", index="id"
    )
    assert predict_csv(fits, tmp_path / "z.csv", tmp_path / "p.csv", index="id") == 5
    with open(tmp_path / "p.csv") as file:
        table = list(csv.DictReader(file))
    assert list(table[0]) == ["id", "loss", "loss_lower", "loss_upper", "f1", "f1_lower", "f1_upper"]
    np.testing.assert_allclose([float(row["loss"]) for row in table], np.exp(-rows[:5, 0]), atol=0.01)
    (tmp_path / "bad.csv").write_text("id,a,b,c\n7,0.5,0.5,0.5\n")
    with pytest.raises(MixError, match=r"row 7: the shares add up to 1\.5"):
        predict_csv(fits, tmp_path / "bad.csv", tmp_path / "p.csv", index="id")
    with pytest.raises(MixError, match="did you mean 'loss'"):
        fit_csv(tmp_path / "x.csv", tmp_path / "y.csv", ["los"], index="id")


def test_pile_cc_with_a_quarter_of_the_trials():
    mixtures, scores = path("regmix/train_mixture_1m.csv"), path("regmix/train_loss_1m.csv")
    fits = fit_csv(mixtures, scores, ["pile_cc"], index="index", limit=128)
    X, y = regmix("1m")
    mean, lower, upper = fits.predict(X)["pile_cc"]
    assert spearman(mean, y) > 98.8
    assert 0.82 <= np.mean((lower <= y) & (y <= upper)) <= 0.97


def test_repeating_a_trial_does_not_widen_intervals():
    """Metamorphic: the same mixture run again with the same result is news that nothing is wrong."""
    ledger, new = made_ledger(n=40), np.random.default_rng(7).dirichlet(np.ones(3), 50)
    records = ledger.records
    again = TrialLedger(
        None, [*records, *(replace(record, trial=f"again {record.trial}", seed=1) for record in records[:6])]
    )
    widths = []
    for trials in (ledger, again):
        prediction = fit_surrogates(trials, surrogate="ridge").predict(new)["a/loss"]
        widths.append(np.mean(prediction.upper - prediction.lower))
    assert widths[1] <= 1.1 * widths[0]
