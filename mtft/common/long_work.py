"""What is said of work that takes long, to people and to logs."""

from __future__ import annotations

import time
from collections.abc import Callable

SILENCE = 10.0  # seconds after which something is said


class LongWork:
    """Call it with (parts done, parts in all) after each part; it says so at most every SILENCE seconds.

    first  the first part is told of at once, with what follows from it
    total  more to say of the seconds that the whole will take
    """

    def __init__(
        self,
        say: Callable[[str], None],
        what: str,
        *,
        first: bool = False,
        total: Callable[[float], str] | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.say, self.what, self.first, self.total, self.clock = say, what, first, total, clock
        self.begin = self.said = clock()

    def __call__(self, done: int, of: int) -> None:
        now = self.clock()
        if not (self.first and done == 1) and (now - self.said < SILENCE or done >= of):
            return
        self.said = now
        whole = (now - self.begin) / done * of
        left = f", about {duration(whole - (now - self.begin))} to go" if done < of else ""
        more = "" if self.total is None else f"; {self.total(whole)}"
        self.say(f"{self.what} {done} of {of} done after {duration(now - self.begin)}{left}{more}")


def duration(seconds: float) -> str:
    """0.2 s, 35 s, 4 min 10 s, 2 h 5 min, 3 days 4 h."""
    if seconds < 9.95:
        return f"{seconds:.1f} s"
    whole = round(seconds)
    for unit, size, below, small in (("day", 86400, "h", 3600), ("h", 3600, "min", 60), ("min", 60, "s", 1)):
        if whole >= size:
            count, rest = whole // size, whole % size // small
            many = "s" if unit == "day" and count > 1 else ""
            return f"{count} {unit}{many}" + (f" {rest} {below}" if rest else "")
    return f"{whole} s"
