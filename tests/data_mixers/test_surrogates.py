"""What every surrogate owes: shape, order, reproducibility, constant scores, intervals that hold, honest errors."""

import numpy as np
import pytest
from scipy.optimize import check_grad

from data_mixers import MixError
from data_mixers.surrogates import gaussian_process, stack
from data_mixers.surrogates.base import conformal_quantile, grouped_folds
from data_mixers.surrogates.gaussian_process import GaussianProcess, _negative_log_likelihood, _negative_log_prior
from data_mixers.surrogates.lightgbm import LightGBM, RegMix
from data_mixers.surrogates.linear import LinearSurrogate
from data_mixers.surrogates.parametric_laws import BiMix, ExpLaw, PowerLaw, TransferLaw
from data_mixers.surrogates.registry import SURROGATES
from data_mixers.surrogates.ridge import Ridge
from data_mixers.surrogates.stack import Stack
from data_mixers.surrogates.warped_gp import WarpedGP

FACTORIES = {
    "linear": LinearSurrogate,
    "ridge": Ridge,
    "lightgbm": lambda: LightGBM(trees=200),
    "exp": ExpLaw,
    "power": PowerLaw,
    "bimix": BiMix,
    "transfer": TransferLaw,
    "gp": GaussianProcess,
    "gp tied": lambda: GaussianProcess(tied=0.1),
    "warped": WarpedGP,
    "stack": lambda: Stack(candidates={"ridge": Ridge(), "gp": GaussianProcess()}),
}


def trials(n=50, K=4, noise=0.02, seed=0):
    rng = np.random.default_rng(seed)
    X = rng.dirichlet(np.full(K, 0.7), n)
    return X, 2 + np.exp(-3 * X[:, 0]) + 0.5 * (1 - X[:, 1]) ** 2 + noise * rng.standard_normal(n)


@pytest.mark.parametrize("name", FACTORIES)
def test_contract(name):
    X, y = trials()
    new, truth = trials(seed=1)
    model = FACTORIES[name]().fit(X, y)
    mean, lower, upper = model.predict(new)
    assert mean.shape == lower.shape == upper.shape == (50,)
    assert np.all(lower < mean)
    assert np.all(mean < upper)
    assert np.corrcoef(mean, truth)[0, 1] > 0.85
    assert 0.7 <= np.mean((lower <= truth) & (truth <= upper)) <= 1.0
    np.testing.assert_array_equal(FACTORIES[name]().fit(X, y).predict(new).upper, upper)
    draws = model.sample(new, 40, seed=3)
    assert draws.shape == (40, 50)
    np.testing.assert_array_equal(draws, model.sample(new, 40, seed=3))
    wide = model.predict(new, level=0.5)
    assert np.all(wide.upper - wide.lower <= upper - lower + 1e-12)


@pytest.mark.parametrize("name", FACTORIES)
def test_a_constant_score_predicts_itself(name):
    X, _ = trials(12)
    prediction = FACTORIES[name]().fit(X, np.full(12, 3.5)).predict(X[:2])
    assert [column.tolist() for column in prediction] == [[3.5, 3.5]] * 3


@pytest.mark.parametrize("name", FACTORIES)
def test_a_task_that_no_trial_uses_changes_nothing(name):
    X, y = trials()
    new, _ = trials(seed=1)
    wider = [np.insert(rows, 2, 0.0, axis=1) for rows in (X, new)]
    plain = FACTORIES[name]().fit(X, y).predict(new).mean
    np.testing.assert_allclose(FACTORIES[name]().fit(wider[0], y).predict(wider[1]).mean, plain, atol=1e-6)


@pytest.mark.parametrize("name", FACTORIES)
def test_bad_input_is_refused(name):
    X, y = trials(10)
    with pytest.raises(MixError, match="2 trials"):
        FACTORIES[name]().fit(X[:2], y[:2])
    with pytest.raises(MixError, match="NaN"):
        FACTORIES[name]().fit(X, np.r_[y[:-1], np.nan])
    with pytest.raises(MixError, match="5 tasks"):
        FACTORIES[name]().fit(X, y).predict(np.full((1, 5), 0.2))


def test_regmix_asks_for_its_evaluation_data():
    with pytest.raises(MixError, match="evaluation data"):
        RegMix().fit(*trials())


def test_small_sets_get_small_leaves():
    X, y = trials(30)
    assert np.ptp(LightGBM().fit(X, y).mean(X)) > 0.1


