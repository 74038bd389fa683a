"""Search: finds the optimum of a quadratic, resumes, and does not sell noise as an improvement."""

import json

import numpy as np
import pytest

from mtft.common.errors import MergeError
from mtft.evaluation.task_scores import TaskScores
from mtft.merge.search.pareto import pareto_front
from mtft.merge.search.search_trials import SearchTrial
from mtft.merge.search.weight_search import front_weights, run_weight_search

NAMES = ("a", "b", "c")
BEST = np.array([0.9, 0.4, 0.6])


def bowl(weights):
    away = np.asarray(weights) - BEST
    return {"x": 1 + float(away @ away), "y": 2 + float((away[0] - away[1]) ** 2 + 0.3 * away[2] ** 2)}


@pytest.mark.parametrize("by", ["cobyqa", "cma"])
def test_quadratic_optimum(by):
    found = run_weight_search(NAMES, bowl, by, budget=80 if by == "cobyqa" else 400)
    np.testing.assert_allclose(found.weights, BEST, atol=0.03)
    assert found.improvement > 0


def test_grid_tries_the_scales_and_no_more():
    found = run_weight_search(NAMES, bowl, "grid")
    assert {trial.weights for trial in found.trials} == {(s, s, s) for s in (0.3, 0.5, 0.7, 1.0, 1.3)}
    assert found.weights == (0.7, 0.7, 0.7)


def test_objective_is_the_share_of_the_gap_plus_the_worst():
    base, single = {"x": 3.0, "y": 3.0, "z": 1.0}, {"x": 1.0, "y": 2.0, "z": 1.0}
    found = run_weight_search(NAMES, lambda w: {"x": 2.0, "y": 2.1, "z": 9.0}, base=base, single=single, worst=0.5)
    assert found.uniform.objective == pytest.approx((0.5 + 0.1) / 2 + 0.5 * 0.5)  # z: the expert learnt nothing
    with pytest.raises(MergeError, match="no expert"):
        run_weight_search(NAMES, lambda w: {"z": 9.0}, base=base, single=single)


def test_lorahub_may_go_negative_and_is_drawn_to_zero():
    found = run_weight_search(
        NAMES, lambda w: {"x": float((w[0] + 0.5) ** 2 + (w[1] - 0.5) ** 2 + 1e-9 * w[2])}, "lorahub", budget=100
    )
    # d/dw (w + .5)^2 + .05/3 |w| = 0 at |w| = .5 - .05/6
    np.testing.assert_allclose(found.best.weights[:2], [-0.5 + 0.05 / 6, 0.5 - 0.05 / 6], atol=0.02)
    assert abs(found.best.weights[2]) < 0.05


def test_ledger_resumes_and_belongs_to_its_adapters(tmp_path):
    calls = []

    def counted(weights):
        calls.append(tuple(weights))
        return bowl(weights)

    first = run_weight_search(NAMES, counted, "cobyqa", budget=12, ledger=tmp_path / "trials.jsonl")
    lines = (tmp_path / "trials.jsonl").read_text().splitlines()
    assert len(lines) == len(first.trials)
    (tmp_path / "trials.jsonl").write_text("\n".join(lines[:8]) + "\n" + lines[8][:20])
    done = {tuple(json.loads(line)["weights"]) for line in lines[:8]}
    calls.clear()
    again = run_weight_search(NAMES, counted, "cobyqa", budget=12, ledger=tmp_path / "trials.jsonl")
    assert again.best == first.best
    assert not done & set(calls[:-3])  # only the verdict looks at known weights again
    with pytest.raises(MergeError, match="other adapters"):
        run_weight_search(("a", "b", "d"), bowl, ledger=tmp_path / "trials.jsonl")


def noisy(sigma, seed):
    rng = np.random.default_rng(seed)
    noise = rng.normal(size=(400, 3)) * sigma

    def evaluate(weights):
        losses = noise @ (np.asarray(weights) - 1) + 2  # mean nearly flat; examples differ
        return {"x": TaskScores("x", tuple(map(str, range(400))), 10 * losses, np.full(400, 10), np.zeros(400))}

    return evaluate


