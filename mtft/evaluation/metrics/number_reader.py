"""Numbers in texts that people and models write."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal

_NUMBER = re.compile(
    r"""
    (?<![A-Za-z0-9_.])                     # not inside of a word or of another number
    (?P<sign>[-+\u2212])? (?:[$\u20ac\u00a3\u00a5]\s?)?  # -5, -$5
    (?P<digits>
        (?: \d{1,3} (?:[,'\u2019\u00a0\u2009\u202f]\d{3})+ (?!\d) | \d+ ) (?:\.\d+)?  # 1,234.5
        | \.\d+
    )
    (?P<exponent> [eE][-+]?\d+ )?
    \s?(?P<percent>[%\uff05])?
    """,
    re.VERBOSE,
)
_LARGEST = 1e100  # past it sums of errors overflow; no answer is meant to be so large


@dataclass(frozen=True)
class WrittenNumber:
    """One number of a text. value: as it stands, 50 for `50%`."""

    value: float
    percent: bool


def read_number(text: str, take: Literal["first", "last"] = "last") -> WrittenNumber | None:
    """The first or last number of a text; None if it has none.

    Signs, decimals after a point, exponents, thousands between commas, apostrophes or narrow spaces, a currency before
    and a percent sign after. `####` (GSM8K's mark) begins the answer: numbers before the last one of it don't count, if
    there is one after it. A hyphen after a digit or letter is no sign: 3-4 holds 3 and 4.
    """
    head, mark, tail = text.rpartition("####")
    for part in (tail, head + mark + tail) if mark else (text,):
        numbers = [number for found in _NUMBER.finditer(part) if (number := _read(found)) is not None]
        if numbers:
            return numbers[0 if take == "first" else -1]
    return None


def _read(found: re.Match[str]) -> WrittenNumber | None:
    digits = "".join(sign for sign in found["digits"] if sign == "." or sign.isdecimal())
    value = float(digits + (found["exponent"] or ""))
    if not abs(value) <= _LARGEST:
        return None
    return WrittenNumber(-value if found["sign"] in ("-", "\u2212") else value, found["percent"] is not None)
