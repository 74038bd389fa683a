"""The hint for a misspelt name: the one use of difflib in data_mixers and mtft."""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from itertools import islice

LONGEST, MOST = 100, 2000  # of names: people misspell short ones, and each comparison takes time


def closest_match(name: object, known: Iterable[str], *, cutoff: float = 0.6) -> str | None:
    """The known name most like `name`; None if none reaches `cutoff` (difflib's ratio, 0 to 1)."""
    if len(wanted := str(name)) > LONGEST:
        return None
    near = [other for other in islice(known, MOST) if len(other) <= LONGEST]
    matches = difflib.get_close_matches(wanted, near, n=1, cutoff=cutoff)
    return matches[0] if matches else None


def did_you_mean(name: object, known: Iterable[str]) -> str:
    """`: did you mean 'x'?` or nothing."""
    match = closest_match(name, known)
    return f": did you mean {match!r}?" if match else ""
