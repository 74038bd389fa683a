"""Tables for terminals of any width: what does not fit beside each other goes below, with the first column again."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from rich.console import Console, ConsoleOptions, RenderResult
from rich.table import Table
from rich.text import Text

FRAME = 3  # characters that a column takes beside its text


class WideTable:
    """A table of text cells. The first column names the row; the others are right-aligned numbers."""

    def __init__(self, title: str, names: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
        self.title, self.names, self.rows = title, list(names), [list(row) for row in rows]

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        head = min(self._width(0), max(options.max_width // 3, 9))  # a long name is cut before numbers have no room
        for number, chosen in enumerate(self._parts(options.max_width, head + FRAME + 1)):
            title = Text(self.title, style="italic") if number == 0 else None
            table = Table(title=title, title_justify="left")
            table.add_column(self.names[0], width=head)
            wide = [max(self._width(position), len(self.names[position])) for position in chosen]
            if head + FRAME + 1 + sum(wide) + FRAME * len(wide) > options.max_width:
                wide = [self._width(position) for position in chosen]
            for position, width in zip(chosen, wide):
                table.add_column(self.names[position], justify="right", width=width)
            for row in self.rows:
                table.add_row(Text(shortened(row[0], head)), *(row[position] for position in chosen))
            yield table

    def _parts(self, width: int, first: int) -> Iterator[list[int]]:
        """Columns beside the first one, as many as fit into `width` at a time, at least one."""
        part: list[int] = []
        used = first
        for position in range(1, len(self.names)):
            need = self._width(position) + FRAME
            if part and used + need > width:
                yield part
                part, used = [], first
            part.append(position)
            used += need
        yield part

    def _width(self, position: int) -> int:
        """Widest cell, or word of the heading (headings wrap)."""
        cells = [len(row[position]) for row in self.rows]
        return max([*cells, *(len(word) for word in self.names[position].split())])


def shortened(name: str, width: int) -> str:
    """Cut in the middle: names of one family differ at their ends."""
    if len(name) <= width:
        return name
    head = (width - 1) // 2
    return f"{name[:head]}…{name[len(name) - (width - 1 - head) :]}"
