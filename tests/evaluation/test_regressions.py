"""The 2 x 2 table by hand."""

import math

import numpy as np
import pytest

from mtft.common.errors import UserError
from mtft.evaluation.regressions import compare_scores, graded_regression, prediction_flips
from mtft.evaluation.task_scores import MetricRows, TaskScores

OLD = [True, True, True, True, False, False, False, False, False, False]
NEW = [True, True, True, False, True, True, False, False, False, False]


def test_table():
    found = prediction_flips(OLD, NEW)
    assert (found.both_right, found.negative, found.positive, found.both_wrong) == (3, 1, 2, 4)
    assert found.negative_rate == pytest.approx(0.1)
    assert found.positive_rate == pytest.approx(0.2)
    assert found.broken_share == pytest.approx(0.25)


def test_the_other_way_round_swaps_the_prediction_flips():
    there, back = prediction_flips(OLD, NEW), prediction_flips(NEW, OLD)
    assert (there.negative, there.positive) == (back.positive, back.negative)


def test_comparison_of_scores_by_hand():
    old = TaskScores("sql", ("a", "b"), np.array([2.0, 1.0]), np.array([2, 1]), np.array([2, 0]))
    new = TaskScores("sql", ("a", "b"), np.array([1.0, 1.5]), np.array([2, 1]), np.array([1, 1]))
    found = compare_scores(old, new, ["loss"])
    assert found["flips"] == {"both_right": 0, "negative": 1, "positive": 1, "both_wrong": 0}
    assert (found["negative_rate"], found["broken_share"]) == (0.5, 1.0)
    assert found["loss_regression"] == pytest.approx(0.25)  # the second example lost 0.5 a token, the first nothing
    assert found["difference"]["loss"]["value"] == pytest.approx(2.5 / 3 - 1)
    lower, upper = found["difference"]["loss"]["interval"]
    assert lower <= found["difference"]["loss"]["value"] <= upper


def scored(right, ids=None, **answered):
    """Examples of one token each, right or not; answered: {metric: (aggregate, numbers)}."""
    right = np.array(right, dtype=np.int64)
    ids = tuple(f"row {i}" for i in range(len(right))) if ids is None else tuple(ids)
    rows = {name: MetricRows(how, np.array(values, dtype=float)[:, None]) for name, (how, values) in answered.items()}
    return TaskScores("sql", ids, 1.0 - right, np.ones(len(right), dtype=np.int64), right, rows)


def test_rates_of_flips_have_bootstrap_intervals():
    found = compare_scores(scored(OLD * 20), scored(NEW * 20), ["loss"])["right_or_wrong"]
    assert list(found) == ["exact_match"]
    rates = found["exact_match"]
    assert rates["flips"] == {"both_right": 60, "negative": 20, "positive": 40, "both_wrong": 80}
    values = {name: rates[name]["value"] for name in ("negative_rate", "positive_rate", "churn")}
    assert values == {
        "negative_rate": pytest.approx(0.1),
        "positive_rate": pytest.approx(0.2),
        "churn": pytest.approx(0.3),
    }
    for name, value in values.items():
        lower, upper = rates[name]["interval"]
        half = 1.96 * math.sqrt(value * (1 - value) / 200)  # the normal interval of a share of 200
        assert lower == pytest.approx(value - half, abs=0.01)
        assert upper == pytest.approx(value + half, abs=0.01)


def test_every_metric_that_says_right_or_wrong_and_no_other():
    old = scored(OLD, contains=("share", [1] * 5 + [0] * 5), f1=("share", [0.5] * 10), chrf=("mean", [1.0] * 10))
    new = scored(NEW, contains=("share", [1] * 4 + [0] * 6), f1=("share", [0.25] * 10), chrf=("mean", [0.0] * 10))
    found = compare_scores(old, new, ["contains", "f1", "chrf"])
    assert list(found["right_or_wrong"]) == ["exact_match", "contains"]
    assert found["right_or_wrong"]["contains"]["flips"] == {
        "both_right": 4, "negative": 1, "positive": 0, "both_wrong": 5
    }  # fmt: skip
    assert found["right_or_wrong"]["contains"]["churn"]["value"] == pytest.approx(0.1)
    assert found["difference"]["f1"]["value"] == pytest.approx(-0.25)


def test_rows_are_matched_by_name_and_others_refused():
    names = [f"row {i}" for i in range(10)]
    straight = compare_scores(scored(OLD), scored(NEW), ["loss"])
    turned = compare_scores(scored(OLD[::-1], names[::-1]), scored(NEW), ["loss"])
    assert straight == turned
    with pytest.raises(UserError, match=r"1 only with the old model .as row 9., 1 only with the new model .as x."):
        compare_scores(scored(OLD), scored(NEW, [*names[:9], "x"]), ["loss"])
    with pytest.raises(UserError, match="not scored on the same rows: 2 only with the old model"):
        compare_scores(scored(OLD), scored(NEW[:8], names[:8]), ["loss"])


def test_nothing_right_before():
    assert math.isnan(prediction_flips([False], [True]).broken_share)
    assert math.isnan(prediction_flips([], []).negative_rate)


def test_graded():
    assert graded_regression([1.0, 0.5, 0.2], [0.4, 0.9, 0.2]) == pytest.approx(0.2)


@pytest.mark.parametrize("arguments", [([True], [True, False]), ([[True]], [[True]])])
def test_unequal_lengths(arguments):
    with pytest.raises(ValueError, match="equal length"):
        prediction_flips(*arguments)
    with pytest.raises(ValueError, match="equal length"):
        graded_regression([], [])
