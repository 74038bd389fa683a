"""Where rows come from: files, globs, saved datasets, the hub, the embedded tasks."""

from __future__ import annotations

import glob
import os
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

from mtft.common.errors import UserError
from mtft.common.fingerprint import blake2b
from mtft.common.listing import listed
from mtft.data.readers.arrow_rows import dataset_rows, parquet_features
from mtft.data.readers.row_files import COMPRESSED, READERS, FileRow, RowProblem, read_file, suffix
from mtft.recipe.schema.task import TaskSection


class SourceContent(NamedTuple):
    """Fingerprint of what is in a part (a copied file is the same file), and about how many rows, if known."""

    digest: str
    rows: int | None


@dataclass(frozen=True)
class SourcePart:
    """One file (or one saved dataset). `name` is short and stands in row ids and messages."""

    name: str
    path: str
    dataset: Any = field(default=None, compare=False)  # datasets.Dataset for hub: and save_to_disk

    def rows(self) -> Iterator[FileRow | RowProblem]:
        if self.dataset is not None:
            for line, data in enumerate(dataset_rows(self.dataset), 1):
                yield FileRow(self.name, line, data)
            return
        yield from read_file(self.path, self.name)

    def content(self) -> SourceContent:
        """Digest and number of rows, in one pass over the bytes."""
        hasher, lines = blake2b(16), 0
        paths = [self.path] if self.dataset is None else sorted(item["filename"] for item in self.dataset.cache_files)
        for path in paths:
            with open(path, "rb") as file:
                while block := file.read(1 << 20):
                    hasher.update(block)
                    lines += block.count(b"\n")
        if self.dataset is not None:
            hasher.update(f"{self.dataset.num_rows} {self.dataset.features}".encode())
            return SourceContent(hasher.hexdigest(), self.dataset.num_rows)
        by_line = self.path.endswith((".jsonl", ".ndjson", ".csv", ".tsv"))
        return SourceContent(hasher.hexdigest(), lines if by_line else None)

    def label_names(self, column: str) -> list[str] | None:
        """Names of a ClassLabel column, where the source has any."""
        features = self.dataset.features if self.dataset is not None else parquet_features(self.path)
        names = getattr(features.get(column), "names", None)
        return list(names) if names else None


def find_source_parts(task: TaskSection, which: str, cache_dir: Path) -> list[SourcePart]:
    """All parts of a task's `data` (which="train") or `eval_data` ("eval"), in a fixed order."""
    key = f"tasks.{task.name}.{'data' if which == 'train' else 'eval_data'}"
    declared = task.data if which == "train" else task.eval_data
    if declared is None:
        raise ValueError(f"task {task.name} has no {which} data")
    parts: list[SourcePart] = []
    for entry in (declared,) if isinstance(declared, str) else declared:
        if entry.startswith("hub:"):
            parts.append(_hub(entry, task.split, which, key))
        elif entry.startswith("quickstart:"):
            path = _quickstart(entry.removeprefix("quickstart:"), which, cache_dir, key)
            parts.append(SourcePart(path, path))
        else:
            parts += _files(entry, task.split, which, key)
    return _shorten(parts)


def _files(entry: str, split: str | None, which: str, key: str) -> list[SourcePart]:
    path = Path(entry)
    if path.is_dir():
        return [_saved(path, split, which, key)]
    paths = [entry] if path.is_file() else sorted(p for p in glob.glob(entry, recursive=True) if os.path.isfile(p))
    if not paths:
        near = [p.name for p in path.parent.glob("*") if p.is_file()][:5] if path.parent.is_dir() else []
        hint = f"; in {path.parent} there are: {', '.join(sorted(near))}" if near else ""
        raise UserError(f"no file matches {entry!r}{hint}", where=key, do="relative paths start at the recipe's folder")
    for file in paths:
        if suffix(file) not in READERS:
            do = f"use {', '.join(READERS)} (also with {', '.join(COMPRESSED)} on top), or a folder of save_to_disk"
            raise UserError(f"{file}: unknown kind of file {suffix(file) or '(no suffix)'!r}", where=key, do=do)
    return [SourcePart(file, file) for file in paths]


