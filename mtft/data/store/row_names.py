"""Rows by name: which examples are of one row, and rows that bear the name of an earlier one."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from mtft.common.fingerprint import blake2b


def row_starts(lines_N: np.ndarray, files: Sequence[tuple[str, int]]) -> np.ndarray:
    """bool [N]: the example is the first of its row. files: (name, first example) of each file, in order."""
    first = np.ones(len(lines_N), dtype=bool)
    first[1:] = lines_N[1:] != lines_N[:-1]
    first[[start for _, start in files if start < len(first)]] = True
    return first


def place(example: int, lines_N: np.ndarray, files: Sequence[tuple[str, int]]) -> str:
    """file:line of the row that an example came from."""
    file = int(np.searchsorted([start for _, start in files], example, side="right")) - 1
    return f"{files[file][0]}:{lines_N[example]}"


def drop_repeated_names(folder: Path, files: Sequence[tuple[str, int]]) -> dict[str, Any]:
    """Takes its name from every row that has the name of an earlier one, in the written files of a store.

    Whoever compares two models row by row has to tell rows apart. Returns {} or {"rows": how many, "such_as": one of
    them with both places}.
    """
    lengths = np.fromfile(folder / "name_lengths.bin", dtype=np.uint16)
    names = np.fromfile(folder / "names.bin", dtype=np.uint8)
    lines = np.fromfile(folder / "lines.bin", dtype=np.uint32)
    if not len(names):
        return {}
    ends = np.cumsum(lengths, dtype=np.int64)
    starts_row = row_starts(lines, files)
    named = np.flatnonzero(starts_row & (lengths > 0))
    hashes = np.fromiter(
        (int.from_bytes(blake2b(8, names[ends[i] - lengths[i] : ends[i]].tobytes()).digest()) for i in named),
        dtype=np.uint64,
        count=len(named),
    )
    _, first, group = np.unique(hashes, return_index=True, return_inverse=True)
    repeated = np.flatnonzero(first[group] != np.arange(len(named)))
    if not len(repeated):
        return {}
    row_of = np.cumsum(starts_row) - 1
    drop = np.isin(row_of, row_of[named[repeated]])
    later, earlier = int(named[repeated[0]]), int(named[first[group[repeated[0]]]])
    name = names[ends[later] - lengths[later] : ends[later]].tobytes().decode("utf-8")
    names[~np.repeat(drop, lengths)].tofile(folder / "names.bin")
    np.where(drop, 0, lengths).astype(np.uint16).tofile(folder / "name_lengths.bin")
    places = f"{place(earlier, lines, files)} and {place(later, lines, files)}"
    return {"rows": len(repeated), "such_as": f"{name!r} at {places}; they are called by file and line"}
