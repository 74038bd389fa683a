"""Numbers on the command line: every one has a range, and what is outside, infinite or NaN is refused with it."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar

import typer

SEEDS = 2**32  # numpy's and torch's generators take smaller ones
LARGEST = 1e12  # of a number that has no end of its own: past it are overflows


@dataclass(frozen=True)
class NumberRange:
    """Reads the number of a flag from its text. low, high: both are allowed, and so are `words`."""

    flag: str
    low: float
    high: float
    whole: bool = True
    words: tuple[str, ...] = ()
    __name__: ClassVar[str] = "number"  # typer asks a parser for it

    def __call__(self, given: Any) -> Any:
        """The number; UserError names flag and range. Defaults come here as they are."""
        from mtft.common.errors import UserError
        from mtft.common.listing import clipped

        if given in self.words:
            return given
        try:
            value = int(given) if self.whole else float(given)
        except (ValueError, OverflowError):
            value = math.nan
        if self.low <= value <= self.high:  # not NaN
            return value
        raise UserError(
            f"{self.flag} is {clipped(str(given), 60)}, and must be {self.text()}",
            where=f"command line, {self.flag}",
            do="give a number in that range",
        )

    def text(self) -> str:
        """The range in words."""
        kind = "whole number" if self.whole else "number"
        return " or ".join((f"a {kind} from {self.low:.15g} to {self.high:.15g}", *self.words))


def whole(flag: str, low: int, high: int, *, help: str) -> Any:
    """typer.Option of a whole number from low to high."""
    return _option(NumberRange(flag, low, high), help)


def number(flag: str, low: float, high: float, *, help: str) -> Any:
    """typer.Option of a number from low to high."""
    return _option(NumberRange(flag, low, high, whole=False), help)


def _option(limits: NumberRange, help: str) -> Any:
    return typer.Option(limits.flag, parser=limits, metavar=f"<{limits.low:.15g}..{limits.high:.15g}>", help=help)


def seed_option(help: str) -> Any:
    """typer.Option of a seed."""
    return whole("--seed", 0, SEEDS - 1, help=help)
