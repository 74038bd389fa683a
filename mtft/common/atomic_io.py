"""Files that are there whole or not at all: written aside, then renamed."""

from __future__ import annotations

import json
import math
import os
from pathlib import Path
from typing import Any


def write_text(path: Path, text: str) -> None:
    """Writes a file of UTF-8 text, and the folder it lies in."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f"{path.name}.{os.getpid()}.part")
    partial.write_text(text, encoding="utf-8")
    os.replace(partial, path)


def sync(path: Path) -> None:
    """Forces a file, or the list of a folder's entries, to disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def write_json(path: Path, content: object, *, indent: int = 1) -> None:
    """Writes a JSON file. Raises ValueError for NaN and infinity, which JSON has not."""
    write_text(path, json.dumps(content, indent=indent, allow_nan=False) + "\n")


def finite(node: Any) -> Any:
    """The same tree with None where a number is NaN or infinite: JSON has neither."""
    if isinstance(node, dict):
        return {key: finite(value) for key, value in node.items()}
    if isinstance(node, list | tuple):
        return [finite(value) for value in node]
    return None if isinstance(node, float) and not math.isfinite(node) else node


def let_read(folder: Path) -> None:
    """Gives the files of a folder the mode that new files have: safetensors leaves its own to their owner alone."""
    mask = os.umask(0)
    os.umask(mask)
    for path in folder.iterdir():
        if path.is_file():
            path.chmod(0o666 & ~mask)
