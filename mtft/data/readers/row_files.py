"""Rows of one file, each with its line.

Text files are read line by line here, because a reader that parses in blocks cannot tell the line of a broken row.
Everything is an iterator: no file is held in memory as a whole.
"""

from __future__ import annotations

import bz2
import csv
import gzip
import io
import itertools
import json
import lzma
import os
import re
import sys
import zlib
from collections.abc import Callable, Iterator
from typing import Any, BinaryIO, NamedTuple

from mtft.common.errors import UserError
from mtft.common.listing import clipped
from mtft.common.own_files import type_name
from mtft.data.readers.arrow_rows import parquet_rows, refuse_repeated
from mtft.data.readers.bounded_lines import CsvLines, RowTooLong, bounded_lines
from mtft.data.readers.json_stream import ArrayError, iter_array, unique_keys


def _open_zst(path: str, mode: str) -> BinaryIO:
    """Zstandard through Arrow, which `datasets` brings along; Python has it from 3.14 on."""
    import pyarrow

    return io.BufferedReader(pyarrow.CompressedInputStream(pyarrow.OSFile(path, mode), "zstd"))  # type: ignore[arg-type]


_UNDECODED = re.compile("[\udc80-\udcff]")  # bytes that surrogateescape could not decode
COMPRESSED = {".gz": gzip.open, ".bz2": bz2.open, ".xz": lzma.open, ".zst": _open_zst}


class FileRow(NamedTuple):
    """One row as it was read. `line` counts from 1; rows of arrays, Parquet and saved datasets count as lines."""

    file: str
    line: int
    data: dict[str, Any]


class RowProblem(NamedTuple):
    """A row that can't be used: where it stands, what is wrong, in which column, and the value."""

    file: str
    line: int
    what: str
    column: str | None = None
    value: object = None

    def __str__(self) -> str:
        column = f"column {clipped(self.column, 80)!r}: " if self.column else ""
        value = f" (got {short(self.value)})" if self.value is not None else ""
        return f"{self.file}:{self.line}: {column}{self.what}{value}"


def short(value: object, limit: int = 60) -> str:
    """A value as people can read it in one line."""
    text = repr(value[: 4 * limit] if isinstance(value, str | bytes | list) else value)
    return text if len(text) <= limit else text[: limit - 3] + "..."


def suffix(path: str) -> str:
    """The kind of a file: its suffix, below the one of a compression."""
    stem, last = os.path.splitext(path)
    return os.path.splitext(stem)[1] if last in COMPRESSED else last


def read_file(path: str, name: str) -> Iterator[FileRow | RowProblem]:
    """Rows of a file, and problems in place of those that can't be read. `name` is what they call their file."""
    try:
        yield from READERS[suffix(path)](path, name)
    except (EOFError, OSError, lzma.LZMAError, zlib.error) as error:  # torn archive, vanished file
        raise UserError(f"{path} cannot be read: {error}", do="check the file, or make it again") from error


def _open(path: str) -> BinaryIO:
    opener = COMPRESSED.get(os.path.splitext(path)[1], open)
    return opener(path, "rb")  # type: ignore[return-value]


def _parse(file: str, line: int, raw: bytes) -> FileRow | RowProblem:
    try:
        data = json.loads(raw.decode("utf-8").rstrip(), object_pairs_hook=unique_keys)
    except UnicodeDecodeError as error:
        return RowProblem(file, line, f"invalid UTF-8 at byte {error.start + 1} of the line", value=raw[:80])
    except json.JSONDecodeError as error:
        return RowProblem(
            file, line, f"broken JSON: {error.msg.removesuffix(' at')} at character {error.colno}", value=_text(raw)
        )
    except (ValueError, RecursionError) as error:  # an integer of 5000 digits; brackets without end
        return RowProblem(file, line, f"JSON that cannot be read: {error}", value=_text(raw))
    return _checked(file, line, data)


def _checked(file: str, line: int, data: object) -> FileRow | RowProblem:
    if not isinstance(data, dict):
        return RowProblem(file, line, f"the row is {type_name(type(data))}, not an object with columns", value=data)
    return FileRow(file, line, data)


