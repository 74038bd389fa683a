"""The error of this package. It has the same shape as mtft.common.errors.UserError, which this package may not
import.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any


class MixError(ValueError):
    """Input that cannot be used: `what` is wrong, `where` (file, line, key), what to `do`."""

    def __init__(self, what: str, *, where: str | None = None, do: str | None = None) -> None:
        super().__init__(what)
        self.what, self.where, self.do = what, where, do

    def __str__(self) -> str:
        lines = [self.what]
        if self.where:
            lines.append(f"  where: {self.where}")
        if self.do:
            lines.append(f"  do:    {self.do}")
        return "\n".join(lines)


def check_seed(seed: int) -> None:
    """MixError for a seed that numpy's and scikit-learn's generators don't take."""
    if not 0 <= seed < 2**32:
        raise MixError(f"seed is {seed}", where="seed", do="a whole number from 0 to 4294967295")


def optional_package(module: str, name: str, *, where: str, install: str) -> Any:
    """The module; MixError, with the way to install it, where it is missing."""
    try:
        return import_module(module)
    except ImportError as error:
        raise MixError(f"{name} is not installed", where=where, do=f"pip install {install}") from error