@pytest.mark.parametrize("law", [ExpLaw, PowerLaw, BiMix, TransferLaw])
def test_gradients_of_the_laws(law):
    X, y = trials(20)
    X[:3, 1] = 0  # a share of 0 has a slope too
    objective = law()._objective(X, y, np.full(20, 0.05))
    for start in law()._starts(X, y):
        assert check_grad(lambda t: objective(t)[0], lambda t: objective(t)[1], start) < 1e-5


@pytest.mark.parametrize("law", [ExpLaw, PowerLaw, BiMix, TransferLaw])
def test_laws_mirror_a_score(law):
    X, y = trials(noise=0)
    loss, score = law().fit(X, y).mean(X), law(goal="max").fit(X, 10 - y).mean(X)
    assert np.corrcoef(10 - score, loss)[0, 1] > 0.98  # bimix has no constant of its own to take up the shift


PLANTED = {
    "exp": lambda X: 1.5 + np.exp(0.3 - 2 * X[:, 0] - X[:, 1]),
    "power": lambda X: 1.5 + 0.8 * (0.05 + X @ [1.0, 0.3, 0.1, 0.02]) ** -0.4,
    "bimix": lambda X: np.sum([1.2, 0.8, 0.3, 0.1] * (X + 0.01) ** -np.array([0.15, 0.3, 0.1, 0.4]), axis=1),
    "transfer": lambda X: 1.5 + 0.8 * (0.05 + X ** [1.0, 0.5, 0.3, 0.7] @ np.array([1.0, 0.4, 0.1, 0.02])) ** -0.4,
}


@pytest.mark.parametrize("name", PLANTED)
def test_a_law_finds_its_own_kind(name):
    """Trials made by the law, without noise: mixtures not tried are predicted, to 5 % of their spread."""
    rng = np.random.default_rng(0)
    X, new = rng.dirichlet(np.full(4, 0.7), 80), rng.dirichlet(np.full(4, 0.7), 200)
    truth, mean = PLANTED[name](new), SURROGATES[name]().fit(X, PLANTED[name](X)).mean(new)
    assert np.sqrt(np.mean((mean - truth) ** 2)) < 0.05 * truth.std()


@pytest.mark.parametrize("law", [PowerLaw, BiMix, TransferLaw])
def test_no_law_runs_away_from_an_outlier(law):
    rng = np.random.default_rng(1)
    X = rng.dirichlet(np.full(4, 0.7), 40)
    y = 80 + rng.standard_normal(40)
    y[int(np.argmin(X[:, 0]))] = 30
    mean = law(goal="max").fit(X, y).mean(rng.dirichlet(np.full(4, 0.1), 300))
    assert mean.min() >= y.min() - 0.25 * np.ptp(y) - 1e-9


@pytest.mark.parametrize("tied", [None, 0.3])
def test_gradient_of_the_gp(tied):
    rng = np.random.default_rng(0)
    z, theta, y = rng.normal(size=(20, 3)), 0.3 * rng.normal(size=6), rng.normal(size=20)

    def value(t):
        likelihood, slope = _negative_log_likelihood(t, z, z @ z.T / 3, y, np.ones(20))
        prior, by_prior = _negative_log_prior(
            t, np.full(6, 0.2), np.array([1, 1, 1, 2, 2, 2.0]), tied, np.array([1, 1, 0], bool)
        )
        return likelihood + prior, slope + by_prior

    assert check_grad(lambda t: value(t)[0], lambda t: value(t)[1], theta) < 1e-5


def test_tied_lengths_are_a_normal_prior_with_a_common_part():
    theta, tied = np.array([0.5, -0.2, 0.9, 0.0, 0.0, 0.0]), 0.3
    covariance = tied**2 * np.eye(3) + np.ones((3, 3))
    value, _ = _negative_log_prior(theta, np.zeros(6), np.ones(6), tied, np.ones(3, bool))
    assert value == pytest.approx(0.5 * theta[:3] @ np.linalg.solve(covariance, theta[:3]))
    X, y = trials(40, K=5, noise=0.2)
    spread = {tied: np.ptp(GaussianProcess(tied=tied).fit(X, y).theta[:5]) for tied in (0.05, None)}
    assert spread[0.05] < 0.5 * spread[None]


def test_warped_gp_mirrors_scores_and_never_leaves_its_bound():
    X, y = trials(60, noise=0.0)
    new, truth = trials(40, noise=0.0, seed=3)
    low, high = WarpedGP().fit(X, y), WarpedGP(goal="max").fit(X, -y)
    np.testing.assert_allclose(high.mean(new), -low.mean(new), rtol=1e-6)
    np.testing.assert_allclose(low.mean(new), truth, atol=0.03)
    assert np.all(low.mean(np.eye(4)) > y.min() - 2 * y.std())
    scaled = WarpedGP().fit(X, 100 * y + 7)  # units do not matter
    np.testing.assert_allclose(scaled.mean(new), 100 * low.mean(new) + 7, rtol=1e-5)
    np.testing.assert_allclose(
        scaled.observation_variance(new, None), 1e4 * low.observation_variance(new, None), rtol=1e-3
    )


