"""Safetensors files through numpy: one tensor at a time in, a stream of tensors out, bfloat16 included.

The library's numpy front end knows no bfloat16 and writes whole dictionaries. Here `safe_open` still proves each
file's structure; the bytes of one tensor are then read at the offset that its header gives.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import BinaryIO, NamedTuple, Self

import numpy as np
from safetensors import SafetensorError, safe_open

from mtft.common.errors import MergeError
from mtft.common.own_files import irregular

FLOATS = {"F64": np.dtype("<f8"), "F32": np.dtype("<f4"), "F16": np.dtype("<f2"), "BF16": np.dtype("<u2")}
"""On-disk type of each float that an adapter may have; bfloat16 is the upper half of a float32."""


class Entry(NamedTuple):
    """Where one tensor lies: type name, shape, first and last byte (exclusive) in the file."""

    dtype: str
    shape: tuple[int, ...]
    start: int
    end: int


def read_header(path: Path) -> dict[str, Entry]:
    """{tensor: where it lies} as the header of a .safetensors file says, which is not checked here."""
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if length > path.stat().st_size:
            raise ValueError(f"a header of {length} bytes in a file of {path.stat().st_size}")
        header = json.loads(file.read(length))
    header.pop("__metadata__", None)
    first = 8 + length
    return {
        key: Entry(item["dtype"], tuple(item["shape"]), *(first + offset for offset in item["data_offsets"]))
        for key, item in header.items()
    }


class TensorFile:
    """The header of a .safetensors file; tensors are read one by one.

    Raises MergeError if the file is not a whole safetensors file, or a tensor is not a float.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        redo = "copy or save the adapter again"
        try:
            if (kind := irregular(path)) is not None:
                raise ValueError(f"it is {kind}")
            with safe_open(path, framework="np"):
                pass
            self.entries = read_header(path)
        except (SafetensorError, OSError, ValueError, RecursionError) as error:
            raise MergeError(f"not a whole safetensors file ({error})", where=str(path), do=redo) from None
        size = path.stat().st_size
        for key, entry in self.entries.items():
            if entry.dtype not in FLOATS:
                raise MergeError(
                    f"tensor {key!r} has type {entry.dtype}; adapters are merged from {', '.join(FLOATS)}",
                    where=str(path),
                    do="save the adapter in bfloat16, float16 or float32",
                )
            if entry.end > size or entry.end - entry.start != math.prod(entry.shape) * FLOATS[entry.dtype].itemsize:
                raise MergeError(f"tensor {key!r} does not fit its place in the file", where=str(path), do=redo)

    def read(self, key: str, dtype: np.dtype | type = np.float64) -> np.ndarray:
        """The tensor as `dtype` (exact for float32 and up). NaN or infinite values: MergeError with their count."""
        return self._read(key, dtype, 0, math.prod(self.entries[key].shape)).reshape(self.entries[key].shape)

    def rows(self, key: str, start: int, stop: int, dtype: np.dtype | type = np.float64) -> np.ndarray:
        """Rows start:stop of a tensor as [rows, the rest]; a vector is one row."""
        height, width = as_matrix(self.entries[key].shape)
        stop = min(stop, height)
        return self._read(key, dtype, start * width, (stop - start) * width).reshape(stop - start, width)

    def _read(self, key: str, dtype: np.dtype | type, first: int, count: int) -> np.ndarray:
        entry = self.entries[key]
        kind = FLOATS[entry.dtype]
        raw = np.fromfile(self.path, kind, count, offset=entry.start + first * kind.itemsize)
        values = (raw.astype(np.uint32) << 16).view(np.float32) if entry.dtype == "BF16" else raw
        values = values.astype(dtype, copy=False)
        if not math.isfinite(float(values.sum(dtype=np.float64))):
            bad = int(np.count_nonzero(~np.isfinite(values)))
            raise MergeError(
                f"{bad} of {values.size} values of {key!r} are NaN or infinite",
                where=str(self.path),
                do="leave this adapter out, or take an earlier checkpoint of it",
            )
        return values


