"""Lists in messages, cut to what people read: a file may hold a million names, each as long as a book."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

MOST_LINES = 15  # of the problems in one message


def listed(items: Iterable[object], most: int = 12, *, between: str = ", ") -> str:
    """`a, b, c and 5 more`: at most `most` of them, each clipped."""
    every = list(items)
    shown = between.join(clipped(str(item), 80) for item in every[:most])
    return shown if len(every) <= most else f"{shown} and {len(every) - most:,} more"


def clipped(text: str, limit: int) -> str:
    """The text, or its two ends where it is longer than `limit`."""
    if len(text) <= limit:
        return text
    tail = limit // 4
    return f"{text[: limit - tail - 3]}...{text[-tail:]}"


def first_lines(lines: Sequence[str], most: int = MOST_LINES, limit: int = 400) -> list[str]:
    """The first lines, each clipped, and how many more there are."""
    shown = [clipped(line, limit) for line in lines[:most]]
    return shown if len(lines) <= most else [*shown, f"  ... and {len(lines) - most:,} more"]