def _text(raw: bytes) -> str:
    return raw[:300].decode("utf-8", "replace").strip()


def _read_jsonl(path: str, name: str) -> Iterator[FileRow | RowProblem]:
    with _open(path) as file:
        for line, raw in enumerate(bounded_lines(file), 1):
            if raw is None:
                yield RowProblem(name, line, str(RowTooLong()))
                continue
            raw = raw.removeprefix(b"\xef\xbb\xbf") if line == 1 else raw  # Windows' byte order mark
            if raw.strip():
                yield _parse(name, line, raw)


def _read_json(path: str, name: str) -> Iterator[FileRow | RowProblem]:
    """An array of objects, or lines of objects under the wrong name."""
    with _open(path) as file:
        start = file.read(4096).removeprefix(b"\xef\xbb\xbf").lstrip()
    if not start.startswith(b"["):
        yield from _one_object(path, name) if start.startswith(b"{") else _read_jsonl(path, name)
        return
    with _open(path) as file:
        before = 0  # no two rows have one line, also where the whole array stands in one
        for element in iter_array(file):
            line = before = max(element.line, before + 1)
            if isinstance(element, ArrayError):  # nothing behind a break in an array can be trusted
                yield RowProblem(name, line, element.what, value=element.text or None)
            elif (bad := _not_utf8(element.text)) is not None:
                yield RowProblem(name, line, "invalid UTF-8", value=bad)
            else:
                yield _checked(name, line, element.value)


def _one_object(path: str, name: str) -> Iterator[FileRow | RowProblem]:
    """Lines of objects; but a first line that does not end its object is the start of one object in many lines."""
    rows = _read_jsonl(path, name)
    for first in itertools.islice(rows, 1):
        if isinstance(first, RowProblem) and first.what.startswith("broken JSON: Expecting"):
            what = "one object in many lines: rows stand in an array, [{...}, {...}], or each in one line (JSONL)"
            yield RowProblem(name, first.line, what, value=first.value)
            return
        yield first
    yield from rows


def _not_utf8(text: str) -> str | None:
    """The surroundings of the first byte that was not UTF-8."""
    found = None if text.isascii() else _UNDECODED.search(text)
    return text[max(0, found.start() - 20) : found.end() + 19] if found else None


def _read_csv(path: str, name: str) -> Iterator[FileRow | RowProblem]:
    csv.field_size_limit(min(sys.maxsize, 2**31 - 1))  # the default of 128 KiB is shorter than a long document
    # surrogateescape keeps undecodable bytes visible; formats.py refuses them with the column's name
    with _open(path) as raw, io.TextIOWrapper(raw, "utf-8-sig", "surrogateescape", newline="") as file:
        lines = CsvLines(file)
        reader = csv.reader(lines, delimiter="\t" if suffix(path) == ".tsv" else ",", strict=True)
        header = None
        while True:
            line = lines.number + 1
            lines.restart()
            try:
                cells = next(reader, None)
            except (csv.Error, RowTooLong) as error:
                yield RowProblem(name, line, f"broken CSV: {error}")
                continue
            if cells is None:
                return
            if header is None:
                header = cells
                refuse_repeated(header, name, line)
            elif len(cells) != len(header):
                if cells:
                    yield RowProblem(name, line, f"{len(cells)} cells under {len(header)} columns", value=cells)
            else:
                yield FileRow(name, line, dict(zip(header, cells, strict=True)))


def _read_parquet(path: str, name: str) -> Iterator[FileRow | RowProblem]:
    for line, data in enumerate(parquet_rows(path, name), 1):
        yield FileRow(name, line, data)


READERS: dict[str, Callable[[str, str], Iterator[FileRow | RowProblem]]] = {
    ".jsonl": _read_jsonl,
    ".ndjson": _read_jsonl,
    ".json": _read_json,
    ".csv": _read_csv,
    ".tsv": _read_csv,
    ".parquet": _read_parquet,
}
