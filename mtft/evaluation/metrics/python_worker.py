"""The process in which a function of the user's own runs: JSON lines in, JSON lines out. Imports nothing of mtft.

    in   {"source": the file's bytes as latin-1, "file", "function"}, then {"prompt", "reference", "answer", "row"}
    out  {"score": null} once the file is loaded, then {"score": number} for each row; or {"error", "line"}, and the end

Both are streams of their own: what the function prints goes nowhere, and what it reads from stdin is empty.
"""

from __future__ import annotations

import json
import math
import os
import sys
import types
from collections.abc import Callable
from numbers import Real
from typing import Any

_MOST_SIGNS = 500  # of a message


def main() -> None:
    """Serves one file until the lines end."""
    lines, results = os.fdopen(os.dup(0), "rb"), os.fdopen(os.dup(1), "wb")
    nothing = os.open(os.devnull, os.O_RDWR)
    for stream in range(3):
        os.dup2(nothing, stream)
    start = json.loads(lines.readline())

    def tell(work: Callable[[], Any], show: Callable[[Any], float | None]) -> Any:
        value, reply = None, {}
        try:
            value = work()
            reply = {"score": show(value)}
        except BaseException as error:  # noqa: BLE001  of the user's own code, also SystemExit
            reply = {"error": _said(error), "line": _line(error, start["file"])}
        results.write(json.dumps(reply).encode() + b"\n")
        results.flush()
        if "error" in reply:
            sys.exit(1)
        return value

    function = tell(lambda: _load(start), lambda _: None)
    for line in lines:
        row = json.loads(line)
        tell(lambda: function(row["prompt"], row["reference"], row["answer"], row["row"]), _number)  # noqa: B023


def _load(start: dict[str, str]) -> Any:
    """The function of the file. Nothing is written beside it, and its folder is not searched for other modules."""
    module = types.ModuleType("user_metric")
    module.__file__ = start["file"]
    sys.modules[module.__name__] = module
    exec(compile(start["source"].encode("latin-1"), start["file"], "exec", dont_inherit=True), module.__dict__)
    function = getattr(module, start["function"], None)
    if not callable(function):
        raise TypeError(f"{start['function']} is no function in {start['file']}")
    return function


def _number(value: Any) -> float:
    if not isinstance(value, Real):
        raise TypeError(f"it returned {type(value).__name__}, not a number")
    number = float(value)
    if not math.isfinite(number):
        raise ValueError(f"it returned {number}")
    return number


def _said(error: BaseException) -> str:
    try:
        text = str(error)
    except BaseException:  # noqa: BLE001  an exception of the user's own
        text = ""
    return f"{type(error).__name__}: {text}"[:_MOST_SIGNS].rstrip(": ")


def _line(error: BaseException, file: str) -> int | None:
    """The innermost line of the user's file that an exception went through."""
    if isinstance(error, SyntaxError) and error.filename == file:
        return error.lineno
    line, trace = None, error.__traceback__
    while trace is not None:
        if trace.tb_frame.f_code.co_filename == file:
            line = trace.tb_lineno
        trace = trace.tb_next
    return line


if __name__ == "__main__":
    main()
