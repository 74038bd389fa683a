"""Reading tables that people bring: shares (YAML, JSON, CSV) and trials (two CSV files joined on an index).

Every message says file, line and column, since a wrong cell in a table of 512 rows is not found by looking.
"""

from __future__ import annotations

import csv
import math
import os
import warnings
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from data_mixers.common.errors import MixError

LARGEST = 1 << 28  # bytes of a table: a thousand times what trials are


def read_shares_yaml(path: str | Path) -> list[tuple[str, float]]:
    """(name, share) pairs of a YAML or JSON file, repeated names kept: the caller says so with the file's name."""
    from ruamel.yaml import YAML
    from ruamel.yaml.error import YAMLError
    from ruamel.yaml.nodes import MappingNode

    text = read_text(path)
    try:
        root = YAML().compose(text)
    except YAMLError as error:
        raise MixError(f"not YAML: {error}", where=str(path)) from error
    if isinstance(root, MappingNode):
        for key, value in root.value:
            if key.value == "shares" and isinstance(value, MappingNode):
                root = value
                break
    if not isinstance(root, MappingNode) or not root.value:
        raise MixError("no shares in the file", where=str(path), do="write `shares:` with one `name: share` a line")
    pairs, seen = [], {}
    for key, value in root.value:
        line = key.start_mark.line + 1
        if key.value in seen:
            raise MixError(f"task {key.value!r} stands on lines {seen[key.value]} and {line}", where=f"{path}:{line}")
        seen[key.value] = line
        pairs.append((key.value, parse_number(getattr(value, "value", value), f"{path}:{line}", key.value)))
    return pairs


def read_shares_csv(path: str | Path) -> list[tuple[str, float]]:
    """(name, share) pairs: two columns (a header is skipped), or one row under a header of names."""
    rows = [row for row in _rows(path) if any(cell.strip() for cell in row)]
    if len(rows) == 2 and (len(rows[0]) != 2 or _is_number(rows[1][0])):
        return [
            (name.strip(), parse_number(cell, f"{path}:2", name)) for name, cell in zip(rows[0], rows[1], strict=False)
        ]
    pairs = []
    for number, row in enumerate(rows, 1):
        if len(row) != 2:
            raise MixError(
                f"{len(row)} columns", where=f"{path}:{number}", do="two columns name,share, or one row of shares"
            )
        if number == 1 and not _is_number(row[1]):
            continue
        pairs.append((row[0].strip(), parse_number(row[1], f"{path}:{number}", row[0])))
    return pairs


MISSING = {"", "nan", "inf", "-inf", "na", "null", "none"}  # scores of runs that diverged, as tools write them


@dataclass(frozen=True)
class CsvTable:
    """A CSV of numbers: `index` (strings) and `values` [n, C] under `columns`; `lines`: where each row stands in the
    file. A blank cell is NaN where allowed."""

    path: str
    index_name: str
    index: tuple[str, ...]
    columns: tuple[str, ...]
    values: NDArray[np.float64]
    lines: tuple[int, ...]


INDEX_NAMES = ("index", "id", "trial")
LINE = "(line)"  # index of a table without a key column


def read_table(
    path: str | Path, index: str | None = None, *, blank: bool = False, unnumbered: bool = False
) -> CsvTable:
    """Read a CSV with a header. `index` names its key column (default: the first one called index, id or trial, else
    the first column). blank: empty cells, nan and inf become NaN (scores of runs that diverged). unnumbered: the file
    may have no key column: without `index` the first column is one only if its name or its cells say so, and else the
    rows are numbered (index_name LINE). Errors: repeated or missing index, repeated column, cell that is no number,
    ragged row."""
    rows = _rows(path)
    if len(rows) < 2:
        raise MixError("no rows", where=str(path), do="a header and at least one row")
    header = [cell.strip() for cell in rows[0]]
    if len(set(header)) != len(header):
        repeated = sorted(name for name, count in Counter(header).items() if count > 1)[:8]
        raise MixError(f"column named twice: {', '.join(repeated)[:400]}", where=f"{path}:1")
    if index is None:
        index = next((name for name in INDEX_NAMES if name in header), header[0])
        if unnumbered and index not in INDEX_NAMES and not _numbers_rows(index, rows[1:]):
            header, index = [LINE, *header], LINE
            rows = [
                header,
                *([str(line), *row] if any(map(str.strip, row)) else row for line, row in enumerate(rows[1:], 2)),
            ]
    if index not in header:
        raise MixError(f"no column {index!r}", where=f"{path}:1", do=f"the columns are: {', '.join(header[:8])[:400]}")
    at = header.index(index)
    columns = [name for name in header if name != index]
    keys: dict[str, int] = {}
    values = []
    for line, row in enumerate(rows[1:], 2):
        if not any(cell.strip() for cell in row):
            continue
        if len(row) != len(header):
            raise MixError(f"{len(row)} cells under {len(header)} columns", where=f"{path}:{line}")
        key = _key(row[at])
        if key in keys:
            raise MixError(
                f"index {key} stands on lines {keys[key]} and {line}", where=f"{path}:{line}", do="one row per trial"
            )
        keys[key] = line
        cells = [cell for position, cell in enumerate(row) if position != at]
        values.append(
            [
                math.nan if blank and cell.strip().lower() in MISSING else parse_number(cell, f"{path}:{line}", name)
                for cell, name in zip(cells, columns, strict=True)
            ]
        )
    return CsvTable(
        str(path),
        index,
        tuple(keys),
        tuple(columns),
        np.array(values, dtype=np.float64).reshape(len(keys), len(columns)),
        tuple(keys.values()),
    )


