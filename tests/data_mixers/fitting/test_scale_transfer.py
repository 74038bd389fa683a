"""The slope's formula by hand; a planted scale change is undone; Pile-CC at 1B from 1M trials (bar C)."""

import warnings

import numpy as np
import pytest

from data_mixers import MixError
from data_mixers.fitting.scale_transfer import calibrate, fit_scale, for_mixtures, for_other_scale, small_scale_mean
from data_mixers.fitting.surrogate_fits import fit_surrogates
from data_mixers.surrogates.stack import spearman
from data_mixers.sweep.trial import TrialRecord
from tests.data_mixers.published import columns, matrix, subset


def planted(m, noise=0.0, seed=0):
    rng = np.random.default_rng(seed)
    X = rng.dirichlet(np.ones(4), m)
    small = np.stack([np.exp(-2 * X[:, 0]), 1 + X[:, 1] ** 2])
    return X, small, 0.6 * small - 0.2 + noise * rng.standard_normal(small.shape)


def test_slope_by_hand():
    X, small, large = planted(5, noise=0.1)
    f, y = small - small.mean(axis=1, keepdims=True), large - large.mean(axis=1, keepdims=True)
    pooled = np.sum(f * y) / np.sum(f * f)
    found = fit_scale(("a", "b"), X, small, large, [0.02, 0.03], method="shrunk")
    expected = [(f[j] @ y[j] + 5 * 0.1 * v * pooled) / (f[j] @ f[j] + 5 * 0.1 * v) for j, v in enumerate([0.02, 0.03])]
    np.testing.assert_allclose(found.slope_J, expected)
    np.testing.assert_allclose(found.offset_J, large.mean(axis=1) - found.slope_J * small.mean(axis=1))
    plain = fit_scale(("a", "b"), X, small, large, [0.02, 0.03], method="plain")
    np.testing.assert_allclose(plain.slope_J, [np.polyfit(small[j], large[j], 1)[0] for j in range(2)])


def test_a_planted_map_is_found_exactly():
    X, small, large = planted(6)
    new_X, new_small, new_large = planted(20, seed=1)
    for method in ("plain", "shrunk", "residual"):
        found = fit_scale(("a", "b"), X, small, large, [0.02, 0.03], method=method)
        np.testing.assert_allclose(found.predict(new_X, new_small), new_large, atol=1e-9)


def test_few_runs_are_refused():
    X, small, large = planted(3)
    with pytest.raises(MixError, match="3 large runs"):
        fit_scale(("a", "b"), X, small, large, [0.1, 0.1])


def test_pile_cc_at_1b_from_128_trials_by_a_law():
    """Bar C: at least 98.5 without any 1B run, by the law that ranks the small trials best."""
    X, y = matrix("regmix/train_mixture_1m.csv"), columns("regmix/train_loss_1m.csv")["pile_cc"]
    large_X, large = matrix("regmix/test_mixture_1B_first32.csv"), columns("regmix/test_loss_1B_first32.csv")["pile_cc"]
    figures = []
    for s in range(3):
        rows = [
            TrialRecord(
                trial=str(i),
                status="done",
                mixture=dict(zip(map(str, range(17)), X[i], strict=True)),
                scores={"y": y[i]},
            )
            for i in subset(s, 128)
        ]
        fitted = fit_surrogates(rows, surrogate="auto" if s == 0 else "exp")
        law = for_other_scale(fitted)["y"].model
        assert list(law.candidates) in (["exp"], ["power"])
        figures.append(spearman(law.mean(large_X), large))
    assert np.mean(figures) >= 98.5


def test_mixtures_that_are_not_drawn_as_the_trials_are_ranked_by_a_law():
    X, y = matrix("regmix/train_mixture_1m.csv"), columns("regmix/train_loss_1m.csv")["pile_cc"]
    rows = [
        TrialRecord(
            trial=str(i), status="done", mixture=dict(zip(map(str, range(17)), X[i], strict=True)), scores={"y": y[i]}
        )
        for i in subset(0, 128)
    ]
    fits = fit_surrogates(rows)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert for_mixtures(fits, matrix("regmix/test_mixture_1m.csv")) is fits
        assert for_mixtures(fits, matrix("regmix/test_mixture_1B_first32.csv")[:7]) is fits
    large_X, large = matrix("regmix/test_mixture_1B_first32.csv"), columns("regmix/test_loss_1B_first32.csv")["pile_cc"]
    with pytest.warns(UserWarning, match=r"new.csv: .* a law ranks them: y \(power\)"):
        law = for_mixtures(fits, large_X, where="new.csv")
    assert spearman(law.predict(large_X)["y"].mean, large) >= 98.5
    chosen = fit_surrogates(rows, surrogate="linear")
    assert for_mixtures(chosen, large_X)["y"] is chosen["y"]  # what the user chose stays


def test_a_law_is_taken_only_where_it_ranks_the_trials():
    rng = np.random.default_rng(0)
    X = rng.dirichlet(np.ones(3), 30)
    y = np.sin(9 * X[:, 0]) + 0.01 * rng.standard_normal(30)
    rows = [
        TrialRecord(trial=str(i), status="done", mixture=dict(zip("abc", x, strict=True)), scores={"y": float(v)})
        for i, (x, v) in enumerate(zip(X, y, strict=True))
    ]
    fits = fit_surrogates(rows)
    assert for_other_scale(fits)["y"] is fits["y"]


def test_large_runs_calibrate():
    rng = np.random.default_rng(1)
    X = rng.dirichlet(np.ones(3), 40)
    small, new = np.exp(-2 * X[:, 0]), rng.dirichlet(np.ones(3), 30)
    rows = [
        TrialRecord(trial=str(i), status="done", mixture=dict(zip("abc", x, strict=True)), scores={"y": float(v)})
        for i, (x, v) in enumerate(zip(X, small, strict=True))
    ]
    fits, truth = fit_surrogates(rows, surrogate="gp"), 0.5 * np.exp(-2 * new[:, 0]) + 3
    assert spearman(small_scale_mean(for_other_scale(fits), new)[0], truth) > 99
    mapped = calibrate(fits, new[:6], truth[None, :6])
    np.testing.assert_allclose(mapped.predict(new)["y"].mean, truth, atol=0.02)
