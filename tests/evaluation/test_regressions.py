"""The 2 x 2 table by hand."""

import math

import numpy as np
import pytest

from mtft.evaluation.regressions import compare_scores, graded_regression, prediction_flips
from mtft.evaluation.task_scores import TaskScores

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
