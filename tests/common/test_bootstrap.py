"""The bootstrap against what is known of it, and its two forms against each other."""

import numpy as np
import pytest

from mtft.common.bootstrap import percentile_interval, resampled_counts, resampled_rows, same_order


def test_interval_of_a_mean_has_the_width_of_its_error():
    values = np.random.default_rng(0).normal(size=400)
    means = np.concatenate([values[rows].mean(axis=1) for rows in resampled_rows(400, 4000, seed=1)])
    lower, upper = percentile_interval(means)
    assert (upper - lower) / 2 == pytest.approx(1.96 * values.std() / 20, rel=0.05)
    by_counts = resampled_counts(400, 4000, np.random.default_rng(2)) @ values / 400
    assert by_counts.std() == pytest.approx(means.std(), rel=0.05)


def test_the_number_at_once_is_a_matter_of_memory():
    """Even sizes: the generator hands out numbers in pairs."""
    whole = np.concatenate(list(resampled_rows(10, 6, seed=3)))
    assert np.array_equal(whole, np.concatenate(list(resampled_rows(10, 6, seed=3, at_once=2))))


def test_rows_in_the_order_of_others():
    assert same_order(["a", "b", "c"], ["c", "a", "b"]).tolist() == [1, 2, 0]
    assert same_order(["a", "b"], ["a", "c"]) is None
    assert same_order(["a", "a"], ["a", "a"]) is None
    assert same_order(["a"], ["a", "b"]) is None
