"""The files of a token store with their sizes and checksums: damage is found before anything is trained on them.

    meta.json      "content": {file: [bytes, CRC-32]}, and "checksum" of meta.json's own content
    verified.json  {file: [bytes, mtime_ns]} of the files whose checksums were right when somebody last looked

Sizes are compared at every opening; a file is read for its checksum only if its size or time is not what stands in
verified.json, which the builder writes. Checksums are made while the files are written.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from mtft.common.atomic_io import write_text
from mtft.common.errors import UserError
from mtft.common.own_files import FORMAT, read_own, write_own

META, VERIFIED = "meta.json", "verified.json"
BLOCK = 1 << 20
NEEDS = {"fingerprint": str, "dtype": str, "max_length": int, "files": list, "stats": dict, "content": dict}
NEEDS |= {"checksum": int}
ALWAYS = ("ids.bin", "supervised.bin", "offsets.bin", "learnt.bin", "lines.bin")
DO = "delete the folder: the store is built anew"

# What this process has verified, also where verified.json can't be written: {folder: {file: [bytes, mtime_ns]}}.
_seen: dict[Path, dict[str, list[int]]] = {}


class DamagedStoreError(UserError):
    """Files of a token store that are not what was written."""


class SummedFile(io.BufferedWriter):
    """A file that is written from its beginning to its end, with the checksum of what it holds."""

    def __init__(self, path: Path) -> None:
        self._summed = _Summed(path, "wb")
        super().__init__(self._summed, BLOCK)

    def listed(self) -> list[int]:
        """[bytes, CRC-32]; once it is closed."""
        return [self._summed.size, self._summed.checksum]


class _Summed(io.FileIO):
    size = checksum = 0

    def write(self, data: Any, /) -> int | None:
        count = super().write(data)
        if count:
            self.checksum = zlib.crc32(memoryview(data)[:count], self.checksum)
            self.size += count
        return count


def write_array(path: Path, values: np.ndarray) -> list[int]:
    """Writes an array's bytes; [bytes, CRC-32] of the file."""
    with SummedFile(path) as file:
        file.write(np.ascontiguousarray(values).data)
    return file.listed()


def write_meta(folder: Path, meta: Mapping[str, Any]) -> None:
    """Writes meta.json, guarded by its own checksum."""
    write_own(folder / META, {**meta, "checksum": _checksum(meta)})


def read_meta(folder: Path) -> dict[str, Any]:
    """meta.json. DamagedStoreError if it is damaged; UserError if a newer version wrote it."""
    try:
        meta = read_own(folder / META, NEEDS, do=DO)
    except UserError as error:
        if error.what.startswith("written by a newer version"):
            raise
        raise DamagedStoreError(f"{META}: {error.what}", where=error.where, do=DO) from None
    if _checksum(meta) != meta["checksum"]:
        raise DamagedStoreError(f"{META} has changed since it was written", where=str(folder), do=DO)
    return meta


def verify_files(folder: Path, content: Mapping[str, Any]) -> None:
    """DamagedStoreError for the first file that is not what was written. content: of meta.json."""
    now: dict[str, list[int]] = {}
    for name in dict.fromkeys((*ALWAYS, *content)):
        try:
            known = os.stat(f"{folder}/{name}")
        except OSError as error:
            raise DamagedStoreError(f"{name}: {error.strerror}", where=str(folder), do=DO) from None
        size, _ = content.get(name, (None, None))
        if known.st_size != size:
            what = f"{name} has {known.st_size:,} bytes, not {size if size is None else format(size, ',')}"
            raise DamagedStoreError(what, where=str(folder), do=DO)
        now[name] = [known.st_size, known.st_mtime_ns]
    if _seen.get(folder) == now:
        return
    before = _verified(folder)
    unseen = [name for name in now if now[name] != before.get(name)]
    for name in unseen:
        if _crc32(folder / name) != content[name][1]:
            raise DamagedStoreError(f"{name} has changed since it was written", where=str(folder), do=DO)
    _seen[folder] = now
    if unseen:
        with contextlib.suppress(OSError):  # a cache that can only be read: the next process looks again
            write_verified(folder, now)


def write_verified(folder: Path, now: Mapping[str, list[int]] | None = None) -> None:
    """Notes that the files are what was written. now: their sizes and times (None: as they are)."""
    if now is None:
        stats = {path.name: path.stat() for path in folder.glob("*.bin")}
        now = {name: [known.st_size, known.st_mtime_ns] for name, known in stats.items()}
    write_text(folder / VERIFIED, json.dumps({"format": FORMAT, "files": now}) + "\n")


def _verified(folder: Path) -> Mapping[str, Any]:
    """{file: [bytes, mtime_ns]}; nothing if it can't be read: then all files are verified again."""
    try:
        return read_own(folder / VERIFIED, {"files": dict}, do=DO)["files"]
    except UserError:
        return {}


def _checksum(meta: Mapping[str, Any]) -> int:
    plain = {key: value for key, value in meta.items() if key not in ("format", "checksum")}
    return zlib.crc32(json.dumps(plain, sort_keys=True).encode())


def _crc32(path: Path) -> int:
    checksum = 0
    try:
        with path.open("rb") as file:
            while block := file.read(BLOCK):
                checksum = zlib.crc32(block, checksum)
    except OSError as error:
        raise DamagedStoreError(f"{path.name}: {error.strerror}", where=str(path.parent), do=DO) from None
    return checksum
