"""Lines of a file that are never longer than a bound: a gigabyte without a line break is one bad row, not memory."""

from __future__ import annotations

from collections.abc import Iterator
from typing import IO, AnyStr

LONGEST_ROW = 1 << 26  # bytes (in CSV and JSON arrays: characters) of one row
_PIECE = 1 << 20


class RowTooLong(ValueError):
    """A row that goes on beyond LONGEST_ROW."""

    def __init__(self) -> None:
        super().__init__(f"the row is longer than {LONGEST_ROW:,} bytes: is a line break missing?")


def bounded_lines(file: IO[AnyStr]) -> Iterator[AnyStr | None]:
    """Lines as iterating over the file gives them, but None in the place of one that is longer than LONGEST_ROW."""
    while line := file.readline(LONGEST_ROW + 1):
        if len(line) <= LONGEST_ROW:
            yield line
            continue
        while len(line) >= _PIECE and line[-1:] not in ("\n", b"\n"):  # the rest of it is read and forgotten
            line = file.readline(_PIECE)
        yield None


class CsvLines:
    """Lines for `csv.reader`, which puts them together where quotes span several: bounded for a whole row.

    `restart` before each row. Raises RowTooLong in a row beyond LONGEST_ROW, and goes on with the line behind it.
    number: of the last line that was read, from 1.
    """

    def __init__(self, file: IO[str]) -> None:
        self._lines, self._row, self.number = bounded_lines(file), 0, 0

    def restart(self) -> None:
        """The next line begins a row."""
        self._row = 0

    def __iter__(self) -> CsvLines:
        return self

    def __next__(self) -> str:
        line = next(self._lines)
        self.number += 1
        self._row += len(line or "")
        if line is None or self._row > LONGEST_ROW:
            raise RowTooLong
        return line
