"""The 2 x 2 table by hand."""

import math

import pytest

from mtft.evaluation.regressions import flips, graded_regression

OLD = [True, True, True, True, False, False, False, False, False, False]
NEW = [True, True, True, False, True, True, False, False, False, False]


def test_table():
    found = flips(OLD, NEW)
    assert (found.both_right, found.negative, found.positive, found.both_wrong) == (3, 1, 2, 4)
    assert found.negative_rate == pytest.approx(0.1)
    assert found.positive_rate == pytest.approx(0.2)
    assert found.broken_share == pytest.approx(0.25)
    assert found.changed_wrong is None


def test_changed_but_both_wrong():
    old = ["a"] * 10
    new = ["a", "b", "a", "b", "b", "a", "x", "a", "y", "a"]
    assert flips(OLD, NEW, old, new).changed_wrong == 2  # the change of a right answer does not count


def test_the_other_way_round_swaps_the_flips():
    there, back = flips(OLD, NEW), flips(NEW, OLD)
    assert (there.negative, there.positive) == (back.positive, back.negative)


def test_nothing_right_before():
    assert math.isnan(flips([False], [True]).broken_share)
    assert math.isnan(flips([], []).negative_rate)


def test_graded():
    assert graded_regression([1.0, 0.5, 0.2], [0.4, 0.9, 0.2]) == pytest.approx(0.2)


@pytest.mark.parametrize("arguments", [([True], [True, False]), ([[True]], [[True]]), ([True], [True], ["a"], [])])
def test_unequal_lengths(arguments):
    with pytest.raises(ValueError, match=r"equal length|answers for"):
        flips(*arguments)
    with pytest.raises(ValueError, match="equal length"):
        graded_regression([], [])
