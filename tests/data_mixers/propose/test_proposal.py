"""Golden optima of convex laws (cvxpy as oracle where installed), metamorphic properties, honest verdicts."""

import itertools
import json

import numpy as np
import pytest

from data_mixers import Bounds, Group, Infeasible, MixError, Mixture, uniform
from data_mixers.fitting.surrogate_fits import fit_surrogates
from data_mixers.propose.optimizer import minimize, minimize_convex
from data_mixers.propose.proposal import propose_mixture, standardized
from data_mixers.sweep.ledger import TrialLedger
from data_mixers.sweep.trial import Trial, done_records

NAMES = ("a", "b", "c")


def law(c, t):
    c, t = np.array(c, dtype=float), np.array(t, dtype=float)

    def value(p):
        power = np.exp(c + t @ p)
        return float(power.mean()), power @ t / len(c)

    return value


GOLDEN = [
    ((0,), ((-1, -2, 0),), (1 / 3,) * 3, {}, (0.05337384, 0.94360714, 0.00301902), 0.187115104),
    ((0,), ((-1, -2, 0),), (1 / 3,) * 3, {"b": 0.5}, (0.49443816, 0.5, 0.00556184), 0.243120301),
    (
        (0, -0.5),
        ((-3, 0, 0), (0, -2, -1)),
        (0.5, 0.3, 0.2),
        dict.fromkeys(NAMES, 0.6),
        (0.58247519, 0.39927308, 0.01825173),
        0.229075639,
    ),
]


@pytest.mark.parametrize(("c", "t", "prior", "caps", "best", "value"), GOLDEN)
def test_golden(c, t, prior, caps, best, value):
    bounds, prior_K = Bounds(caps=caps, names=NAMES), np.array(prior)
    p, objective = minimize_convex(law(c, t), bounds, kl=0.05, prior_K=prior_K)
    np.testing.assert_allclose(p, best, atol=2e-6)
    assert objective == pytest.approx(value, abs=2e-9)
    starts = np.random.default_rng(0).dirichlet(np.ones(3), 20)
    found, reached = minimize(
        lambda rows: np.exp(np.array(c) + rows @ np.array(t).T).mean(axis=1), bounds, starts, kl=0.05, prior_K=prior_K
    )
    assert reached == pytest.approx(value, abs=1e-5)
    assert bounds.violations(found) == []


