"""Fingerprints of what is in things: the one use of hashlib in mtft. Files on disk hold them, so none may change."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any, Literal


def content_hash(content: str | bytes | memoryview) -> str:
    """SHA-256 (hex) of bytes, or of a text as UTF-8."""
    return hashlib.sha256(content.encode() if isinstance(content, str) else content).hexdigest()


def json_hash(value: Any, **options: Any) -> str:
    """SHA-256 (hex) of a JSON-like value, whatever the order of its keys. options: of json.dumps."""
    return content_hash(json.dumps(value, sort_keys=True, **options))


def file_hash(path: Path) -> str:
    """SHA-256 (hex) of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def hash_number(text: str, order: Literal["big", "little"], size: int = 8) -> int:
    """The first `size` bytes of a text's SHA-256 as a whole number >= 0: a seed, or a draw that hangs on a name."""
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:size], order)


def blake2b(size: int, content: bytes = b"") -> hashlib.blake2b:
    """A BLAKE2b hash of `size` bytes, to be fed with more."""
    return hashlib.blake2b(content, digest_size=size)
