"""Which base an adapter belongs to, by the content of the base's weights: paths and names move, weights don't.

    base.json    {"model": as the recipe named it, "revision": ..., "fingerprint": ...}, in the folder of every adapter

The fingerprint is the hash of every tensor's name, type, shape and some of its bytes (the first, the middle and the
last kilobyte): another model, another revision, a model that was tuned further and another vocabulary have another
one; the same weights in other shards have the same. A whole hash of a 70B model would read 140 GB at each start.

Adapters from elsewhere have no base.json. If the base that they name is a folder that stands, its weights are compared.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from mtft.adapters.lora_config import CONFIG
from mtft.adapters.safetensors_io import read_header
from mtft.common.errors import MergeError, UserError
from mtft.common.fingerprint import blake2b
from mtft.common.own_files import read_own, write_own

BASE = "base.json"
SAMPLE = 1024  # bytes


@dataclass(frozen=True)
class BaseIdentity:
    """What an adapter remembers of its base. fingerprint: None where the weights could not be read."""

    model: str
    revision: str | None = None
    fingerprint: str | None = None

    def differs(self, other: BaseIdentity) -> bool | None:
        """Whether these are different weights; None if that can't be said."""
        if self.fingerprint is None or other.fingerprint is None:
            return None
        return self.fingerprint != other.fingerprint


def write_base(folder: Path, base: BaseIdentity) -> None:
    write_own(folder / BASE, asdict(base), indent=2)


def recorded_base(folder: Path) -> BaseIdentity | None:
    """The base of an adapter, as its base.json says; else by the name in its config. None: it names none.

    MergeError for a base.json that can't be read.
    """
    path = folder / BASE
    if os.path.lexists(path):
        try:
            content = read_own(path, {"model": str}, do="remove it: then only names and shapes are compared")
        except UserError as error:
            raise MergeError(f"{BASE} can't be read: {error.what}", where=error.where, do=error.do) from None
        known: dict[str, Any] = {key: content.get(key) for key in ("model", "revision", "fingerprint")}
        if not all(value is None or isinstance(value, str) for value in known.values()):
            what = f"{BASE} can't be read: damaged: model, revision and fingerprint are texts"
            raise MergeError(what, where=str(path), do="remove it: then only names and shapes are compared")
        if known["fingerprint"] is None and Path(known["model"]).is_dir():  # it was away when the adapter was written
            known["fingerprint"] = fingerprint(Path(known["model"]))
        return BaseIdentity(**known)
    try:
        config = json.loads((folder / CONFIG).read_text("utf-8"))
    except (OSError, ValueError, RecursionError):
        return None
    model = config.get("base_model_name_or_path") if isinstance(config, dict) else None
    if not isinstance(model, str) or not model:
        return None
    return BaseIdentity(model, config.get("revision"), fingerprint(Path(model)) if Path(model).is_dir() else None)


def common_base(folders: list[Path]) -> BaseIdentity | None:
    """The base of all these adapters, where their fingerprints agree."""
    bases = [recorded_base(folder) if (folder / BASE).is_file() else None for folder in folders]
    first = bases[0] if bases else None
    same = first is not None and all(base is not None and first.differs(base) is False for base in bases)
    return first if same else None


def fingerprint(folder: Path) -> str | None:
    """The fingerprint of the weights in a model's folder; None if it holds no safetensors, or broken ones."""
    files = sorted(folder.glob("model*.safetensors")) or sorted(folder.glob("*.safetensors"))
    try:
        stats = tuple((str(path), path.stat().st_size, path.stat().st_mtime_ns) for path in files)
        return _fingerprint(stats) if stats else None
    except (OSError, ValueError, KeyError):
        return None


@lru_cache(maxsize=64)
def _fingerprint(files: tuple[tuple[str, int, int], ...]) -> str:
    samples = dict(sample for path, _, _ in files for sample in _samples(Path(path)))
    whole = blake2b(16)
    for name in sorted(samples):
        whole.update(samples[name])
    return whole.hexdigest()


def _samples(path: Path) -> Iterator[tuple[str, bytes]]:
    """(name, hash of what is looked at) of each tensor of a file."""
    entries = read_header(path)
    with path.open("rb") as file:
        for name, entry in sorted(entries.items(), key=lambda item: item[1].start):
            one = blake2b(16, json.dumps([name, entry.dtype, list(entry.shape)]).encode())
            size = entry.end - entry.start
            starts = (0,) if size <= 3 * SAMPLE else (0, (size - SAMPLE) // 2, size - SAMPLE)
            for start in starts:
                file.seek(entry.start + start)
                one.update(file.read(size if len(starts) == 1 else SAMPLE))
            yield name, one.digest()
