"""Scores with bounds: the link itself, and every number of a fit in the units of the scores."""

import json

import numpy as np
import pytest
from scipy.special import expit, logit
from scipy.stats import norm

from data_mixers import MixError, Mixture, propose_mixture
from data_mixers.fitting.logit_link import LogitLink
from data_mixers.fitting.scale_transfer import calibrate
from data_mixers.fitting.surrogate_fits import fit_surrogates
from data_mixers.propose.from_csv import fit_csv, parse_bounds
from data_mixers.propose.significance import judge
from data_mixers.surrogates.stack import spearman
from data_mixers.sweep.ledger import TrialLedger
from data_mixers.sweep.trial import TrialRecord

NAMES = ("a", "b", "c")
UNIT = {"acc": (0.0, 1.0)}


def latent(rows):
    """Logits of the true score: what each task adds is linear in the roots."""
    return np.sqrt(rows) @ np.array([4.0, 1.0, -3.0])


def made(n=40, rows_right=400, seed=0, high=1.0, turn=False, shift=0.0, steep=1.0):
    rng = np.random.default_rng(seed)
    X = rng.dirichlet(np.ones(3), n)
    y = rng.binomial(rows_right, expit(steep * latent(X) + shift)) / rows_right * high
    return X, high - y if turn else y


def ledger(X, y, goal="max", **more):
    return TrialLedger(
        None,
        [
            TrialRecord(
                trial=str(i), status="done", mixture=dict(zip(NAMES, row, strict=True)),
                scores={"acc": float(score), **{name: float(column[i]) for name, column in more.items()}},
                goal={"acc": goal, **dict.fromkeys(more, "min")},
            )
            for i, (row, score) in enumerate(zip(X, y, strict=True))
        ],
    )  # fmt: skip


def test_a_score_at_the_bound_is_pulled_half_way_to_the_next():
    y = np.array([0.0, 0.25, 0.5, 0.9, 1.0])
    link = LogitLink.of(y, 0.0, 1.0)
    np.testing.assert_allclose(link.forward(y), logit([0.125, 0.25, 0.5, 0.9, 0.95]))
    np.testing.assert_allclose(link.inverse(link.forward(y))[1:4], y[1:4])
    # With N rows and the neighbour one row away that is the empirical logit's half row.
    of_rows = LogitLink.of(np.array([48, 49, 50]) / 50, 0.0, 1.0)
    assert of_rows.forward(np.array([1.0]))[0] == pytest.approx(logit(49.5 / 50))
    only_ends = LogitLink.of(np.array([0.0, 100.0]), 0.0, 100.0)
    np.testing.assert_allclose(only_ends.forward(np.array([0.0, 100.0])), [-np.log(3), np.log(3)])


def test_an_interval_reaches_the_bound_only_where_trials_did():
    touched = LogitLink.of(np.array([0.5, 0.9, 1.0]), 0.0, 1.0)
    assert touched.upper_end(np.array([logit(0.94), logit(0.95), 9.0])).tolist() == [pytest.approx(0.94), 1.0, 1.0]
    assert touched.lower_end(np.array([-9.0]))[0] > 0
    never = LogitLink.of(np.array([0.5, 0.9]), 0.0, 1.0)
    assert never.upper_end(np.array([9.0]))[0] == pytest.approx(expit(9.0))


def test_the_slope_is_the_chord_and_its_limit_the_derivative():
    link = LogitLink(0.0, 100.0)
    a, b = np.array([-3.0, 0.2, 30.0, 1.0]), np.array([2.0, 0.2, 29.0, 1.0 + 1e-9])
    expected = 100 * np.array([(expit(-3) - expit(2)) / -5, expit(0.2) * expit(-0.2), 0, expit(1) * expit(-1)])
    np.testing.assert_allclose(link.slope(a, b)[[0, 1, 3]], expected[[0, 1, 3]], rtol=1e-6)
    assert link.slope(a, b)[2] == pytest.approx(100 * (np.exp(-29.0) - np.exp(-30.0)), rel=1e-3)


@pytest.mark.parametrize("link", ["auto", "none", "logit"])
@pytest.mark.parametrize("high", [1.0, 100.0])
def test_predictions_and_intervals_stay_inside_the_bounds(link, high):
    X, y = made(high=high, shift=1.5)
    fits = fit_surrogates(ledger(X, y), bounds={"acc": (0.0, high)}, link=link, surrogate="gp")
    corners = np.vstack([np.eye(3), X])
    mean, lower, upper = fits.predict(corners, level=0.99)["acc"]
    assert np.all((lower >= 0) & (lower <= mean) & (mean <= upper) & (upper <= high))
    for row in fits.report()["targets"]["acc"]["trials"]:
        assert 0 <= row["lower"] <= row["predicted"] <= row["upper"] <= high


