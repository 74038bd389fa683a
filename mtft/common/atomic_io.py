"""Files that are there whole or not at all: written aside, then renamed."""

from __future__ import annotations

import glob
import json
import math
import os
from pathlib import Path
from typing import Any


def write_text(path: Path, text: str) -> None:
    """Writes a file of UTF-8 text, and the folder it lies in."""
    path.parent.mkdir(parents=True, exist_ok=True)
    for left_over in path.parent.glob(f".{glob.escape(path.name)}.*.part"):
        if not process_lives(left_over.suffixes[-2][1:]):
            left_over.unlink(missing_ok=True)
    partial = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        partial.write_text(text, encoding="utf-8")
        os.replace(partial, path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise


def process_lives(number: str) -> bool:
    """Whether a process of this machine has this number; True for what is no number."""
    try:
        os.kill(int(number), 0)
    except ProcessLookupError:
        return False
    except (PermissionError, OverflowError, ValueError):
        pass
    return True


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