def random_law(rng):
    K = int(rng.integers(2, 12))
    names = tuple(f"t{k}" for k in range(K))
    caps = dict(zip(names, np.clip(rng.uniform(0.5, 4, K) / K, 0, 1), strict=True))
    floors = dict(zip(names, np.where(rng.random(K) < 0.2, rng.random(K) * 0.2 / K, 0), strict=True))
    groups = (Group("g", names[: K // 2], 0.1, rng.uniform(0.4, 1)),) if K > 3 and rng.random() < 0.5 else ()
    bounds = Bounds(floors, caps, groups, names=names)
    I = int(rng.integers(1, 4))
    return bounds, rng.normal(size=I), -np.abs(rng.normal(size=(I, K))) * 3, rng.dirichlet(np.ones(K))


@pytest.mark.slow
def test_a_convex_solver_finds_nothing_better():
    import cvxpy

    rng, solved = np.random.default_rng(5), 0
    for _ in range(60):
        bounds, c, t, prior_K = random_law(rng)
        try:
            p, reached = minimize_convex(law(c, t), bounds, kl=0.05, prior_K=prior_K)
        except Infeasible:
            continue
        solved += 1
        assert bounds.violations(p) == []
        x = cvxpy.Variable(len(p))
        limits = [cvxpy.sum(x) == 1, x >= bounds.lower(), x <= bounds.upper()]
        for group, mask in zip(bounds.groups, bounds.member_masks(), strict=True):
            limits += [cvxpy.sum(x[mask]) >= group.low, cvxpy.sum(x[mask]) <= group.high]
        q = np.maximum(prior_K, 1e-6)
        f = cvxpy.sum(cvxpy.exp(c + t @ x)) / len(c) + 0.05 * (cvxpy.sum(-cvxpy.entr(x)) - np.log(q) @ x)
        oracle = cvxpy.Problem(cvxpy.Minimize(f), limits).solve(solver=cvxpy.CLARABEL)
        assert reached <= oracle + 1e-6
    assert solved > 30


def ledger_of(rows, scores, goal="min", names=NAMES):
    ledger = TrialLedger()
    for seed, (row, score) in enumerate(zip(rows, scores, strict=True)):
        trial = Trial(Mixture(names, np.array(row)), seed=seed, goal={"loss": goal})
        ledger.append(done_records(trial, [(1.0, {"loss": float(score)})], 1.0))
    return ledger


def surface(rows):
    return np.sum((np.sqrt(rows) - np.sqrt([0.6, 0.3, 0.1])) ** 2, axis=1)


@pytest.fixture(scope="module")
def trials():
    rng = np.random.default_rng(0)
    rows = rng.dirichlet(np.ones(3), 40)
    return rows, surface(rows) + 0.005 * rng.standard_normal(40)


CURRENT = Mixture(NAMES, np.array([0.1, 0.2, 0.7]))


def test_it_finds_the_minimum_and_says_better(trials):
    proposal = propose_mixture(fit_surrogates(ledger_of(*trials)), prior=uniform(NAMES), current=CURRENT, kl=0.0)
    assert proposal.verdict == "better"
    assert proposal.kept == proposal.mixture
    assert proposal.mixture.l1(Mixture(NAMES, np.array([0.6, 0.3, 0.1]))) < 0.12
    mean, lower, upper = proposal.predicted["loss"]
    assert lower < mean < upper
    json.dumps(proposal.as_dict())


def test_the_current_optimum_is_kept(trials, tmp_path):
    best = Mixture(NAMES, np.array([0.6, 0.3, 0.1]))
    proposal = propose_mixture(fit_surrogates(ledger_of(*trials)), prior=uniform(NAMES), current=best, kl=0.0)
    assert proposal.verdict in ("not distinguishable from your current mixture", "worse")
    proposal.to_yaml(tmp_path / "mixture.yaml")
    assert Mixture.from_yaml(tmp_path / "mixture.yaml") == best
    assert "more trials" in proposal.text or "no gain" in proposal.text or proposal.verdict == "worse"


def test_noise_is_called_no_signal_or_undecided():
    rng = np.random.default_rng(3)
    rows = rng.dirichlet(np.ones(3), 30)
    proposal = propose_mixture(
        fit_surrogates(ledger_of(rows, rng.standard_normal(30))), prior=uniform(NAMES), current=CURRENT
    )
    assert proposal.verdict in ("no signal", "not distinguishable from your current mixture")
    assert proposal.kept == CURRENT


@pytest.mark.slow
def test_goals_mirror_and_units_do_not_matter(trials):
    rows, y = trials
    plain = propose_mixture(fit_surrogates(ledger_of(rows, y), surrogate="gp"), prior=uniform(NAMES), current=CURRENT)
    for scores, goal in ((-y, "max"), (100 * y + 7, "min")):
        other = propose_mixture(
            fit_surrogates(ledger_of(rows, scores, goal), surrogate="gp"), prior=uniform(NAMES), current=CURRENT
        )
        assert other.mixture.l1(plain.mixture) < 1e-3
        assert other.verdict == plain.verdict
        assert other.gain == pytest.approx(plain.gain, abs=1e-3)


def test_permuting_tasks_permutes_the_proposal(trials):
    rows, y = trials
    order = [2, 0, 1]
    names = tuple(NAMES[i] for i in order)
    plain = propose_mixture(fit_surrogates(ledger_of(rows, y), surrogate="gp"), prior=uniform(NAMES))
    turned = propose_mixture(
        fit_surrogates(ledger_of(rows[:, order], y, names=names), surrogate="gp"), prior=uniform(names)
    )
    assert plain.mixture.l1(turned.mixture) < 0.01


def test_tighter_caps_are_never_better(trials):
    fits = fit_surrogates(ledger_of(*trials), surrogate="gp")
    values = [
        propose_mixture(fits, bounds=Bounds(caps={"a": cap}), prior=uniform(NAMES)).objective
        for cap in (1.0, 0.5, 0.35, 0.3)
    ]
    assert all(later >= earlier - 1e-6 for earlier, later in itertools.pairwise(values))
    capped = propose_mixture(fits, bounds=Bounds(caps={"a": 0.3}), prior=uniform(NAMES))
    assert capped.binding == ["cap of a (0.3)"]
    assert capped.mixture["a"] <= 0.3 + 1e-9


def test_worst_balances_two_targets_that_pull_apart():
    rng, ledger = np.random.default_rng(2), TrialLedger()
    for seed, row in enumerate(rng.dirichlet(np.ones(3), 40)):
        scores = {"a/loss": float(np.exp(-3 * row[0])), "b/loss": float(np.exp(-3 * row[1]))}
        ledger.append(done_records(Trial(Mixture(NAMES, row), seed=seed), [(1.0, scores)], 1.0))
    fits = fit_surrogates(ledger, surrogate="gp")
    worst = propose_mixture(fits, "worst", prior=uniform(NAMES), current=CURRENT, kl=0.0)
    assert worst.verdict == "better"
    a, b = standardized(fits, worst.mixture.shares[None])[:, 0]
    assert a == pytest.approx(b, abs=0.02)  # the minimum of a maximum lies where the two are equal
    assert worst.mixture["c"] < 0.05
    only_a = propose_mixture(fits, {"a/loss": 1.0}, prior=uniform(NAMES), kl=0.0)
    assert only_a.mixture["a"] > 0.9


def test_objectives_are_checked(trials):
    fits = fit_surrogates(ledger_of(*trials), surrogate="ridge")
    with pytest.raises(MixError, match="did you mean 'loss'"):
        propose_mixture(fits, {"los": 1.0}, prior=uniform(NAMES))
    with pytest.raises(MixError, match="mean, worst"):
        propose_mixture(fits, "best", prior=uniform(NAMES))
    with pytest.raises(Infeasible):
        propose_mixture(fits, bounds=Bounds(caps=dict.fromkeys(NAMES, 0.2)), prior=uniform(NAMES))
