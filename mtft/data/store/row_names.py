"""Rows by name: which examples are of one row, and rows that bear the name of an earlier one."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from mtft.common.fingerprint import blake2b
from mtft.data.store.store_files import write_array


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


def drop_repeated_names(
    folder: Path, files: Sequence[tuple[str, int]], content: dict[str, list[int]]
) -> dict[str, Any]:
    """Takes its name from every row that has the name of an earlier one, in the written files of a store.

    content: {file: [bytes, CRC-32]}, which gets the new ones.
    Whoever compares two models row by row has to tell rows apart. Returns {} or {"rows": how many, "such_as": one of
    them with both places}.
    """
    lengths = np.fromfile(folder / "name_lengths.bin", dtype=np.uint16)
    names = np.fromfile(folder / "names.bin", dtype=np.uint8)
    lines = np.fromfile(folder / "lines.bin", dtype=np.uint32)
    if not len(names):
        return {}
    ends = np.cumsum(lengths, dtype=np.int64)
    first_N = row_starts(lines, files)

    def name_of(example: int) -> bytes:
        return names[ends[example] - lengths[example] : ends[example]].tobytes()

    taken = _given_names(lengths, lines, first_N, files, name_of)
    named = np.flatnonzero(first_N & (lengths > 0))
    hashes, given = np.empty(len(named), dtype=np.uint64), np.zeros(len(named), dtype=bool)
    for k, example in enumerate(named.tolist()):
        name = name_of(example)
        hashes[k] = int.from_bytes(blake2b(8, name).digest())
        given[k] = name in taken
    _, earliest, group = np.unique(hashes, return_index=True, return_inverse=True)
    repeated = np.flatnonzero((earliest[group] != np.arange(len(named))) | given)
    if not len(repeated):
        return {}
    row_of = np.cumsum(first_N) - 1
    drop = np.isin(row_of, row_of[named[repeated]])
    later = int(named[repeated[0]])
    earlier = int(named[earliest[group[repeated[0]]]])
    of = f"{place(earlier, lines, files)} and " if earlier != later else ""
    such_as = (
        f"{name_of(later).decode('utf-8')!r} at {of}{place(later, lines, files)}; they are called by file and line"
    )
    kept, changed = names[~np.repeat(drop, lengths)], np.where(drop, 0, lengths).astype(np.uint16)
    content["names.bin"] = write_array(folder / "names.bin", kept)
    content["name_lengths.bin"] = write_array(folder / "name_lengths.bin", changed)
    return {"rows": len(repeated), "such_as": such_as}


def _given_names(
    lengths: np.ndarray,
    lines: np.ndarray,
    first_N: np.ndarray,
    files: Sequence[tuple[str, int]],
    name_of: Callable[[int], bytes],
) -> set[bytes]:
    """Names that we give: to rows without one, and to the further examples of a row (NAME#2)."""
    given, part = set(), 1
    for example in np.flatnonzero((lengths == 0) | ~first_N).tolist():
        part = 1 if first_N[example] else part + 1 if example and not first_N[example - 1] else 2
        name = name_of(example) or place(example, lines, files).encode()
        given.add(name if part == 1 else name + f"#{part}".encode())
    return given
