"""Best-fit decreasing: the longest example first, each into the fullest row that still has room for it.

Uses at most 11/9 of the best possible number of rows plus 2/3 of a row (Dósa 2007 for first-fit decreasing; the same
bound holds for best-fit), and far less than that on real lengths. No example is split, none is lost.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections import deque
from collections.abc import Sequence

import numpy as np


def pack(lengths: Sequence[int] | np.ndarray, capacity: int) -> list[list[int]]:
    """Rows of indices whose lengths add up to at most `capacity`.

    Deterministic: equal lengths go in the order of their index, among equally full rows the oldest takes it. Inside a
    row the indices rise, and rows are sorted by their first index. O(n log n): free space is looked up among its
    distinct values. Raises ValueError for a length that is not in 1..capacity.
    """
    lengths = np.asarray(lengths, dtype=np.int64)
    if lengths.size and not 1 <= int(lengths.min()) <= int(lengths.max()) <= capacity:
        raise ValueError(f"lengths {int(lengths.min())} to {int(lengths.max())} do not fit rows of {capacity}")
    rows: list[list[int]] = []
    with_space: dict[int, deque[int]] = {}  # free space -> rows, oldest first
    spaces: list[int] = []  # the keys that have rows, sorted
    for index in np.argsort(-lengths, kind="stable").tolist():
        length = int(lengths[index])
        place = bisect_left(spaces, length)
        if place == len(spaces):
            row, space = len(rows), capacity
            rows.append([])
        else:
            space = spaces[place]
            row = with_space[space].popleft()
            if not with_space[space]:
                del spaces[place], with_space[space]
        rows[row].append(index)
        left = space - length
        if left:
            if left not in with_space:
                with_space[left] = deque()
                insort(spaces, left)
            with_space[left].append(row)
    return sorted(sorted(row) for row in rows)


def pack_evenly(lengths: Sequence[int] | np.ndarray, capacity: int) -> list[list[int]]:
    """As `pack`, with no more rows, but with the lowest capacity (found by bisection) for which that number suffices.

    Rows of a micro-batch are padded to its longest row. Filling most rows to the brim and leaving one half empty
    wastes that half; filling all rows alike wastes next to nothing.
    """
    rows = pack(lengths, capacity)
    if len(rows) < 2:
        return rows
    lengths = np.asarray(lengths, dtype=np.int64)
    low = max(int(lengths.max()), -(-int(lengths.sum()) // len(rows)))
    high = max(int(lengths[row].sum()) for row in rows)
    while low < high:
        middle = (low + high) // 2
        tried = pack(lengths, middle)
        if len(tried) <= len(rows):
            rows, high = tried, max(int(lengths[row].sum()) for row in tried)
        else:
            low = middle + 1
    return rows
