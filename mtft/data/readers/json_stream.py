"""The elements of a JSON array, one after the other: a file of any size in the memory of its longest row.

Text is read in chunks and parsed by the standard library's decoder. An element counts once the comma or bracket behind
it has been seen; one that reaches over the end of what was read is tried again with twice as much.
"""

from __future__ import annotations

import codecs
import json
from collections.abc import Iterator
from typing import BinaryIO, NamedTuple

CHUNK = 1 << 20  # bytes
_NEAR_END = 12  # an error so near the end of what was read may be one of what was not: -Infinity, \\u00e9
_SPACE = " \t\r\n"


class ArrayElement(NamedTuple):
    """One element: the line it starts in (from 1), its value, and the text that it was."""

    line: int
    value: object
    text: str


class ArrayError(NamedTuple):
    """Where the array can't be read any further."""

    line: int
    what: str
    text: str


def iter_array(file: BinaryIO) -> Iterator[ArrayElement | ArrayError]:
    """Elements of the array that starts with the next `[`; after a ArrayError nothing follows.

    Bytes that are not UTF-8 become lone surrogates (\\udc80 to \\udcff) in the text.
    """
    reader = _TextCursor(file)
    decoder = json.JSONDecoder()
    if not reader.skip() or reader.take() != "[":
        yield ArrayError(reader.line, "broken JSON: no array", reader.shown())
        return
    first = True
    while True:
        if not reader.skip():
            yield ArrayError(reader.line, "broken JSON: the file ends inside the array", "")
            return
        if first and reader.peek() == "]":
            reader.take()
            break
        line = reader.line
        try:
            value, end = _one(decoder, reader)
        except (ValueError, RecursionError) as error:  # brackets without end; an integer of 5000 digits
            what = error.msg if isinstance(error, json.JSONDecodeError) else str(error)
            place = getattr(error, "pos", reader.position)
            yield ArrayError(reader.line_at(place), f"broken JSON: {what}", reader.shown())
            return
        yield ArrayElement(line, value, reader.text[reader.position : end])
        first = False
        reader.move_to(end)
        if not reader.skip():
            yield ArrayError(reader.line, "broken JSON: the file ends inside the array", "")
            return
        mark = reader.take()
        if mark == "]":
            break
        if mark != ",":
            yield ArrayError(reader.line, "broken JSON: expected ',' or ']' behind a row", mark + reader.shown())
            return
    if reader.skip():
        yield ArrayError(reader.line, "broken JSON: something stands behind the array", reader.shown())


def _one(decoder: json.JSONDecoder, reader: _TextCursor) -> tuple[object, int]:
    """(value, its end) at the reader's position; ValueError for what more text would not mend."""
    while True:
        try:
            value, end = decoder.raw_decode(reader.text, reader.position)
        except json.JSONDecodeError as error:
            # a newline ends a string in JSON, so one that is not closed is found out at the end of its line
            cut = error.pos >= len(reader.text) - _NEAR_END or error.msg.startswith("Unterminated string")
            if not (cut and reader.more()):
                raise
            continue
        behind = reader.text[end : end + 1]
        if (behind and behind in _SPACE + ",]") or not reader.more():
            return value, end  # anything else behind it is told by the caller; a number might go on


class _TextCursor:
    """Text of a file from a position on, and the line of that position."""

    def __init__(self, file: BinaryIO) -> None:
        self._file, self._decode = file, codecs.getincrementaldecoder("utf-8-sig")("surrogateescape").decode
        self._ended = False
        self.text, self.position, self.line = "", 0, 1

    def more(self) -> bool:
        """Read on, twice as much as before while one element does not end; False at the end of the file."""
        if self._ended:
            return False
        rest = self.text[self.position :]
        raw = self._file.read(max(CHUNK, 2 * len(rest)))
        self._ended = not raw
        self.text, self.position = rest + self._decode(raw, final=self._ended), 0
        return True

    def skip(self) -> bool:
        """Move to the next character that is no white space; False if there is none."""
        while True:
            while self.position < len(self.text):
                if self.text[self.position] not in _SPACE:
                    return True
                self.line += self.text[self.position] == "\n"
                self.position += 1
            if not self.more():
                return False

    def peek(self) -> str:
        return self.text[self.position]

    def take(self) -> str:
        self.position += 1
        return self.text[self.position - 1]

    def move_to(self, end: int) -> None:
        self.line = self.line_at(end)
        self.position = end

    def line_at(self, end: int) -> int:
        return self.line + self.text.count("\n", self.position, end)

    def shown(self) -> str:
        return self.text[self.position : self.position + 80]
