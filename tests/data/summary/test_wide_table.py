"""A table is whole at any width: no number is cut, the rows stay told apart."""

import io

import pytest
from rich.console import Console

from mtft.data.summary.wide_table import WideTable, shortened

NAMES = [f"a-rather-long-task-name-{k:02d}" for k in range(30)]


def drawn(width):
    rows = [(name, f"{k * 1234567:,}", f"{k / 7:.4f}", str(k), f"{k * 99:,}", "-") for k, name in enumerate(NAMES)]
    table = WideTable("[x] data", ("task", "prompt tokens", "share x weight", "cut", "examples/step", "held out"), rows)
    stream = io.StringIO()
    Console(file=stream, width=width, color_system=None).print(table)
    return rows, stream.getvalue()


@pytest.mark.parametrize("width", [40, 64, 80, 120, 300])
def test_every_cell_is_there(width):
    rows, text = drawn(width)
    lines = text.splitlines()
    assert max(map(len, lines)) <= width
    assert "[x] data" in text
    cells = [[cell.strip() for cell in line.split("│")[1:-1]] for line in lines if line.startswith("│")]
    by_name = {}
    for name, *numbers in cells:
        by_name.setdefault(name, []).extend(numbers)
    assert list(by_name.values()) == [list(row[1:]) for row in rows]
    if width == 300:
        assert list(by_name) == NAMES
    assert len(by_name) == 30  # cut in the middle, still different


def test_shortened():
    assert [shortened("abcdefghij", width) for width in (10, 9, 5, 3)] == ["abcdefghij", "abcd…ghij", "ab…ij", "a…j"]
