"""Best-fit decreasing: values by hand, and what must hold for any lengths."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mtft.data.batching.packing import pack, pack_evenly


@pytest.mark.parametrize(
    "lengths, capacity, rows",
    [
        ([], 10, []),
        ([10, 10], 10, [[0], [1]]),
        ([5, 5, 5, 5], 10, [[0, 1], [2, 3]]),
        ([1, 9, 2, 8], 10, [[0, 1], [2, 3]]),
        ([7, 6, 3], 10, [[0, 2], [1]]),
    ],
)
def test_values(lengths, capacity, rows):
    assert pack(lengths, capacity) == rows


def test_best_fit_takes_the_fullest_row():
    # 8 opens row a, 4 and 4 row b (2 left in both), 2 goes to the older, then 1 and 1 to the other
    assert pack([4, 8, 1, 4, 2, 1], 10) == [[0, 2, 3, 5], [1, 4]]


@pytest.mark.parametrize("lengths", [[11], [0], [5, -1]])
def test_lengths_that_do_not_fit(lengths):
    with pytest.raises(ValueError, match="do not fit rows of 10"):
        pack(lengths, 10)


@given(st.lists(st.integers(1, 64), max_size=200), st.integers(64, 100))
def test_nothing_is_lost_or_split_and_rows_hold(lengths, capacity):
    rows = pack(lengths, capacity)
    assert sorted(i for row in rows for i in row) == list(range(len(lengths)))
    assert all(sum(lengths[i] for i in row) <= capacity for row in rows)
    assert rows == sorted(rows)
    least = -(-sum(lengths) // capacity)
    assert len(rows) <= 11 / 9 * max(least, sum(x > capacity / 2 for x in lengths)) * 1.5 + 2
    assert pack(np.asarray(lengths, dtype=np.int64), capacity) == rows


@given(st.lists(st.integers(1, 64), max_size=120), st.integers(64, 100))
def test_even_rows_are_no_more_and_no_longer(lengths, capacity):
    plain, even = pack(lengths, capacity), pack_evenly(lengths, capacity)
    assert sorted(i for row in even for i in row) == list(range(len(lengths)))
    assert len(even) <= len(plain)
    longest = [max((sum(lengths[i] for i in row) for row in rows), default=0) for rows in (even, plain)]
    assert longest[0] <= longest[1] <= capacity


def test_even_rows_leave_no_half_empty_one():
    # 12 tokens, rows of 10: best fit makes 9 + 3, a third of it padding; 6 + 6 has none
    lengths = [3, 3, 3, 3]
    assert pack(lengths, 10) == [[0, 1, 2], [3]]
    assert pack_evenly(lengths, 10) == [[0, 1], [2, 3]]


def test_padding_is_small_on_real_lengths():
    """Bar of the spec: at most 3 % at a row of 8 times the mean length."""
    lengths = np.random.default_rng(0).lognormal(5, 0.8, 4000).astype(int).clip(8, 1600)
    capacity = 8 * int(lengths.mean())
    rows = pack(lengths.clip(max=capacity), capacity)
    assert lengths.clip(max=capacity).sum() / (len(rows) * capacity) >= 0.97
