"""The kinds of damage that files of ours are tried with."""

from __future__ import annotations

import json
import os
from pathlib import Path

from mtft.common.own_files import FORMAT

NEEDS = {"steps": int, "loss": float, "tasks": dict, "tasks.sql": (str, type(None))}
WHOLE = {"steps": 3, "loss": 1, "tasks": {"sql": None}}
# kind: what the file holds, the line that is named, and what is said
DAMAGE = {
    "empty": (b"", ":1", "not valid JSON"),
    "cut": (b'{"steps": 3,\n "lo', ":2", "not valid JSON"),
    "list": (b"[]", "", "a list, not an object"),
    "null": (b"null", "", "null, not an object"),
    "number": (b"5", "", "a whole number, not an object"),
    "deep": (b"[" * 100_000, "", "nested too deeply"),
    "bytes": (b'{"steps": "\xff"}', "", "not UTF-8"),
    "key gone": (json.dumps({**WHOLE, "tasks": {}}).encode(), "", "key tasks.sql is missing"),
    "key of another type": (
        json.dumps({**WHOLE, "steps": "3"}).encode(),
        "",
        "key steps is a text, not a whole number",
    ),
    "true for a number": (json.dumps({**WHOLE, "steps": True}).encode(), "", "key steps is true or false"),
    "format no number": (json.dumps({**WHOLE, "format": "x"}).encode(), "", "key format"),
}
OBJECTS = ("key gone", "key of another type", "true for a number")  # what other files are too: objects all the same
NOT_FILES = ("a folder", "a pipe")
NEWER = json.dumps({"format": FORMAT + 1}).encode()
UNREADABLE = (*(kind for kind in DAMAGE if kind not in OBJECTS), *NOT_FILES)  # whatever the file is


def damage(path: Path, kind: str) -> None:
    """Puts a kind of DAMAGE, "newer" or one of NOT_FILES in the place of a file."""
    path.unlink(missing_ok=True)
    path.parent.mkdir(parents=True, exist_ok=True)
    if kind == "a folder":
        path.mkdir()
    elif kind == "a pipe":
        os.mkfifo(path)
    else:
        content = NEWER if kind == "newer" else DAMAGE[kind][0]
        path.write_bytes(content + b"\n" * path.name.endswith(".jsonl"))