def test_a_weight_each_must_beat_the_common_weight():
    """The bowl's floor lies at equal weights of one half; what differs between the adapters is noise of the rows."""

    def rows(seed):
        tilt = np.random.default_rng(seed).normal(size=(400, 3)) * 2

        def evaluate(weights):
            losses = 2 + np.sum((np.asarray(weights) - 0.5) ** 2) + tilt @ (np.asarray(weights) - np.mean(weights))
            return {"x": TaskScores("x", tuple(map(str, range(400))), 10 * losses, np.full(400, 10), np.zeros(400))}

        return evaluate

    found = run_weight_search(NAMES, rows(1), "cobyqa", check=rows(2), budget=30)
    assert len(set(found.best.weights)) == 3  # fitted to the rows
    assert found.weights == (0.5, 0.5, 0.5)
    assert "the common weight 0.5 beats the uniform merge" in found.verdict
    assert "a weight each is no better than the common weight 0.5" in found.verdict
    assert found.improvement == pytest.approx(0.75, abs=0.05)


def test_noise_is_no_improvement_on_other_data():
    stayed = [
        run_weight_search(NAMES, noisy(1, s), "cobyqa", budget=20, check=noisy(1, 100 + s)).weights for s in range(10)
    ]
    assert sum(weights == (1.0, 1.0, 1.0) for weights in stayed) >= 8


def test_a_real_gain_passes_the_verdict():
    def evaluate(weights):
        loss = bowl(weights)["x"] + np.random.default_rng(0).normal(size=400)
        return {"x": TaskScores("x", tuple(map(str, range(400))), 10 * loss, np.full(400, 10), np.zeros(400))}

    found = run_weight_search(NAMES, evaluate, "cobyqa", check=evaluate)
    assert "beats" in found.verdict
    assert found.error < 1e-6  # the examples' noise is common to both and cancels


def test_front_weights_spread_over_the_trade_offs():
    found = np.array(front_weights(3, 43, 0.5))
    np.testing.assert_array_equal(found[:3], np.eye(3))
    assert len({tuple(w) for w in found}) == 43
    assert found.min() >= 0
    assert found.max() <= 1
    convex, strong = found[3::2], found[4::2]
    np.testing.assert_allclose(convex.sum(axis=1), 1)
    assert strong.sum(axis=1).max() <= 1.5 + 1e-9  # K times the best common scale
    assert np.abs(convex.mean(axis=0) - 1 / 3).max() < 0.1
    assert front_weights(3, 20, 0.5) == [tuple(w) for w in front_weights(3, 43, 0.5)[:20]]


def test_a_preference_picks_from_the_front_without_new_trials(tmp_path):
    """Two tasks that want opposite weights: more preference, less loss on that task, and no call of evaluate."""
    calls = []

    def evaluate(weights):
        calls.append(weights)
        return {"x": 1 + (weights[0] - 1) ** 2 + weights[1] ** 2, "y": 1 + weights[0] ** 2 + (weights[1] - 1) ** 2}

    ledger = {"budget": 45, "ledger": tmp_path / "trials.jsonl"}
    first = run_weight_search(("a", "b"), evaluate, "front", **ledger)
    tried = len(first.trials)
    chosen = []
    for share in (0.05, 0.3, 0.5, 0.7, 0.95):
        calls.clear()
        found = run_weight_search(("a", "b"), evaluate, "front", prefer={"x": share, "y": 1 - share}, **ledger)
        assert len(found.trials) == tried
        assert len(calls) <= 3  # the verdict alone
        assert found.best in pareto_front(found.trials)
        chosen.append(found.best.losses)
    assert [row["x"] for row in chosen] == sorted((row["x"] for row in chosen), reverse=True)
    assert [row["y"] for row in chosen] == sorted(row["y"] for row in chosen)
    assert chosen[0]["y"] < 1.05 < 1.5 < chosen[0]["x"]


def test_preferences_that_prefer_nothing_are_refused():
    for prefer in ({"x": 0.0}, {"x": -1.0, "y": 2.0}, {"x": float("nan")}):
        with pytest.raises(MergeError, match="prefer"):
            run_weight_search(NAMES, bowl, prefer=prefer)
    with pytest.raises(MergeError, match="no preferred task"):
        run_weight_search(NAMES, bowl, prefer={"elsewhere": 1.0})


def test_mistakes():
    with pytest.raises(MergeError, match="unknown search"):
        run_weight_search(NAMES, bowl, "random")
    with pytest.raises(MergeError, match="losses"):
        run_weight_search(NAMES, lambda w: {"x": float("nan")})


def test_pareto_front():
    trials = [
        SearchTrial((float(i),), {"x": x, "y": y}, 0.0)
        for i, (x, y) in enumerate([(1, 3), (2, 2), (3, 1), (2, 3), (3, 3)])
    ]
    assert [trial.weights[0] for trial in pareto_front(trials)] == [0, 1, 2]
