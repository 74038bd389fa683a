"""Files that we wrote and read back (JSON, JSON lines): one reader, so that a damaged one is never a riddle.

What is written with `write_own` says its format; a file of a later one is refused as such, not as damaged.
"""

from __future__ import annotations

import json
import os
import stat
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mtft.common.atomic_io import write_json
from mtft.common.errors import UserError

FORMAT = 1  # raised when a file's keys change their meaning
Types = type | tuple[type, ...]
_NAMES = {dict: "an object", list: "a list", str: "a text", bool: "true or false", int: "a whole number"}
_NAMES |= {float: "a number", type(None): "null"}
_KINDS = {stat.S_IFDIR: "a folder", stat.S_IFIFO: "a named pipe", stat.S_IFSOCK: "a socket"}
_KINDS |= {stat.S_IFCHR: "a device", stat.S_IFBLK: "a device"}


def write_own(path: Path, content: Mapping[str, object], *, indent: int = 1) -> None:
    """Writes a JSON object with the present format. Raises ValueError for NaN and infinity."""
    write_json(path, {"format": FORMAT, **content}, indent=indent)


def read_own(path: Path, needs: Mapping[str, Types] | None = None, *, do: str) -> dict[str, Any]:
    """The JSON object in a file of ours. `needs`: keys (`a.b`: b inside of a) with their types. `do`: the remedy.

    Raises UserError, with file, line and key, if it can't be read, is damaged or from a newer version.
    """
    text = read_own_text(path, do=do)
    try:
        content = _parse(text)
    except json.JSONDecodeError as error:
        raise UserError(f"damaged: not valid JSON ({error.msg})", where=f"{path}:{error.lineno}", do=do) from None
    except ValueError as error:
        raise UserError(f"damaged: {error}", where=str(path), do=do) from None
    if (problem := defect(content, needs or {})) is not None:
        newer = problem.startswith("written by a newer version")
        raise UserError(
            problem if newer else f"damaged: {problem}", where=str(path), do="pip install -U mtft" if newer else do
        )
    return content


@dataclass(frozen=True)
class OwnLines:
    """What a file of JSON lines holds: `rows`, and `problems` ("line 7: not valid JSON") for what is none.

    numbers: the line of each row. torn: the last line has no end, as a process leaves it that is killed while it writes
    (or while it is still writing); it is no row and no problem.
    """

    rows: list[dict[str, Any]]
    numbers: list[int]
    problems: list[str] = field(default_factory=list)
    torn: bool = False


def read_own_lines(path: Path, needs: Mapping[str, Types] | None = None, *, do: str) -> OwnLines:
    """The rows of a JSON lines file of ours, and what is wrong with the other lines. UserError if it can't be read."""
    _refuse_unreadable(path, do)
    try:
        raw = path.read_bytes()
    except OSError as error:
        raise UserError(f"can't be read: {error.strerror}", where=str(path), do=do) from None
    *lines, last = raw.split(b"\n")
    out = OwnLines([], [], [], torn=bool(last.strip()))
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            row = _parse(line.decode("utf-8"))
            problem = defect(row, needs or {})
        except ValueError as error:
            problem = "not valid JSON" if isinstance(error, json.JSONDecodeError) else str(error)
        if problem is None:
            out.rows.append(row)
            out.numbers.append(number)
        else:
            out.problems.append(f"line {number}: {problem}")
    return out


def read_own_text(path: Path, *, do: str) -> str:
    """The text of a file of ours. Raises UserError if it isn't a file, can't be read or isn't UTF-8."""
    _refuse_unreadable(path, do)
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise UserError(f"damaged: not UTF-8 (byte {error.start})", where=str(path), do=do) from None
    except OSError as error:
        raise UserError(f"can't be read: {error.strerror}", where=str(path), do=do) from None


def irregular(path: Path) -> str | None:
    """ "a folder", "a named pipe", ... if `path` is there and is no plain file; never opens it."""
    try:
        mode = os.stat(path).st_mode
    except (OSError, ValueError):  # not there, or a name that no file can have
        return None
    return None if stat.S_ISREG(mode) else _KINDS.get(stat.S_IFMT(mode), "no plain file")


def defect(content: Any, needs: Mapping[str, Types]) -> str | None:
    """What is wrong with the parsed content of a file of ours; None if nothing is."""
    if not isinstance(content, dict):
        return f"it holds {type_name(type(content))}, not an object"
    number = content.get("format", FORMAT)
    if not isinstance(number, int) or isinstance(number, bool):
        return "key format is no whole number"
    if number > FORMAT:
        return f"written by a newer version of mtft (format {number}, this one reads {FORMAT})"
    for key, types in needs.items():
        node: Any = content
        for part in key.split("."):
            if not isinstance(node, dict) or part not in node:
                return f"key {key} is missing"
            node = node[part]
        if not _is(node, types):
            wanted = types if isinstance(types, tuple) else (types,)
            return f"key {key} is {type_name(type(node))}, not {' or '.join(map(type_name, wanted))}"
    return None


def _parse(text: str) -> Any:
    try:
        return json.loads(text)
    except RecursionError:
        raise ValueError("nested too deeply") from None


def _refuse_unreadable(path: Path, do: str) -> None:
    if (kind := irregular(path)) is not None:
        raise UserError(f"{kind}, not a file", where=str(path), do=do)
    if not os.path.exists(path):
        raise UserError("there is no such file", where=str(path), do=do)


def _is(value: Any, types: Types) -> bool:
    wanted = types if isinstance(types, tuple) else (types,)
    if isinstance(value, bool):
        return bool in wanted
    return isinstance(value, wanted) or (isinstance(value, int) and float in wanted)


def type_name(kind: type) -> str:
    """What a JSON value of this type is called: an object, a list, null."""
    return _NAMES.get(kind, kind.__name__)