def _saved(path: Path, split: str | None, which: str, key: str) -> SourcePart:
    import pyarrow
    from datasets import load_from_disk

    if not ((path / "state.json").is_file() or (path / "dataset_dict.json").is_file()):
        do = f"name the files, for instance {path}/*.jsonl"
        raise UserError(f"{path} is a folder, but not one that datasets' save_to_disk wrote", where=key, do=do)
    try:
        loaded = load_from_disk(str(path))
    except (OSError, ValueError, KeyError, pyarrow.ArrowException) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UserError(f"the saved dataset {path} can't be read: {reason}", where=key, do="save it again") from error
    return _dataset(loaded, path.name, str(path), split, which, key)


def _hub(entry: str, split: str | None, which: str, key: str) -> SourcePart:
    from datasets import load_dataset

    name, _, config = entry.removeprefix("hub:").partition(":")
    try:
        loaded = load_dataset(name, config or None)
    except (OSError, ValueError, RuntimeError) as error:  # offline, unknown name, missing configuration, script
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        do = "check the name (hub:ORG/NAME or hub:ORG/NAME:CONFIG) and the network, or give files"
        raise UserError(f"cannot load {entry}: {reason}", where=key, do=do) from error
    return _dataset(loaded, entry, entry, split, which, key)


def _dataset(loaded: Any, name: str, path: str, split: str | None, which: str, key: str) -> SourcePart:
    """A data set, or the split of one that is to be read."""
    if not isinstance(loaded, Mapping):
        return SourcePart(name, path, loaded)
    chosen = _pick([*map(str, loaded)], split, which, key)
    return SourcePart(f"{name}[{chosen}]", path, loaded[chosen])


def _pick(splits: list[str], split: str | None, which: str, key: str) -> str:
    """The split to read. A task's `split` is that of its training rows; held-out rows have their own by custom."""
    task = key.rsplit(".", 1)[0]
    if which == "train" and split is not None:
        if split in splits:
            return split
        what = f"no split {split!r}; there are {listed(splits)}"
        raise UserError(what, where=f"{task}.split", do="name one of them")
    customary = ("train",) if which == "train" else ("validation", "valid", "dev", "eval", "test")
    chosen = next((name for name in customary if name in splits), splits[0] if len(splits) == 1 else None)
    if chosen is None:
        what = f"none of the splits {listed(splits)} is called {' or '.join(customary)}"
        do = f"name one in {task}.split" if which == "train" else "save the held-out rows to a file and name that"
        raise UserError(what, where=key, do=do)
    return chosen


def _quickstart(name: str, which: str, cache_dir: Path, key: str) -> str:
    from mtft import quickstart

    if name not in quickstart.TASKS:
        do = f"choose one of {', '.join(quickstart.TASKS)}"
        raise UserError(f"no embedded task {name!r}", where=key, do=do)
    files = _quickstart_files(cache_dir)[name]
    return str(files.train if which == "train" else files.eval)


@cache
def _quickstart_files(cache_dir: Path) -> dict[str, Any]:
    """One process writes, the others find the files. Looked up once, since the lookup walks the standard library."""
    from filelock import FileLock

    from mtft import quickstart

    cache_dir.mkdir(parents=True, exist_ok=True)
    with FileLock(cache_dir / "quickstart.lock"):
        return quickstart.build_tasks(cache_dir / "quickstart")


def _shorten(parts: list[SourcePart]) -> list[SourcePart]:
    """Names relative to the folder that all parts share: short, the same on every machine, and each once."""
    paths = [part.path for part in parts if not part.path.startswith("hub:")]
    common = ""
    if paths:
        alone = len(set(paths)) == 1
        common = os.path.dirname(paths[0]) if alone else os.path.commonpath([os.path.dirname(p) for p in paths])
    named, used = [], Counter[str]()
    for part in parts:
        tail = part.name[part.name.rindex("[") :] if part.dataset is not None and part.name.endswith("]") else ""
        name = part.name if part.path.startswith("hub:") else os.path.relpath(part.path, common or ".") + tail
        used[name] += 1
        named.append(replace(part, name=name if used[name] == 1 else f"{name}({used[name]})"))
    return named