def open_tensors(folder: Path, weights: str, redo: str) -> dict[str, TensorFile] | None:
    """{key: its file} of `folder`/WEIGHTS, or of the shards in WEIGHTS.index.json; None if neither is there.

    Raises MergeError for an index that is broken or leads out of the folder. redo: what to do about it.
    """
    if os.path.isfile(folder / weights):
        file = TensorFile(folder / weights)
        return dict.fromkeys(file.entries, file)
    index = folder / f"{weights}.index.json"
    if not os.path.isfile(index):
        return None
    try:
        weight_map = json.loads(index.read_text("utf-8"))["weight_map"]
        names = sorted(set(weight_map.values()))
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise MergeError(f"the shard index can't be read: {error}", where=str(index), do=redo) from None
    for name in names:
        if not isinstance(name, str) or Path(name).name != name or not name.endswith(".safetensors"):
            raise MergeError(f"shard {name!r} is no plain file name", where=str(index), do=redo)
    shards = {name: TensorFile(folder / name) for name in names}
    for key, name in weight_map.items():
        if key not in shards[name].entries:
            raise MergeError(f"{key!r} is not in {name}", where=str(index), do=redo)
    return {key: shards[name] for key, name in weight_map.items()}


def as_matrix(shape: tuple[int, ...]) -> tuple[int, int]:
    """(rows, columns) of a tensor: its first dimension and the rest; vectors and scalars are one row."""
    return (1, math.prod(shape)) if len(shape) < 2 else (shape[0], math.prod(shape[1:]))


def to_disk(values: np.ndarray, dtype: str) -> np.ndarray:
    """Values rounded to nearest-even in an on-disk type (uint16 for BF16). Too large for it: OverflowError."""
    if dtype != "BF16":
        with np.errstate(over="ignore"):
            out = values.astype(FLOATS[dtype])
        finite = np.isfinite(out).all()
    else:
        bits = np.ascontiguousarray(values, np.float32).view(np.uint32)
        out = ((bits + (0x7FFF + ((bits >> 16) & 1))) >> 16).astype("<u2")
        finite = ((out & 0x7F80) != 0x7F80).all()
    if not finite:
        raise OverflowError(f"values up to {np.abs(values).max():.3g} do not fit {dtype}")
    return out


class TensorWriter:
    """Writes the tensors of a .safetensors file one after the other, in the order of `entries`.

    entries: (key, type name, shape). The header goes out first, so memory never holds more than one tensor. As a
    context: closed at the end of the block, whole or not.
    """

    def __init__(self, path: Path, entries: Sequence[tuple[str, str, tuple[int, ...]]]) -> None:
        header: dict[str, object] = {"__metadata__": {"format": "pt"}}
        offset = 0
        for key, dtype, shape in entries:
            end = offset + math.prod(shape) * FLOATS[dtype].itemsize
            header[key] = {"dtype": dtype, "shape": list(shape), "data_offsets": [offset, end]}
            offset = end
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)  # the format wants the data aligned to 8 bytes
        self._expected = list(entries)
        self._file: BinaryIO = path.open("xb")
        self._file.write(len(text).to_bytes(8, "little") + text)

    def write(self, key: str, values: np.ndarray) -> None:
        name, dtype, shape = self._expected.pop(0)
        if (key, values.shape) != (name, tuple(shape)):
            raise ValueError(f"expected {name} {shape}, got {key} {values.shape}")
        self._file.write(np.ascontiguousarray(to_disk(values, dtype)).data)

    def write_rows(self, key: str, blocks: Iterable[np.ndarray]) -> None:
        """A tensor in row blocks, as `TensorFile.rows` gives them."""
        name, dtype, shape = self._expected.pop(0)
        height, width = as_matrix(tuple(shape))
        done = 0
        for block in blocks:
            if block.shape[1:] != (width,):
                raise ValueError(f"expected rows of {width}, got {block.shape}")
            self._file.write(np.ascontiguousarray(to_disk(block, dtype)).data)
            done += len(block)
        if (key, done) != (name, height):
            raise ValueError(f"expected {height} rows of {name}, got {done} of {key}")

    def close(self) -> None:
        """Flush to the disk. ValueError if tensors are missing."""
        if self._expected:
            raise ValueError(f"{len(self._expected)} tensors were not written, first {self._expected[0][0]}")
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is None:
            self.close()
        self._file.close()
