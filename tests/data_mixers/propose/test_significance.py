"""Error rates of the verdict: no effect -> "better" in at most 5 %; a gain of 3 noise sd -> in at least 80 %."""

import numpy as np
import pytest

from data_mixers import Mixture
from data_mixers.fitting.surrogate_fits import fit_surrogates
from data_mixers.propose.proposal import propose_mixture
from data_mixers.propose.significance import AFFORDABLE, _verdict_text, judge
from data_mixers.sweep.ledger import TrialLedger
from data_mixers.sweep.trial import TrialRecord

NAMES = ("a", "b", "c", "d")
CURRENT = Mixture(NAMES, np.full(4, 0.25))
BEST = np.array([0.55, 0.25, 0.15, 0.05])


def surface(rows):
    return np.sum((np.sqrt(rows) - np.sqrt(BEST)) ** 2, axis=1)


def verdict(rows, scores, seed, kl):
    records = [
        TrialRecord(
            trial=str(i), status="done", mixture=dict(zip(NAMES, row, strict=True)), scores={"loss": float(score)}
        )
        for i, (row, score) in enumerate(zip(rows, scores, strict=True))
    ]
    return propose_mixture(
        fit_surrogates(TrialLedger(None, records), surrogate="gp"), prior=CURRENT, kl=kl, seed=seed
    ).verdict


@pytest.mark.parametrize(
    ("more", "expected"),
    [
        (None, "no gain is expected here"),
        (AFFORDABLE, f"about {AFFORDABLE} more trials would show the gain"),
        (AFFORDABLE + 1, "more than 10,000 more trials would be needed"),
    ],
)
def test_says_how_many_more_trials_only_where_somebody_could_run_them(more, expected):
    text = _verdict_text("not distinguishable from your current mixture", 0.1, (-1.0, 1.0), 0.5, 1.0, more, 0.9)
    assert expected in text
    assert str(AFFORDABLE + 1) not in text


def test_a_proposal_that_the_judge_does_not_believe_in_is_not_better():
    """Halves of the trials agree that some mixtures are better than a poor one; the proposal is not one of them."""
    rng = np.random.default_rng(4)
    rows = rng.dirichlet(np.ones(4), 60)
    records = [
        TrialRecord(
            trial=str(i), status="done", mixture=dict(zip(NAMES, row, strict=True)), scores={"loss": float(score)}
        )
        for i, (row, score) in enumerate(zip(rows, surface(rows) + 0.005 * rng.standard_normal(60), strict=True))
    ]
    fits = fit_surrogates(TrialLedger(None, records), surrogate="gp")
    poor, bad = np.array([0.25, 0.25, 0.1, 0.4]), np.array([0.02, 0.03, 0.05, 0.9])
    words = [
        judge(
            fits, np.ones(1), np.vstack([first, BEST, rows]), poor, kl=0.0, prior_K=np.full(4, 0.25), min_gain=0.0,
            level=0.9,
        ).word
        for first in (BEST, bad)
    ]  # fmt: skip
    assert words == ["better", "not distinguishable from your current mixture"]


@pytest.mark.slow
def test_shuffled_scores_are_not_called_better():
    wrong, cases = 0, 40
    for case in range(cases):
        rng = np.random.default_rng(case)
        rows = rng.dirichlet(np.ones(4), 32)
        wrong += verdict(rows, rng.permutation(surface(rows)), case, 0.05) == "better"
    assert wrong <= 0.05 * cases


@pytest.mark.slow
def test_a_gain_of_three_noise_sd_is_found():
    noise = surface(CURRENT.shares[None])[0] / 3
    found, cases = 0, 15
    for case in range(cases):
        rng = np.random.default_rng(1000 + case)
        rows = rng.dirichlet(np.ones(4), 48)
        found += verdict(rows, surface(rows) + noise * rng.standard_normal(48), case, 0.0) == "better"
    assert found >= 0.8 * cases
