"""Golden values by hand from the papers' rules; states survive JSON; bounds hold."""

import json
from dataclasses import asdict

import numpy as np
import pytest

from data_mixers import Bounds
from data_mixers.online.bandit import OnlineBandit
from data_mixers.online.group_dro import DoReMi
from data_mixers.online.linear_law import Aioli


def test_doremi_golden():
    state = DoReMi.start([1 / 3] * 3).update([0.5, 0.0, 1.0])
    np.testing.assert_allclose(state.alpha, [0.3071985, 0.18633842, 0.50646308], atol=1e-8)
    np.testing.assert_allclose(state.shares, state.alpha)


def test_doremi_absent_domain_keeps_its_score_and_the_result_is_the_mean():
    first = DoReMi.start([0.5, 0.5]).update([1.0, 0.2])
    assert first.update([np.nan, 0.2]).alpha == first.update([1.0, 0.2]).alpha
    second = first.update([0.0, 3.0])
    np.testing.assert_allclose(second.shares, (np.array(first.alpha) + second.alpha) / 2)


def test_odm_golden():
    state = OnlineBandit.start(3)
    for task, loss in [(0, 3), (1, 2), (2, 4)]:
        state = state.update({task: loss})
        np.testing.assert_allclose(state.shares, [1 / 3] * 3)
    state = state.update({2: 4})
    np.testing.assert_allclose(state.shares, [0.32854177, 0.32607061, 0.34538762], atol=1e-8)


def test_odm_with_rows_of_several_tasks_in_a_step():
    """Draws of weight n_k / G: a step of one task alone is the paper's; one that holds the shares adds loss / 10
    to every reward."""
    one = OnlineBandit.start(3).update({1: 2.0})
    assert OnlineBandit.start(3).update({1: 2.0}, drawn=[0.0, 3.0, 0.0]) == one
    even = OnlineBandit.start(3).update({0: 3.0, 1: 2.0, 2: 4.0}, drawn=[1.0, 1.0, 1.0])
    np.testing.assert_allclose(even.rewards, [0.3, 0.2, 0.4])


def test_odm_does_not_overflow():
    state = OnlineBandit.start(2)
    for _ in range(50):
        state = state.update({0: 1e6, 1: 1.0})
    assert np.all(np.isfinite(state.shares))
    assert state.shares[0] > state.shares[1]


def test_aioli_golden():
    D = np.array([[0.4, 0.2], [0.1, 0.1]])
    state = Aioli.start(2, h=0.75, eta=0.5)
    np.testing.assert_allclose(state.probes(), [[0.75, 0.25], [0.25, 0.75]])
    np.testing.assert_allclose(state.law(D), [[0.5, 0.1], [0.1, 0.1]], atol=1e-12)
    np.testing.assert_allclose(state.update(D).shares, [0.549834, 0.450166], atol=1e-6)


def test_aioli_with_what_the_probes_really_held():
    D = np.array([[0.4, 0.2], [0.1, 0.1]])
    state = Aioli.start(2, h=0.75, eta=0.5, shares=[0.2, 0.8])
    np.testing.assert_allclose(state.law(D, state.probes()), state.law(D), atol=1e-12)
    H = np.array([[0.6, 0.4], [0.3, 0.7]])
    np.testing.assert_allclose(state.law(D, H) @ H.T, D, atol=1e-12)
    same = np.array([[0.5, 0.5], [0.5, 0.5]])  # probes that can't be told apart say nothing about one task or the other
    np.testing.assert_allclose(state.update(D, H=same).shares, [0.2, 0.8])


@pytest.mark.parametrize("state", [DoReMi.start([0.5, 0.5]), OnlineBandit.start(2), Aioli.start(2, ema=0.3)])
def test_states_go_through_json_and_keep_bounds(state):
    bounds = Bounds(caps={"a": 0.55}, names=("a", "b"))
    seen = {DoReMi: [2.0, 0.0], OnlineBandit: {0: 9.0}, Aioli: np.array([[9.0, 0.1], [0.1, 0.1]])}[type(state)]
    for _ in range(12):
        state = state.update(seen, bounds)
    assert state.shares[0] <= 0.55 + 1e-9
    again = type(state)(
        **{k: tuple(v) if isinstance(v, list) else v for k, v in json.loads(json.dumps(asdict(state))).items()}
    )
    assert again == state
    assert np.array_equal(again.update(seen, bounds).shares, state.update(seen, bounds).shares)