def test_gp_left_out_in_closed_form_is_leaving_out():
    X, y = trials(30)
    model = GaussianProcess(iterations=20).fit(X, y)
    folds = grouped_folds(np.arange(30), 5, 0)
    mean, _ = model.left_out(folds)
    z, d = model._z, X.shape[1]
    for held in folds:
        kept = np.setdiff1d(np.arange(30), held)
        kernel = model._cross(z) + (np.exp(model.theta[d + 2]) + 1e-8) * np.eye(30)
        target = (y - y.mean()) / y.std()
        direct = kernel[np.ix_(held, kept)] @ np.linalg.solve(kernel[np.ix_(kept, kept)], target[kept])
        np.testing.assert_allclose(mean[held], y.mean() + y.std() * direct, atol=1e-8)


def test_gp_draws_have_the_posterior_moments():
    X, y = trials(30)
    model = GaussianProcess().fit(X, y)
    new, _ = trials(5, seed=2)
    draws = model.sample(new, 20000, seed=0)
    np.testing.assert_allclose(draws.mean(axis=0), model.mean(new), atol=0.003)
    np.testing.assert_allclose(draws.var(axis=0), model.variance(new), rtol=0.06)
    gap = model.difference_variance(new[0], new[1])
    assert (draws[:, 0] - draws[:, 1]).var() == pytest.approx(gap, rel=0.06)


def test_folds_keep_groups_together():
    groups = np.repeat(np.arange(8), 3)
    folds = grouped_folds(groups, 5, seed=1)
    assert sorted(np.concatenate(folds).tolist()) == list(range(24))
    assert all(set(groups[a]).isdisjoint(groups[b]) for i, a in enumerate(folds) for b in folds[i + 1 :])


def test_conformal_quantile_by_hand():
    assert conformal_quantile(np.arange(1.0, 20.0), 0.9) == 18.0  # the 18th of 19: ceil(0.9 * 20)
    assert conformal_quantile(np.arange(1.0, 6.0), 0.9) == 5.0  # too few for 90 %: the largest


def test_the_table_of_names_is_complete():
    assert {"linear", "ridge", "lightgbm", "regmix", "exp", "power", "gp", "stack"} <= set(SURROGATES)


def many_trials(n):
    draw = np.random.default_rng(3)
    X = draw.dirichlet(np.ones(5), n)
    return X, 2 + np.exp(-4 * X @ draw.random(5)) + 0.3 * np.sqrt(X[:, 1]) + 0.01 * draw.standard_normal(n)


def test_the_search_of_a_process_is_bounded_and_all_trials_make_its_posterior(monkeypatch):
    X, y = many_trials(600)
    sizes = []
    likelihood = gaussian_process._negative_log_likelihood
    monkeypatch.setattr(
        gaussian_process, "_negative_log_likelihood", lambda *args: sizes.append(len(args[1])) or likelihood(*args)
    )
    bounded = GaussianProcess().fit(X[:450], y[:450])
    assert set(sizes) == {gaussian_process.SEARCH}
    assert bounded._chol.shape == (450, 450)
    monkeypatch.setattr(gaussian_process, "SEARCH", 10**6)
    whole = GaussianProcess().fit(X[:450], y[:450])
    errors = [float(np.mean((model.mean(X[450:]) - y[450:]) ** 2)) for model in (bounded, whole)]
    assert errors[0] < 1.1 * errors[1], "nothing is lost by it"
    few = GaussianProcess().fit(X[:100], y[:100])
    monkeypatch.undo()
    assert np.array_equal(GaussianProcess().fit(X[:100], y[:100]).theta, few.theta), "few trials: as without a bound"


def test_noise_priors_are_told_apart_by_some_of_many_trials(monkeypatch):
    X, y = many_trials(560)
    sizes = []
    fit = GaussianProcess.fit
    monkeypatch.setattr(GaussianProcess, "fit", lambda self, *a, **k: sizes.append(len(k["y"])) or fit(self, *a, **k))
    stack_module = Stack(candidates={"gp": GaussianProcess(noise=None)}, folds=3)
    stack_module.fit(X, y)
    assert max(sizes[:12]) == stack.PILOT, "three priors, each with three folds"
    assert max(sizes) == 560
    assert stack_module.weights == {"gp": 1.0}
