"""Giving up trials: the bound by hand, nothing good is given up, the same trials after kills and with workers."""

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from scipy import stats

from data_mixers.fitting.surrogate_fits import fit_surrogates
from data_mixers.mixture.mixture import Mixture
from data_mixers.sweep.early_termination import MINIMUM, EarlyTermination, completed, learn_stop_rule
from data_mixers.sweep.ledger import TrialLedger
from data_mixers.sweep.runner import run_sweep
from data_mixers.sweep.trial import Trial
from tests.data_mixers import toy_trials as toys

GOAL = {"a/loss": "min"}


def trials(n=24):
    return [
        Trial(Mixture.of({"a": (i + 1) / (n + 1), "b": 1 - (i + 1) / (n + 1)}), seed=i, config="c", goal=GOAL)
        for i in range(n)
    ]


def course(n, noise, seed=0):
    """Runs whose loss half way is the loss at the end + 1, and noise."""
    rng = np.random.default_rng(seed)
    final = rng.normal(size=n)
    return [
        [(0.5, {"a/loss": float(y + 1 + noise * rng.standard_normal())}), (1.0, {"a/loss": float(y)})] for y in final
    ]


def test_bound_is_the_prediction_interval_of_a_regression():
    runs = course(12, 0.3)
    rule = learn_stop_rule(runs, GOAL)
    now = np.array([points[0][1]["a/loss"] for points in runs])
    final = np.array([points[1][1]["a/loss"] for points in runs])
    x, y = (now - now.mean()) / now.std(), (final - final.mean()) / final.std()
    line = stats.linregress(x, y)
    s = np.sqrt(np.sum((y - line.intercept - line.slope * x) ** 2) / 10)
    for g in (-1.0, 0.5, 2.0):
        half = stats.t.ppf(0.95, 10) * s * np.sqrt(1 + 1 / 12 + g**2 / 12)
        assert rule.checks[0].bound(g) == pytest.approx(line.intercept + line.slope * g - half)
    assert rule.median == pytest.approx(np.median(y))


def test_it_gives_up_little_that_would_have_been_good():
    """Of the trials in the better half at most 5 % are given up; of the worst tenth most are, where checks say much."""
    lost, good, caught, bad = 0, 0, 0, 0
    for seed in range(60):
        rule = learn_stop_rule(course(10, 0.3, seed), GOAL)
        reference = np.median([points[1][1]["a/loss"] for points in course(10, 0.3, seed)])
        for points in course(40, 0.3, 1000 + seed):
            stopped = rule.hopeless(*points[0])
            final = points[1][1]["a/loss"]
            good, lost = good + (final <= reference), lost + (stopped and final <= reference)
            bad, caught = bad + (final > reference + 1.5), caught + (stopped and final > reference + 1.5)
    assert lost <= 0.05 * good
    assert caught >= 0.7 * bad


def test_checks_that_say_nothing_stop_nothing():
    rng = np.random.default_rng(0)
    noise = [[(0.5, {"a/loss": float(rng.normal())}), (1.0, {"a/loss": float(rng.normal())})] for _ in range(10)]
    rule = learn_stop_rule(noise, GOAL)
    assert rule is None or not any(rule.hopeless(0.5, {"a/loss": x}) for x in np.linspace(-2, 2, 9))
    assert learn_stop_rule(course(MINIMUM - 1, 0.1), GOAL) is None
    assert learn_stop_rule([points[1:] for points in course(10, 0.1)], GOAL) is None  # nothing on the way


def test_diverged_and_missing_scores():
    rule = learn_stop_rule(course(10, 0.1), GOAL)
    assert rule.hopeless(0.5, {"a/loss": float("nan")})
    assert not rule.hopeless(0.5, {"b/loss": 99.0})
    assert not rule.hopeless(0.25, {"a/loss": 99.0})  # no check of the reference there


def test_scores_to_maximise_mirror():
    runs = course(10, 0.2)
    turned = [[(tau, {"a/loss": -score["a/loss"]}) for tau, score in points] for points in runs]
    low, high = learn_stop_rule(runs, GOAL), learn_stop_rule(turned, {"a/loss": "max"})
    for x in np.linspace(-2, 4, 20):
        assert low.hopeless(0.5, {"a/loss": x}) == high.hopeless(0.5, {"a/loss": -x})


def test_a_given_up_trial_is_completed_for_the_fit():
    full = {str(i): {0.5: 2.0 * i + 1, 1.0: 3.0 * i} for i in range(6)}
    last = {trial: (1.0, points[1.0]) for trial, points in full.items()} | {"x": (0.5, 9.0), "y": (0.25, 7.0)}
    ends = completed(last, full | {"x": {0.5: 9.0}, "y": {0.25: 7.0}})
    assert ends["x"] == pytest.approx(12.0)  # 0.5: 9 = 2 * 4 + 1
    assert ends["y"] == 7.0  # no other trial was scored at 0.25
    assert ends["3"] == 9.0


def points_of(ledger):
    return {(record.trial, record.progress): record.scores for record in ledger.records}


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    ledger = TrialLedger(tmp_path_factory.mktemp("plain") / "l.jsonl")
    result = run_sweep(trials(), toys.checked, ledger, backend="inline", stopping=EarlyTermination(), seed=3)
    return points_of(ledger), result


def test_a_sweep_gives_up_bad_trials_and_the_fit_uses_them(plain, tmp_path):
    points, result = plain
    assert len(result.done) == 24
    assert 4 <= len(result.stopped) <= 16
    assert f"({len(result.stopped)} given up early)" in result.text()
    stopped = {trial.mixture["a"] for trial in trials() if trial.id in result.stopped}
    assert min(abs(a - 0.3) for a in stopped) > 0.2  # nothing near the optimum
    ledger = TrialLedger(tmp_path / "l.jsonl")
    run_sweep(trials(), toys.checked, ledger, backend="inline", stopping=EarlyTermination(), seed=3)
    fitted = fit_surrogates(ledger, surrogate="gp")["a/loss"]
    assert len(fitted.arrays.y) == 24
    truth = (fitted.arrays.X[:, 0] - 0.3) ** 2 + 0.5
    np.testing.assert_allclose(fitted.arrays.y, truth, atol=5e-3)


DRIVER = """
import sys
from functools import partial
from data_mixers.sweep.early_termination import EarlyTermination
from data_mixers.sweep.ledger import TrialLedger
from data_mixers.sweep.runner import run_sweep
from tests.data_mixers import toy_trials as toys
from tests.data_mixers.sweep.test_early_termination import trials

if __name__ == "__main__":
    run = partial(toys.checked_slow, sys.argv[2])
    run_sweep(trials(), run, TrialLedger(sys.argv[1]), workers=2, stopping=EarlyTermination(), seed=3)
"""


@pytest.mark.slow
def test_killed_at_random_and_restarted_it_gives_up_the_same_trials(plain, tmp_path):
    (tmp_path / "runs").mkdir()
    script = tmp_path / "drive.py"
    script.write_text(DRIVER)
    command = [sys.executable, str(script), str(tmp_path / "l.jsonl"), str(tmp_path / "runs")]
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[3])}
    times = random.Random(time.time_ns())
    for _ in range(4):
        driver = subprocess.Popen(command, env=environment)
        time.sleep(times.uniform(0.5, 3.0))
        driver.send_signal(signal.SIGKILL)
        driver.wait()
    assert subprocess.run(command, env=environment, check=False).returncode == 0
    assert points_of(TrialLedger(tmp_path / "l.jsonl")) == plain[0]