def _numbers_rows(name: str, rows: list[list[str]]) -> bool:
    """Whether the first column counts or names the rows: no name, text, or 0, 1, 2, ... (1, 2, 3, ...)."""
    cells = [row[0].strip() for row in rows if any(cell.strip() for cell in row)]
    if name.lower() in ("", "row", "rows", "line") or not any(_is_number(cell) for cell in cells):
        return True
    numbers = [float(cell) for cell in cells if _is_number(cell)]
    return len(numbers) == len(cells) and numbers in (list(range(len(cells))), list(range(1, len(cells) + 1)))


ROUNDED = 1e-4
"""How far the sum of shares may be from 1 without a word."""


def check_rows(table: CsvTable, tolerance: float) -> None:
    """MixError for the first row that is no mixture: a negative share, or a sum further than `tolerance` from 1.

    A warning counts the rows whose sums are off by less: they are scaled.
    """
    off = np.flatnonzero(np.abs(table.values.sum(axis=1) - 1) > ROUNDED)
    for key, line, row in zip(table.index, table.lines, table.values, strict=True):
        negative = np.any(row < 0)
        if negative or abs(row.sum() - 1) > tolerance:
            what = "a negative share" if negative else f"the shares add up to {row.sum():.6g}"
            raise MixError(
                f"row {key}: {what}",
                where=f"{table.path}:{line}",
                do="each row holds shares >= 0 that add up to 1 (columns that are no shares do not belong here)",
            )
    if len(off):
        first = f"line {table.lines[off[0]]}: {table.values[off[0]].sum():.6g}"
        warnings.warn(f"{table.path}: the shares of {len(off)} rows don't add up to 1 ({first}); scaled", stacklevel=3)


def join(left: CsvTable, right: CsvTable) -> tuple[tuple[str, ...], NDArray[np.float64], NDArray[np.float64]]:
    """Rows of both tables with equal index, in the order of `left`. Rows that only one table has are an error."""
    for one, other in ((left, right), (right, left)):
        known = set(other.index)
        lacking = [key for key in one.index if key not in known]
        if lacking:
            shown = ", ".join(lacking[:5]) + (" ..." if len(lacking) > 5 else "")
            raise MixError(
                f"{len(lacking)} index values of {one.path} are not in {other.path}: {shown}", where=other.path
            )
    position = {key: row for row, key in enumerate(right.index)}
    return left.index, left.values, right.values[[position[key] for key in left.index]]


def _rows(path: str | Path) -> list[list[str]]:
    """The file's cells; MixError where it is no CSV."""
    try:
        return list(csv.reader(read_text(path).splitlines()))
    except csv.Error as error:
        raise MixError(f"no CSV: {error}", where=str(path)) from error


def read_text(path: str | Path) -> str:
    """The file's text; MixError where it is missing or is not UTF-8."""
    if os.path.exists(path) and not os.path.isfile(path):  # never opened: a pipe would be waited for
        raise MixError("a folder, a pipe or a device, not a file", where=str(path))
    try:
        if os.path.getsize(path) > LARGEST:
            raise MixError(f"{os.path.getsize(path):,} bytes, and {LARGEST:,} are the most", where=str(path))
        return Path(path).read_text(encoding="utf-8-sig")
    except FileNotFoundError as error:
        raise MixError("no such file", where=str(path)) from error
    except (OSError, UnicodeDecodeError) as error:
        raise MixError(f"cannot read the file: {error}", where=str(path)) from error


def parse_number(cell: object, where: str, column: str) -> float:
    """float(cell), finite; MixError with file, line and column otherwise."""
    try:
        number = float(str(cell))
    except ValueError:
        number = math.nan
    if not math.isfinite(number):
        raise MixError(f"{cell!r} is not a number", where=f"{where}, column {column}")
    return number


def _is_number(cell: str) -> bool:
    try:
        float(cell)
    except ValueError:
        return False
    return True


def _key(cell: str) -> str:
    """An index written 7 in one file and 7.0 in the other is the same row."""
    cell = cell.strip()
    if _is_number(cell) and float(cell).is_integer():
        return str(int(float(cell)))
    return cell
