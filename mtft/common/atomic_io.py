"""Files that are there whole or not at all: written aside, then renamed."""

from __future__ import annotations

import json
import os
from pathlib import Path


def write_text(path: Path, text: str) -> None:
    """Writes a file of UTF-8 text, and the folder it lies in."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f"{path.name}.{os.getpid()}.part")
    partial.write_text(text, encoding="utf-8")
    os.replace(partial, path)


def write_json(path: Path, content: object, *, indent: int = 1) -> None:
    """Writes a JSON file. Raises ValueError for NaN and infinity, which JSON has not."""
    write_text(path, json.dumps(content, indent=indent, allow_nan=False) + "\n")
