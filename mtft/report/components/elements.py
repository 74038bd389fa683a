"""What a section of the page is made of; the template knows how each kind looks."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field


@dataclass(frozen=True)
class TableCell:
    text: str
    mark: str = ""  # "best", "ref" or nothing


@dataclass(frozen=True)
class TableRow:
    cells: list[TableCell]
    total: bool = False


@dataclass(frozen=True)
class HeaderCell:
    text: str
    ref: bool = False


@dataclass(frozen=True)
class HtmlTable:
    head: list[HeaderCell]
    rows: list[TableRow]
    words: bool = False  # long text in the last column: wrapped
    kind: str = "table"


@dataclass(frozen=True)
class Plot:
    caption: str
    svg: str


@dataclass(frozen=True)
class Plots:
    plots: list[Plot]
    kind: str = "plots"


@dataclass(frozen=True)
class Paragraph:
    """kind: text, note, heading or verdict."""

    text: str
    kind: str = "text"


@dataclass(frozen=True)
class TokenSpan:
    text: str
    shade: float  # 0..1
    title: str


@dataclass(frozen=True)
class Tokens:
    tokens: list[TokenSpan]
    kind: str = "tokens"


@dataclass(frozen=True)
class Code:
    title: str
    text: str
    kind: str = "code"


@dataclass(frozen=True)
class Folded:
    """A table that opens on a click."""

    title: str
    table: HtmlTable
    kind: str = "folded"


@dataclass(frozen=True)
class PageSection:
    id: str
    title: str
    parts: list = field(default_factory=list)


def number(value: object, digits: int = 3) -> str:
    """A figure as a reader wants it; `-` for what is absent."""
    if value is None or (isinstance(value, float) and not math.isfinite(value)):
        return "–"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, float):
        return f"{value:.{digits}f}" if abs(value) < 1000 else f"{value:,.0f}"
    return str(value)


def percent(value: float | None, digits: int = 1) -> str:
    return "–" if value is None or not math.isfinite(value) else f"{value:.{digits}%}"


def table(
    head: Sequence[str], rows: Sequence[Sequence[object]], *, total: bool = False, words: bool = False
) -> HtmlTable:
    """A plain table; `total` sets off the last row, `words` wraps the last column."""
    return HtmlTable(
        [HeaderCell(text) for text in head],
        [
            TableRow([TableCell(number(value)) for value in row], total=total and index == len(rows) - 1)
            for index, row in enumerate(rows)
        ],
        words,
    )
