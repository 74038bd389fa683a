"""The error of this package. It has the same shape as mtft.common.errors.UserError, which this package may not
import.
"""

from __future__ import annotations


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
