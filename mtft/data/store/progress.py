"""Progress on stderr: a bar on a terminal, and in logs a line now and then."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from mtft.common.long_work import SILENCE, LongWork, duration


@contextmanager
def progress(title: str, total: int | None) -> Iterator[Callable[[int], None]]:
    """Yields advance(n). Without a terminal a line every SILENCE seconds, none of short work."""
    if not sys.stderr.isatty():
        yield _Lines(title, total)
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task(title, total=total)
        yield lambda n: bar.advance(task, n)


class _Lines:
    def __init__(self, title: str, total: int | None) -> None:
        self.title, self.total, self.done = title, total, 0
        self.begin = self.said = time.monotonic()
        self.work = LongWork(_say, f"{title}:")

    def __call__(self, n: int) -> None:
        self.done += n
        if self.total is not None:
            self.work(self.done, self.total)
        elif (now := time.monotonic()) - self.said >= SILENCE:
            self.said = now
            _say(f"{self.title}: {self.done:,} rows done after {duration(now - self.begin)}")


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
