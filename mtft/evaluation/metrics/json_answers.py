"""json_valid, json_match: answers that are JSON."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mtft.common.errors import UserError
from mtft.common.listing import clipped
from mtft.evaluation.metrics.base import Answer, Metric
from mtft.evaluation.metrics.text_matches import column

NO_JSON = object()
"""What stands for a value where a text is no JSON: null is a value."""
_FENCE = re.compile(r"```(?:json|JSON)?[ \t]*\r?\n(.*?)```", re.DOTALL)
_MOST_DIGITS = 400  # of a whole number; Python reads none of more than 4,300


@dataclass(frozen=True)
class JsonValid(Metric):
    """Share of the rows whose answer is JSON (RFC 8259, so without NaN): the whole text, or what the first fence of
    ``` or ```json holds. The reference is not looked at.
    """

    NAME = "json_valid"
    AGGREGATE = "share"

    def statistics(self, answers: Sequence[Answer]) -> NDArray[np.float64]:
        return column([json_in(answer.text) is not NO_JSON for answer in answers])


@dataclass(frozen=True)
class JsonMatch(Metric):
    """Mean over rows of the share of `fields` that hold in the answer what they hold in the reference; without fields,
    share of the rows whose whole value is that of the reference.

    fields  names of keys, with dots into objects and with numbers into lists (a, b.c, items.0.price); null: everything

    The order of keys does not count, that of lists does; 1 equals 1.0, and true is not 1. A field that the reference
    lacks is right where the answer lacks it too. An answer that is no JSON has none right.
    """

    NAME = "json_match"
    AGGREGATE = "share"

    fields: list[str] | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.fields == []:
            what = "no field is named, so nothing would be compared"
            raise UserError(what, where=f"metrics.{self.NAME}.fields", do="leave it out to compare everything")

    def statistics(self, answers: Sequence[Answer]) -> NDArray[np.float64]:
        return column([self._share(answer) for answer in answers])

    def _share(self, answer: Answer) -> float:
        asked, given = json_in(answer.reference), json_in(answer.text)
        if asked is NO_JSON:
            what = f"json_match needs JSON in every reference, and this is none: {clipped(answer.reference, 60)!r}"
            raise UserError(what, where=answer.where, do="mend the row, or take another metric for this task")
        if given is NO_JSON:
            return 0.0
        if self.fields is None:
            return float(same_json(given, asked))
        right = [same_json(_at(given, field), _at(asked, field)) for field in self.fields]
        return sum(right) / len(right)


def json_in(text: str) -> Any:
    """The JSON value that a text is, or that its first fence holds; NO_JSON if it is none."""
    value = parse_json(text)
    if value is NO_JSON and (fence := _FENCE.search(text)) is not None:
        return parse_json(fence[1])
    return value


def parse_json(text: str) -> Any:
    """The JSON value of a whole text; NO_JSON if it is none."""
    try:
        return json.loads(text, parse_constant=_refuse, parse_int=_whole)
    except (ValueError, RecursionError):
        return NO_JSON


def json_row(text: str) -> list[Any]:
    """The objects of a text that is nothing but objects with `;` or spaces between them; none if it is not."""
    values, place = [], 0
    while place < len(text):
        if text[place] in "; \t\r\n":
            place += 1
        elif text[place] != "{":
            return []
        else:
            try:
                value, place = _DECODER.raw_decode(text, place)
            except (ValueError, RecursionError):
                return []
            values.append(value)
    return values


def _refuse(constant: str) -> Any:
    raise ValueError(constant)


def _whole(digits: str) -> int | float:
    return int(digits) if len(digits) <= _MOST_DIGITS else float(digits)


_DECODER = json.JSONDecoder(parse_constant=_refuse, parse_int=_whole)


def same_json(a: Any, b: Any) -> bool:
    """Whether two values are the same to JSON: numbers by value, objects whatever the order of their keys."""
    if isinstance(a, bool) or isinstance(b, bool):
        return a is b
    if isinstance(a, dict) and isinstance(b, dict):
        return a.keys() == b.keys() and all(same_json(a[key], b[key]) for key in a)
    if isinstance(a, list) and isinstance(b, list):
        return len(a) == len(b) and all(map(same_json, a, b))
    return type(a) is type(b) and a == b if not _numbers(a, b) else a == b


def _numbers(a: Any, b: Any) -> bool:
    return isinstance(a, int | float) and isinstance(b, int | float)


def _at(value: Any, field: str) -> Any:
    """What stands under a dotted name; NO_JSON if nothing does."""
    if isinstance(value, dict) and field in value:  # a key with a dot in it
        return value[field]
    for name in field.split("."):
        if isinstance(value, dict) and name in value:
            value = value[name]
        elif isinstance(value, list) and name.isdecimal() and int(name) < len(value):
            value = value[int(name)]
        else:
            return NO_JSON
    return value
