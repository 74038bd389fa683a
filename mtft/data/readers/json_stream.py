"""The elements of a JSON array, one after the other: a file of any size in the memory of its longest row.

Text is read in chunks and parsed by the standard library's decoder. An element counts once the comma or bracket behind
it has been seen; one that reaches over the end of what was read is tried again with twice as much.
"""

from __future__ import annotations

import codecs
import json
from collections import Counter
from collections.abc import Iterator
from typing import Any, BinaryIO, NamedTuple

from mtft.common.listing import listed
from mtft.data.readers import bounded_lines

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


def unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object, for `object_pairs_hook`. ValueError if a key stands in it twice: which value counts is unknown."""
    found = dict(pairs)
    if len(found) != len(pairs):
        twice = [key for key, count in Counter(key for key, _ in pairs).items() if count > 1]
        raise ValueError(f"the key {listed(map(repr, twice))} stands twice in one object")
    return found


def iter_array(file: BinaryIO) -> Iterator[ArrayElement | ArrayError]:
    """Elements of the array that starts with the next `[`; after an ArrayError nothing follows.

    Bytes that are not UTF-8 become lone surrogates (\\udc80 to \\udcff) in the text.
    """
    reader, decoder = _TextCursor(file), json.JSONDecoder(object_pairs_hook=unique_keys)
    if reader.take() != "[":
        yield ArrayError(reader.line, "broken JSON: no array", reader.shown())
        return
    mark = reader.take() if reader.peek() == "]" else ","  # what stands before the next element
    while mark == "," and reader.peek():
        line = reader.line
        try:
            value, end = _one(decoder, reader)
        except (ValueError, RecursionError) as error:  # brackets without end; an integer of 5000 digits
            what = error.msg if isinstance(error, json.JSONDecodeError) else str(error)
            place = getattr(error, "pos", reader.position)
            yield ArrayError(reader.line_at(place), f"broken JSON: {what}", reader.shown())
            return
        yield ArrayElement(line, value, reader.text[reader.position : end])
        reader.line, reader.position = reader.line_at(end), end
        mark = reader.take()
    if mark in ("", ","):
        yield ArrayError(reader.line, "broken JSON: the file ends inside the array", "")
    elif mark != "]":
        yield ArrayError(reader.line, "broken JSON: expected ',' or ']' behind a row", mark + reader.shown())
    elif reader.peek():
        yield ArrayError(reader.line, "broken JSON: something stands behind the array", reader.shown())


def _one(decoder: json.JSONDecoder, reader: _TextCursor) -> tuple[object, int]:
    """(value, its end) at the reader's position; ValueError for what more text would not mend."""
    while True:
        try:
            value, end = decoder.raw_decode(reader.text, reader.position)
        except json.JSONDecodeError as error:
            # a newline ends a string in JSON, so one that is not closed is found out at the end of its line
            cut = error.pos >= len(reader.text) - _NEAR_END or error.msg.startswith("Unterminated string")
            if not cut:
                raise
            if len(reader.text) - reader.position > bounded_lines.LONGEST_ROW:
                raise bounded_lines.RowTooLong from None
            if not reader.more():
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

    def peek(self) -> str:
        """Move to the next character that is no white space; it, or "" where there is none."""
        while True:
            while self.position < len(self.text):
                character = self.text[self.position]
                if character not in _SPACE:
                    return character
                self.line += character == "\n"
                self.position += 1
            if not self.more():
                return ""

    def take(self) -> str:
        """The same, and move behind it."""
        character = self.peek()
        self.position += len(character)
        return character

    def line_at(self, end: int) -> int:
        return self.line + self.text.count("\n", self.position, end)

    def shown(self) -> str:
        return self.text[self.position : self.position + 80]