def test_what_is_reported_is_in_units_of_the_score():
    X, y = made(n=60, high=100.0, steep=0.3)
    bounds = {"acc": (0.0, 100.0)}
    linked = fit_surrogates(ledger(X, y), bounds=bounds, link="logit", surrogate="gp")["acc"]
    plain = fit_surrogates(ledger(X, y), bounds=bounds, link="none", surrogate="gp")["acc"]
    assert linked.link is not None
    assert plain.link is None
    assert linked.sd == plain.sd == pytest.approx(y.std())
    report = json.loads(json.dumps(linked.report(), allow_nan=False))
    assert report["link"] == "logit"
    assert "fitted by its logit" in linked.text()
    assert "logit" not in plain.text()
    predicted = np.array([row["predicted"] for row in report["trials"]])
    assert [row["measured"] for row in report["trials"]] == pytest.approx(y.tolist())
    assert report["r2"] == pytest.approx(1 - np.mean((y - predicted) ** 2) / y.var())
    assert report["rho"] == pytest.approx(spearman(predicted, y))
    # 400 rows of percent: binomial noise sqrt(p (1 - p) / 400), about 2.4 points; in logits it were 0.1
    truth = expit(0.3 * latent(X))
    noise = 100 * np.sqrt(np.mean(truth * (1 - truth)) / 400)
    assert report["noise_sd"] == pytest.approx(noise, rel=0.3)
    assert plain.noise_sd == pytest.approx(noise, rel=0.3)
    # the density is of the score too: comparable with the fit without a link
    assert linked.nlpd == pytest.approx(plain.nlpd, abs=0.7)
    inside = [row["lower"] <= row["measured"] <= row["upper"] for row in report["trials"]]
    assert np.mean(inside) == pytest.approx(report["coverage"], abs=0.07)


def test_standardised_scores_and_their_difference_are_those_of_the_score():
    X, y = made(n=60)
    fits = fit_surrogates(ledger(X, y), bounds=UNIT, link="logit", surrogate="gp")
    fitted = fits["acc"]
    mean = fits.predict(X)["acc"].mean
    np.testing.assert_allclose(fitted.standardized(fitted.model.mean(X)), -(mean - y.mean()) / y.std())
    low, high = X[np.argmin(y)], X[np.argmax(y)]
    verdict = judge(
        fits, np.ones(1), np.vstack([high, X]), low, kl=0.0, prior_K=np.full(3, 1 / 3), min_gain=0.0, level=0.9
    )
    gain = float(np.diff(fits.predict(np.stack([low, high]))["acc"].mean)[0]) / y.std()
    assert verdict.word == "better"
    assert verdict.gain[0] == pytest.approx(gain, rel=0.15)


def test_the_sign_of_a_gain_is_as_sure_as_that_of_the_logits():
    """One target: P(gain > 0) is the GP's on its own scale, however flat the link is between the two mixtures."""
    X, y = made(n=40, rows_right=30, shift=3.0)  # near 1
    fits = fit_surrogates(ledger(X, y), bounds=UNIT, link="logit", surrogate="gp")
    fitted, a, b = fits["acc"], np.array([0.5, 0.3, 0.2]), np.array([0.2, 0.3, 0.5])
    from data_mixers.propose.significance import GAUSSIAN_90, _difference_variance, _surface

    process = fitted.model.carrier()
    difference = float(np.subtract(*_surface(process, fitted, np.stack([b, a]))))
    sd = np.sqrt(_difference_variance(process, fitted, a, b))
    latent_sd = max(1.0, fitted.model.quantile(0.9) / GAUSSIAN_90) * np.sqrt(process.difference_variance(a, b))
    latent_gain = float(np.subtract(*process.mean(np.stack([a, b]))))
    assert norm.cdf(difference / sd) == pytest.approx(norm.cdf(latent_gain / latent_sd), abs=1e-9)


def test_auto_takes_the_link_that_predicts_better_and_says_which():
    X, y = made(n=48, rows_right=10_000, shift=2.0)
    fitted = fit_surrogates(ledger(X, y), bounds=UNIT, surrogate="linear")["acc"]
    assert fitted.link is not None
    assert fitted.report()["tried"]["logit"] > fitted.report()["tried"]["none"]
    X = np.random.default_rng(3).dirichlet(np.ones(3), 48)
    line = 0.02 + 0.9 * X[:, 0] + 0.05 * X[:, 1] + 0.001 * np.random.default_rng(4).standard_normal(48)
    plain = fit_surrogates(ledger(X, np.clip(line, 0, 1)), bounds=UNIT, surrogate="linear")["acc"]
    assert plain.link is None
    assert "link" in plain.report()


