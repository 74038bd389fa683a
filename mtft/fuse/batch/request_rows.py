"""Requests from a file, read as training reads its rows: any of its kinds of file, each row with its line.

A row that can't be used is a request with an error: what is wrong with one row never ends a run.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mtft.common.fingerprint import content_hash
from mtft.data.readers.row_files import READERS, RowProblem, read_file, short, suffix
from mtft.fuse.alpha.spec import FusionError
from mtft.fuse.request_values import ROW_ERRORS, check_values

Row = dict[str, Any]
TEXTS = ("prompt", "response", "id")  # cells of a CSV file that are text whatever they look like
LONGEST = 1 << 24  # characters of a row, as JSON: beyond any context
TOLD = 500  # characters of an error


@dataclass
class JsonlRequest:
    """One request: its index among the rows, its hash, the row itself, or why it can't be done."""

    index: int
    hash: str
    row: Row
    line: int = 0
    id: Any = None
    cost: int = 0  # rows of near cost share a bucket
    error: str | None = None


def read_requests(source: Path, prepare: Callable[[int, Row], int]) -> list[JsonlRequest]:
    """All rows of `source`. `prepare(index, row)` checks a row and returns its cost; its FusionError marks the row."""
    kind = suffix(str(source))
    if kind not in READERS:
        raise FusionError(
            f"files of the kind {kind or 'without a suffix'!r} are not read",
            where=str(source),
            do=f"name it for what it is: {', '.join(READERS)}",
        )
    jobs = []
    for index, row in enumerate(read_file(str(source), source.name)):
        if isinstance(row, RowProblem):
            value = f" (got {short(row.value)})" if row.value is not None else ""
            job = JsonlRequest(index, content_hash(str(row))[:16], {}, row.line, error=f"{row.what}{value}")
        else:
            job = _request(index, row.line, row.data, kind, prepare)
        jobs.append(job)
    if not jobs:
        raise FusionError("the input has no rows", where=str(source), do="give one JSON object a line")
    return jobs


def _request(index: int, line: int, data: Row, kind: str, prepare: Callable[[int, Row], int]) -> JsonlRequest:
    job = JsonlRequest(index, "", {}, line)
    try:
        text = json.dumps(data, sort_keys=True, default=str)
        job.hash = content_hash(text)[:16]
        if len(text) > LONGEST:
            raise FusionError(f"the row has {len(text):,} characters: at most {LONGEST:,}")
        row = _from_cells(data) if kind in (".csv", ".tsv") else data
        # null stands for a key that is not there; Parquet writes one for every key that another row has
        row = _without_nulls(row) if kind == ".parquet" else {key: x for key, x in row.items() if x is not None}
        if "id" in row:
            check_values({"id": row["id"]})
            job.id = row["id"]
        check_values(row)
        job.row, job.cost = row, prepare(index, row)
    except FusionError as error:
        job.error = error.what if len(error.what) <= TOLD else f"{error.what[:TOLD]}..."
    except ROW_ERRORS as error:
        job.error = f"the row can't be used: {type(error).__name__}: {short(str(error), 200)}"
    return job


def _from_cells(row: Row) -> Row:
    """A CSV file holds text only: numbers and lists stand there as JSON, and an empty cell is no value."""
    return {key: value if key in TEXTS else _cell(value) for key, value in row.items() if value != ""}


def _cell(text: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return text


def _without_nulls(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_nulls(inner) for key, inner in value.items() if inner is not None}
    return [_without_nulls(inner) for inner in value] if isinstance(value, list) else value
