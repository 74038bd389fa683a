"""Metrics of whole texts: text_match, contains, regex. Each row is right (1) or wrong (0)."""

from __future__ import annotations

import re
import string
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from mtft.common.errors import UserError
from mtft.common.listing import clipped
from mtft.evaluation.metrics.base import Answer, Metric

_SPACES = re.compile(r"\s+")
_MOST_SECONDS = 5.0  # of one search: a pattern that backtracks without end is stopped


def column(values: Sequence[float]) -> NDArray[np.float64]:
    """float64 [N, 1]: one number a row."""
    return np.array(values, dtype=np.float64).reshape(-1, 1)


@dataclass(frozen=True)
class TextMatch(Metric):
    """Share of the rows whose generated answer is the reference, after normalising both.

    ignore_case         by Unicode's case folding
    ignore_punctuation  without the signs of ASCII's punctuation and of Unicode's categories P
    ignore_whitespace   without any space, tab or line break; else only those at both ends are left out
    """

    NAME = "text_match"
    AGGREGATE = "share"

    ignore_case: bool = False
    ignore_punctuation: bool = False
    ignore_whitespace: bool = False

    def statistics(self, answers: Sequence[Answer]) -> NDArray[np.float64]:
        return column([self._normal(answer.text) == self._normal(answer.reference) for answer in answers])

    def _normal(self, text: str) -> str:
        if self.ignore_case:
            text = text.casefold()
        if self.ignore_punctuation:
            text = "".join(
                sign for sign in text if sign not in string.punctuation and unicodedata.category(sign)[0] != "P"
            )
        return _SPACES.sub("", text) if self.ignore_whitespace else text.strip()


@dataclass(frozen=True)
class Contains(Metric):
    """Share of the rows whose answer has the reference somewhere in it. An empty reference is in every answer.

    ignore_case  by Unicode's case folding
    """

    NAME = "contains"
    AGGREGATE = "share"

    ignore_case: bool = False

    def statistics(self, answers: Sequence[Answer]) -> NDArray[np.float64]:
        def form(text: str) -> str:
            return text.casefold() if self.ignore_case else text

        return column([form(answer.reference) in form(answer.text) for answer in answers])


@dataclass(frozen=True)
class RegexMatch(Metric):
    """Without a group: share of the rows in whose answer `pattern` is found. With a group: share of the rows where what
    the group holds is what it holds in the reference, or, if the pattern is not found there, the whole reference.

    pattern  a regular expression of the package `regex` (that of Python's re and more); flags stand in it, as (?i)
    take     with a group: the first or the last place in the text where the pattern is found

    Of several groups the first that took part counts. A search that takes more than 5 s is an error, not a miss: how
    fast a machine is may not change a score.
    """

    NAME = "regex"
    AGGREGATE = "share"

    pattern: str
    take: Literal["first", "last"] = "first"

    def __post_init__(self) -> None:
        super().__post_init__()
        self._compiled()

    def _compiled(self) -> Any:
        import regex

        try:
            return regex.compile(self.pattern)
        except regex.error as error:
            what = f"the pattern {clipped(self.pattern, 80)!r} is no regular expression: {error}"
            raise UserError(
                what, where=f"metrics.{self.NAME}.pattern", do="mend it; in YAML use single quotes"
            ) from None

    def statistics(self, answers: Sequence[Answer]) -> NDArray[np.float64]:
        pattern = self._compiled()
        if not pattern.groups:
            return column([self._found(pattern, answer.text, answer) is not None for answer in answers])
        right = []
        for answer in answers:
            asked = self._found(pattern, answer.reference, answer)
            given = self._found(pattern, answer.text, answer)
            right.append(given is not None and given == (answer.reference.strip() if asked is None else asked))
        return column(right)

    def _found(self, pattern: Any, text: str, answer: Answer) -> str | None:
        """What the pattern's group holds, without outer spaces; None where the pattern is not found."""
        found = None
        try:
            for place in pattern.finditer(text, timeout=_MOST_SECONDS):
                found = place
                if self.take == "first" or not pattern.groups:
                    break
        except TimeoutError:
            what = f"the pattern {clipped(self.pattern, 80)!r} searches a text of {len(text):,} signs without end"
            do = "write it so that a text can be read in one way only, or with possessive quantifiers: (?:a|b)++"
            raise UserError(what, where=answer.where, do=do) from None
        if found is None:
            return None
        return next((group for group in found.groups() if group is not None), "").strip()
