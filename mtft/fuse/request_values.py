"""Values that no request may hold, in whatever field: half a surrogate pair, NaN, a number of 400 digits.

JSON can carry them, and Python reads them; tokenizers, floats and UTF-8 files can't take them.
"""

from __future__ import annotations

import math
from typing import Any

from mtft.fuse.alpha.spec import FusionError

LARGEST = 1 << 64  # what a seed may be; no other number of a request is larger

# what a row or a body of a shape that nobody thought of may raise
ROW_ERRORS = (ArithmeticError, AttributeError, LookupError, RecursionError, TypeError, ValueError)


def check_text(text: str, name: str) -> None:
    """FusionError for half a surrogate pair: JSON can hold one, no text can."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise FusionError(
            f"{name} is no Unicode text: half a surrogate pair at character {error.start + 1}",
            do="write the whole character",
        ) from None


def check_values(request: dict[str, Any]) -> None:
    """Look at every value of a request, at any depth. FusionError names the place."""
    stack: list[tuple[str, Any]] = [("", request)]
    while stack:
        where, value = stack.pop()
        if isinstance(value, dict):
            for key, inner in value.items():
                check_text(str(key), f"a key of {where or 'the request'}")
                stack.append((f"{where}.{key}" if where else str(key), inner))
        elif isinstance(value, list):
            stack += [(f"{where}[{position}]", inner) for position, inner in enumerate(value)]
        elif isinstance(value, str):
            check_text(value, where)
        elif isinstance(value, float):
            if not math.isfinite(value):
                raise FusionError(f"{where} is {value}: not a finite number")
        elif isinstance(value, int):
            if not -LARGEST < value < LARGEST:
                raise FusionError(f"{where} is a number of more than 64 bits")
        elif value is not None:
            raise FusionError(f"{where} is a {type(value).__name__}: give text, numbers, lists and objects")
