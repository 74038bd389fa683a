"""The token store: every task is tokenised once, written to flat files, and memory-mapped by whoever trains.

    ids.bin         uint16 or int32 [tokens]     one example after the other
    supervised.bin  bits [tokens]                1 = learnt
    weights.bin     float32 [tokens]             of the learnt ones; only where one of them is not 1
    row_weights.bin float32 [N]                  of the row of each example; the same
    offsets.bin     int64 [N + 1]                where each example starts
    learnt.bin      int32 [N]                    supervised tokens of each example
    lines.bin       uint32 [N]                   line of the row it came from
    names.bin, name_lengths.bin                  ids of the rows, if they have any
    meta.json                                    version, fingerprint, stats, files; sizes and checksums of the above
    verified.json                                when they were last found to be right (store_files.py)

Ranks and workers share one copy through the page cache. A store is found by its fingerprint (content of the rows,
format, template, tokenizer, length policy): the same again is reused, anything else is built anew. One process writes,
under a lock that dies with it, into a temporary folder that is renamed when all is on disk: there is no half store. One
that is damaged later is named and built anew.
"""

from __future__ import annotations

import json
import mmap
import os
import shutil
import uuid
import warnings
from collections.abc import Sequence
from contextlib import nullcontext, suppress
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, overload

import numpy as np

from mtft.common.atomic_io import sync
from mtft.common.cache_folder import writable_cache
from mtft.common.errors import UserError
from mtft.common.fingerprint import json_hash
from mtft.common.folder_lock import sole_writer
from mtft.data.demonstrations.pool import PoolSource, pool_task
from mtft.data.notes import describe_note
from mtft.data.readers.sources import find_source_parts
from mtft.data.store.prompt_state import learnt_state, prompt_state
from mtft.data.store.row_names import place, row_starts
from mtft.data.store.store_files import DamagedStoreError, read_meta, verify_files, write_verified
from mtft.data.tokenize.encode import Example
from mtft.data.tokenize.ray_encode import RayEncoding
from mtft.recipe.schema.recipe import Recipe
from mtft.recipe.schema.task import TaskSection

VERSION = 7  # of everything that decides what is in the files: runs compare the fingerprint that it is a part of
LAYOUT = 9  # of the files; a part of the folder's name alone, so that runs on the same rows stay the same


class RowIds(Sequence[str]):
    """Ids of the examples: the row's own `id`, else file:line; #2, #3, ... where a row gave several examples.

    A row whose `id` stands in an earlier row too is called by file:line.
    """

    def __init__(self, store: TokenStore) -> None:
        self._store = store

    def __len__(self) -> int:
        return self._store.num_examples

    def __getitem__(self, index):  # type: ignore[override]
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        i = range(len(self))[index]
        names = self._store._names
        lines, files = self._store._lines, self._store.meta["files"]
        file = int(np.searchsorted([start for _, start in files], i, side="right")) - 1
        first = files[file][1]
        part = 1
        while i - part >= first and lines[i - part] == lines[i]:
            part += 1
        name = place(i, lines, files)
        if names is not None and names[0][i + 1] > names[0][i]:
            name = names[1][names[0][i] : names[0][i + 1]].tobytes().decode("utf-8")
        return name + (f"#{part}" if part > 1 else "")