def test_one_open_end_or_a_score_outside_means_no_link():
    X, y = made()
    for bounds in ((0.0, None), (None, 1.0), (None, None)):
        assert fit_surrogates(ledger(X, y), bounds={"acc": bounds}, surrogate="ridge")["acc"].link is None
    with pytest.warns(UserWarning, match=r"acc: bounds 0\.0 to 1\.0, but scores from"):
        fits = fit_surrogates(ledger(X, 100 * y), bounds=UNIT, surrogate="ridge")
    assert fits["acc"].link is None
    with pytest.raises(MixError, match="no target has two bounds"):
        fit_surrogates(ledger(X, y), link="logit", surrogate="ridge")
    with pytest.raises(MixError, match="bounds of acc"):
        fit_surrogates(ledger(X, y), bounds={"acc": (1.0, 0.0)}, surrogate="ridge")


def test_without_bounds_nothing_changes():
    X, y = made()
    before, after = (
        fit_surrogates(ledger(X, y), surrogate="gp", bounds=bounds).report() for bounds in (None, {"acc": (None, None)})
    )
    assert json.dumps(before) == json.dumps(after)


def test_a_constant_score_is_predicted_as_it_is_also_at_a_bound():
    X, _ = made(n=20)
    with pytest.warns(UserWarning, match="every trial has the score 1"):
        fits = fit_surrogates(ledger(X, np.ones(20)), bounds=UNIT)
    assert fits.predict(X[:2])["acc"].mean.tolist() == [1.0, 1.0]


@pytest.mark.parametrize("turn", [False, True])
def test_low_is_good_mirrors_high_is_good(turn):
    """An error rate 1 - y with goal min has the mirrored predictions of y with goal max."""
    X, y = made(turn=turn)
    scores, errors = (
        fit_surrogates(ledger(X, values, goal), bounds=UNIT, link="logit", surrogate=surrogate).predict(X)["acc"]
        for values, goal, surrogate in ((y, "max", "gp"), (1 - y, "min", "gp"))
    )
    np.testing.assert_allclose(scores.mean, 1 - errors.mean, atol=2e-3)
    np.testing.assert_allclose(scores.lower, 1 - errors.upper, atol=5e-3)


def test_a_proposal_on_a_bounded_score_and_a_loss_together():
    X, y = made(n=48)
    loss = 2 - X[:, 0] + 0.01 * np.random.default_rng(5).standard_normal(48)
    fits = fit_surrogates(ledger(X, y, loss=loss), bounds=UNIT, surrogate="gp")
    found = propose_mixture(fits, prior=Mixture(NAMES, np.full(3, 1 / 3)), kl=0.01)
    assert found.verdict == "better"
    assert found.mixture["a"] > 0.6
    assert 0 <= found.predicted["acc"][1] <= found.predicted["acc"][0] <= found.predicted["acc"][2] <= 1


def test_large_runs_are_mapped_in_logits_and_stay_inside():
    X, y = made(n=60, rows_right=2000)
    fits = fit_surrogates(ledger(X, y), bounds=UNIT, link="logit", surrogate="gp")
    large = np.random.default_rng(8).dirichlet(np.ones(3), 12)
    scores = expit(1.5 * latent(large) + 2)
    scores[np.argmax(scores)] = 1.0
    mapped = calibrate(fits, large, scores[None])
    new = np.random.default_rng(9).dirichlet(np.ones(3), 50)
    mean, lower, upper = mapped.predict(new)["acc"]
    assert np.mean(np.abs(mean - expit(1.5 * latent(new) + 2))) < 0.03
    assert np.all((lower >= 0) & (lower <= mean) & (mean <= upper) & (upper <= 1))
    assert "(of logits)" in mapped.text()


def test_bounds_on_the_command_line():
    targets = ("acc", "bleu")
    assert parse_bounds(["0,1"], targets) == {"acc": (0.0, 1.0), "bleu": (0.0, 1.0)}
    assert parse_bounds(["bleu=0,100", "0,1"], targets) == {"acc": (0.0, 1.0), "bleu": (0.0, 100.0)}
    for wrong in ("1", "1,0", "a,b", "0,1,2", "nan,1", "bleu=", "acc=0,", "0,1e300"):
        with pytest.raises(MixError, match="--bounds"):
            parse_bounds([wrong], targets)
    with pytest.raises(MixError, match="did you mean 'bleu'"):
        parse_bounds(["bleau=0,100"], targets)


def test_csv_users_give_bounds(tmp_path):
    X, y = made(n=30)
    lines = [",".join(map(str, [i, *row])) for i, row in enumerate(X)]
    (tmp_path / "x.csv").write_text("\n".join(["id,a,b,c", *lines]) + "\n")
    (tmp_path / "y.csv").write_text("\n".join(["id,acc", *(f"{i},{score}" for i, score in enumerate(y))]) + "\n")
    fits = fit_csv(
        tmp_path / "x.csv", tmp_path / "y.csv", goal="max", bounds=["0,1"], link="logit", surrogate="ridge", index="id"
    )
    assert fits["acc"].link is not None