class TokenStore:
    """Examples of one task, read-only. Cheap to open and to pickle: it holds memory maps, not data.

    Raises DamagedStoreError where the files are not what was written.
    """

    def __init__(self, path: str | Path, task: str) -> None:
        self.path, self.task = Path(path), task
        self.meta: dict[str, Any] = read_meta(self.path)
        verify_files(self.path, self.meta["content"])
        self._ids = self._map("ids.bin", np.dtype(self.meta["dtype"]))
        self._bits = self._map("supervised.bin", np.uint8)
        self._offsets = self._map("offsets.bin", np.int64)
        self._lines = self._map("lines.bin", np.uint32)
        self._weights, self._row_weights = (
            self._map(name, np.float32) if name in self.meta["content"] else None
            for name in ("weights.bin", "row_weights.bin")
        )

    def __reduce__(self):
        return TokenStore, (self.path, self.task)

    def _map(self, name: str, dtype: Any) -> np.ndarray:
        with open(f"{self.path}/{name}", "rb") as file:
            if not os.fstat(file.fileno()).st_size:
                return np.empty(0, dtype)
            return np.frombuffer(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ), dtype)

    @property
    def num_examples(self) -> int:
        return len(self._offsets) - 1

    def __len__(self) -> int:
        return self.num_examples

    @cached_property
    def lengths(self) -> np.ndarray:
        """Tokens of each example, int64 [N]."""
        return np.diff(self._offsets)

    @cached_property
    def supervised(self) -> np.ndarray:
        """Supervised tokens of each example, int64 [N]."""
        return self._map("learnt.bin", np.int32).astype(np.int64)

    @property
    def ids(self) -> RowIds:
        """Ids of the examples, str [N], each once."""
        return RowIds(self)

    @cached_property
    def row_numbers(self) -> np.ndarray:
        """Which row each example came from, int64 [N], ascending from 0: a conversation may give several examples."""
        return np.cumsum(row_starts(self._lines, self.meta["files"]), dtype=np.int64) - 1

    def place(self, example: int) -> str:
        """file:line of the row that an example came from."""
        return place(example, self._lines, self.meta["files"])

    @cached_property
    def _names(self) -> tuple[np.ndarray, np.ndarray] | None:
        if not (self.path / "names.bin").exists():
            return None
        lengths = self._map("name_lengths.bin", np.uint16)
        return np.concatenate([[0], np.cumsum(lengths, dtype=np.int64)]), self._map("names.bin", np.uint8)

    @property
    def stats(self) -> dict[str, Any]:
        """rows, examples, tokens, supervised, weighted (those at other weights than 1), weights ([sum over supervised
        tokens, sum over examples]), longest, largest_id, truncated, dropped, unsupervised, skipped, notes, repeated_ids
        ({} or {"rows": n, "such_as": one of them with both places}).
        """
        return self.meta["stats"]

    def warnings(self) -> list[str]:
        """What was changed or left out on the way from rows to examples, for people."""
        stats, rows = self.stats, f"{self.stats['rows']:,} rows"
        said = [describe_note(note, count, stats["rows"]) for note, count in stats["notes"].items()]
        if repeated := stats["repeated_ids"]:
            said.append(f"{repeated['rows']:,} of {rows} have the id of an earlier one, such as {repeated['such_as']}")
        if stats["skipped"]:
            said.append(f"{stats['skipped']:,} bad rows are skipped (train.bad_rows)")
        if stats["dropped"]:
            said.append(f"{stats['dropped']:,} examples of {rows} are dropped (train.too_long)")
        if stats["truncated"]:
            said.append(f"{stats['truncated']:,} examples of {rows} are cut at {self.meta['max_length']} tokens")
        return [f"{self.task}: {line}" for line in said]

    @property
    def fingerprint(self) -> str:
        return self.meta["fingerprint"]

    def example(self, i: int) -> Example:
        """Example i."""
        if not 0 <= i < self.num_examples:
            raise IndexError(f"example {i} of {self.num_examples}")
        start, end = int(self._offsets[i]), int(self._offsets[i + 1])
        bits = np.unpackbits(self._bits[start // 8 : (end + 7) // 8])
        ids, supervised = self._ids[start:end].astype(np.int32), bits[start % 8 : start % 8 + end - start].astype(bool)
        weights = None if self._weights is None else np.where(supervised, self._weights[start:end], np.float32(0))
        return Example(ids, supervised, weights, 1.0 if self._row_weights is None else float(self._row_weights[i]))

    def nbytes(self) -> int:
        """Bytes on disk."""
        return sum(file.stat().st_size for file in self.path.iterdir())


def open_store(
    task: TaskSection,
    which: str,
    tokenizer: Any,
    *,
    max_length: int,
    too_long: str = "truncate_left",
    bad_rows: str = "error",
    limit: int | None = None,
    cache_dir: Path | None = None,
    digest: str | None = None,
    seed: int = 0,
    pool: TaskSection | None = None,
    processes: int | None = None,
    on_ray: RayEncoding | None = None,
) -> TokenStore:
    """The store of a task's `data` (which="train") or `eval_data` ("eval"): found, or built once while others wait.

    `limit` cuts the rows; for training rows the task's own `limit` applies as well. digest: of the tokenizer, where it
    is known. seed: of the recipe, for what is drawn by row; pool: the task whose training rows are the demonstrations
    (`pool_task`; None: the task itself, if it has any). processes, on_ray: what encodes, as build_store has it.
    Raises UserError for rows that can't be used, for a task in which nothing is learnt, and when the disk is full.
    """
    from mtft.data.store.build_store import build_store  # needs the tokenizer's libraries; opening does not

    if which == "train" and task.limit is not None:
        limit = task.limit if limit is None else min(limit, task.limit)
    cache = cache_dir or writable_cache()
    parts = find_source_parts(task, which, cache)
    contents = [part.content() for part in parts]
    source = PoolSource(pool or task, find_source_parts(pool or task, "train", cache)) if task.shots else None
    fingerprint = _fingerprint(
        parts=[[part.name, content.digest] for part, content in zip(parts, contents)],
        format=task.format,
        **prompt_state(task, source, seed),
        tokenizer=digest or tokenizer_digest(tokenizer),
        max_length=max_length,
        too_long=too_long,
        bad_rows=bad_rows,
        limit=limit,
        **learnt_state(task),
    )
    root = cache / "stores"
    name = f"{task.name}-{which}-{fingerprint[:16]}-{LAYOUT}"
    final, lock = root / name, root / f".{name}.lock"
    try:
        found = TokenStore(final, task.name)
        if lock.exists():  # of a builder that was killed at its very end: it goes with the next holder
            with suppress(UserError), sole_writer(final):
                pass
        return found
    except DamagedStoreError:  # or not there: looked at again by whoever holds the lock
        pass
    try:
        root.mkdir(parents=True, exist_ok=True)
        with sole_writer(final, wait=float("inf")):  # whoever waits finds the store
            if _is_to_be_built(final, task.name):
                for stale in root.glob(f"{name}.tmp-*"):  # of a writer that was killed: we hold its lock
                    shutil.rmtree(stale)
                folder = root / f"{name}.tmp-{uuid.uuid4().hex[:8]}"
                folder.mkdir()
                try:
                    counts = [content.rows for content in contents]
                    total = None if None in counts else sum(filter(None, counts))
                    build_store(
                        folder, task, which, parts, tokenizer, fingerprint,
                        max_length=max_length, too_long=too_long, bad_rows=bad_rows, limit=limit, total=total,
                        seed=seed, pool=source, processes=processes, on_ray=on_ray,
                    )  # fmt: skip
                    write_verified(folder)
                    for path in [*folder.iterdir(), folder]:
                        sync(path)
                    folder.rename(final)
                    sync(root)
                finally:
                    shutil.rmtree(folder, ignore_errors=True)
    except OSError as error:
        do = "make room, or name another folder in MTFT_CACHE"
        raise UserError(
            f"the token store of task {task.name} can't be written: {error}", where=str(root), do=do
        ) from error
    return TokenStore(final, task.name)


def _is_to_be_built(final: Path, task: str) -> bool:
    """Whether there is no store; one that is damaged is named and taken away. Under the lock."""
    if not os.path.lexists(final):
        return True
    try:
        TokenStore(final, task)
    except DamagedStoreError as error:
        what = f"the token store of task {task} is damaged: {error.what} ({error.where}); it is built anew"
        warnings.warn(what, stacklevel=3)
        doomed = final.with_name(f"{final.name}.tmp-{uuid.uuid4().hex[:8]}")
        final.rename(doomed)  # whoever has it open keeps what he has
        if doomed.is_dir() and not doomed.is_symlink():
            shutil.rmtree(doomed)
        else:
            doomed.unlink()
        return True
    return False


@overload
def open_stores(
    recipe: Recipe, tokenizer: Any, which: Literal["train"], *, limit: int | None = None, cache_dir: Path | None = None
) -> list[TokenStore]: ...


@overload
def open_stores(
    recipe: Recipe, tokenizer: Any, which: Literal["eval"], *, limit: int | None = None, cache_dir: Path | None = None
) -> list[TokenStore | None]: ...


def open_stores(
    recipe: Recipe, tokenizer: Any, which: str, *, limit: int | None = None, cache_dir: Path | None = None
) -> list[TokenStore] | list[TokenStore | None]:
    """Stores of all tasks in the recipe's order; for which="eval" None stands where a task has no eval_data."""
    train = recipe.train
    options: dict[str, Any] = {"max_length": train.max_length, "too_long": train.too_long, "bad_rows": train.bad_rows}
    options |= {"limit": limit, "cache_dir": cache_dir, "digest": tokenizer_digest(tokenizer)}
    stores: list[TokenStore | None] = []
    refused: list[UserError] = []
    on_ray = RayEncoding(recipe.data.workers) if recipe.data.backend == "ray" else None
    with on_ray or nullcontext():  # one Ray for all stores
        for task in recipe.tasks:
            if which == "eval" and task.eval_data is None:
                stores.append(None)
                continue
            try:
                options |= {"processes": recipe.data.workers, "on_ray": on_ray, "pool": pool_task(recipe, task)}
                stores.append(open_store(task, which, tokenizer, **options, seed=recipe.seed))
            except UserError as error:
                if not (error.where or "").startswith("tasks."):
                    raise
                refused.append(error)  # the other tasks may be wrong too: say it all at once
    if len(refused) == 1:
        raise refused[0]
    if refused:
        lines = [f"{error.where}: {error.what}" + (f"\n    do: {error.do}" if error.do else "") for error in refused]
        raise UserError(f"the data of {len(refused)} tasks can't be used\n  " + "\n  ".join(lines))
    return stores


def tokenizer_digest(tokenizer: Any) -> str:
    """Fingerprint of everything in a tokenizer that decides about ids: vocabulary, merges, added tokens, template."""
    if tokenizer.is_fast:
        core = json.loads(tokenizer.backend_tokenizer.to_str())
        del core["truncation"], core["padding"]  # left over from some earlier call
    else:
        core = [type(tokenizer).__name__, sorted(tokenizer.get_vocab().items())]
    return _fingerprint(core=core, template=tokenizer.chat_template, special=tokenizer.special_tokens_map)


def _fingerprint(**parts: Any) -> str:
    return json_hash({"version": VERSION, **parts}, default=str)
