"""Building a token store: rows -> conversations -> text with spans -> tokens -> flat files, some thousand rows at once.

Memory does not grow with the data: what is in flight are a few blocks of rows.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any, NoReturn

import numpy as np

from mtft.common.errors import UserError
from mtft.data.demonstrations.pool import PoolSource, read_pool
from mtft.data.formats.columns import nearest
from mtft.data.formats.task_reader import first_rows
from mtft.data.notes import COLUMN
from mtft.data.readers.bad_rows import BadRowCollector
from mtft.data.readers.row_files import FileRow
from mtft.data.readers.sources import SourcePart
from mtft.data.store.progress import progress
from mtft.data.store.row_names import drop_repeated_names
from mtft.data.store.store_files import BLOCK, SummedFile, write_meta
from mtft.data.tokenize.encode import Example, clear_first_token, draw
from mtft.data.tokenize.parallel_encode import FOUND, RowEncoder, batch_rows, num_processes, parallel_encode
from mtft.data.tokenize.ray_encode import RayEncoding
from mtft.recipe.schema.task import TaskSection

LONGEST_NAME = 200  # characters of a row id that are kept


def build_store(
    folder: Path,
    task: TaskSection,
    which: str,
    parts: Sequence[SourcePart],
    tokenizer: Any,
    fingerprint: str,
    *,
    max_length: int,
    too_long: str,
    bad_rows: str,
    limit: int | None,
    total: int | None,
    processes: int | None = None,
    on_ray: RayEncoding | None = None,
    seed: int = 0,
    pool: PoolSource | None = None,
) -> None:
    """Write the store's files into `folder`.

    total: rows that are expected, if known; processes: how many encode (None: as many as pay for `total`); on_ray:
    encodes in their place; seed: of the recipe; pool: where the task's demonstrations come from, if it has any.
    """
    expected = limit if total is None else min(total, limit or total)
    demonstrations = read_pool(task, pool, seed) if pool is not None else None
    encoder = RowEncoder(tokenizer, task, *first_rows(parts), seed, demonstrations, max_length)
    local = partial(parallel_encode, encoder, processes or num_processes(expected))
    bad = BadRowCollector(f"tasks.{task.name}.{'data' if which == 'train' else 'eval_data'}", bad_rows)
    fit_length = LengthPolicy(max_length, too_long, tokenizer.bos_token_id)
    notes: Counter[str] = Counter()
    first: Example | None = None
    taken = 0
    with (
        StoreWriter(folder, len(tokenizer)) as writer,
        progress(f"tokenising {task.name} ({which})", expected) as advance,
        local() if on_ray is None else on_ray.encode(encoder) as run,
    ):
        for part in parts:
            writer.start_file(part.name)
            rows = 0
            blocks = batch_rows(part.rows(), None if limit is None else limit - taken)
            # once the build is bound to fail, rows are still read for the sake of the other bad ones
            for block, encoded in run(blocks, lambda: not bad.fatal):
                for index, problem in encoded.problems:
                    row = block[index]
                    bad.add(problem, row if isinstance(row, FileRow) else None)
                for index, example in () if bad.fatal else encoded.examples:
                    row = block[index]
                    first = first or example
                    if which == "eval":  # where every learnt token counts once
                        example = Example(example.input_ids, example.supervised)
                    trimmed = fit_length(example, f"{row.file}:{row.line}")
                    if trimmed is not None and isinstance(row, FileRow):
                        writer.add(trimmed, row)
                rows, taken = rows + len(block), taken + len(block) - len(encoded.problems)
                notes.update(encoded.notes)
                advance(len(block))
            if bad.empty is not None and not taken:
                bad.example = encoder.preview_empty_row(bad.empty)
            bad.end_of_file(part.name, rows)
        bad.finish()
        _check_found(task, encoder.reader.unseen, notes)
        fit_length.finish(bad.where)
        if not writer.examples:
            _nothing_learnt(task, bad.where, fit_length, first, tokenizer, taken)
        stats = {
            "rows": taken,
            "examples": writer.examples,
            "tokens": writer.tokens,
            "supervised": writer.learnt,
            "weighted": writer.weighted,
            "weights": writer.weights,
            "longest": writer.longest,
            "largest_id": writer.largest_id,
            "truncated": fit_length.truncated,
            "dropped": fit_length.dropped + fit_length.unsupervised,
            "unsupervised": fit_length.unsupervised,
            "skipped": bad.count,
            "notes": dict(notes),
        }
        about = {"task": task.name, "which": which, "max_length": max_length}
        writer.finish({"fingerprint": fingerprint, **about, "stats": stats})


class LengthPolicy:
    """What happens to examples longer than max_length: drop, truncate_left, truncate_right or error. Counted.

    truncate_left keeps the end, and the BOS in front of it: models look at that token whatever follows.
    """

    def __init__(self, max_length: int, policy: str, bos: int | None) -> None:
        self.max_length, self.policy, self.bos = max_length, policy, bos
        self.truncated = self.dropped = self.unsupervised = self.refused = 0
        self._longest: list[str] = []

    def __call__(self, example: Example, where: str) -> Example | None:
        (ids, supervised), weights = example, example.weights
        if len(ids) > self.max_length:
            if self.policy == "drop":
                self.dropped += 1
                return None
            if self.policy == "error":
                self.refused += 1
                if len(self._longest) < 10:
                    self._longest.append(f"{where}: {len(ids)} tokens")
                return None
            self.truncated += 1
            keep = np.arange(len(ids))
            if self.policy == "truncate_right":
                keep = keep[: self.max_length]
            elif self.bos is not None and ids[0] == self.bos and self.max_length > 1:
                keep = np.concatenate([keep[:1], keep[1 - self.max_length :]])
            else:
                keep = keep[-self.max_length :]
            ids, supervised = ids[keep], clear_first_token(supervised[keep])
            weights = None if weights is None else np.where(supervised, weights[keep], np.float32(0))
        if not supervised.any():
            self.unsupervised += 1
            return None
        return Example(ids, supervised, weights, example.row_weight)

    def finish(self, where: str) -> None:
        if self.refused:
            listed = "\n    ".join(self._longest)
            what = f"{self.refused} examples are longer than max_length {self.max_length}:\n    {listed}"
            do = "raise train.max_length, or set train.too_long to drop, truncate_left or truncate_right"
            raise UserError(what, where=where, do=do)


class StoreWriter:
    """Appends examples to the flat files of a store."""

    def __init__(self, folder: Path, vocabulary: int) -> None:
        self.folder = folder
        self.dtype = np.dtype(np.uint16 if vocabulary <= 1 << 16 else np.int32)
        self.examples = self.tokens = self.learnt = self.weighted = self.longest = self.largest_id = 0
        self.weights = [0.0, 0.0]  # sums over the learnt tokens, and over the examples
        self._files: dict[str, SummedFile] = {}
        self._starts: list[tuple[str, int]] = []
        self._carry = np.zeros(0, dtype=bool)  # bits that do not fill a byte yet

    def __enter__(self) -> StoreWriter:
        for name in ("ids", "supervised", "offsets", "learnt", "lines", "names", "name_lengths"):
            self._files[name] = SummedFile(self.folder / f"{name}.bin")
        self._files["offsets"].write(np.int64(0).tobytes())
        return self

    def __exit__(self, *failure: object) -> None:
        for file in self._files.values():
            file.close()

    def start_file(self, name: str) -> None:
        self._starts.append((name, self.examples))

    def add(self, example: Example, row: FileRow) -> None:
        (ids, supervised), weights, row_weight = example, example.weights, example.row_weight
        of_tokens = supervised if weights is None else weights
        self.weighted += int(np.count_nonzero(supervised & ((of_tokens != 1) | (row_weight != 1))))
        self.weights[0] += row_weight * float(of_tokens.sum(dtype=np.float64))
        self.weights[1] += row_weight
        self._append("weights", weights, len(ids), self.tokens)
        self._append("row_weights", None if row_weight == 1 else row_weight, 1, self.examples)
        self.largest_id = max(self.largest_id, int(ids.max(initial=0)))
        if self.largest_id > np.iinfo(self.dtype).max:
            raise ValueError(f"token id {self.largest_id} is beyond the tokenizer's size")
        self.examples += 1
        self.tokens += len(ids)
        self.learnt += int(supervised.sum())
        self.longest = max(self.longest, len(ids))
        write = {name: file.write for name, file in self._files.items()}
        write["ids"](ids.astype(self.dtype).tobytes())
        write["offsets"](np.int64(self.tokens).tobytes())
        write["learnt"](np.int32(supervised.sum()).tobytes())
        write["lines"](np.uint32(row.line).tobytes())
        bits = np.concatenate([self._carry, supervised])
        whole = len(bits) // 8 * 8
        write["supervised"](np.packbits(bits[:whole]).tobytes())
        self._carry = bits[whole:]
        name = _name(row)
        write["names"](name)
        write["name_lengths"](np.uint16(len(name)).tobytes())

    def _append(self, name: str, weights: Any, count: int, before: int) -> None:
        """`count` weights (None: all are 1) behind `before` others: the file begins where the first is not 1."""
        if name not in self._files:
            if weights is None:
                return
            self._files[name] = file = SummedFile(self.folder / f"{name}.bin")
            for start in range(0, before, BLOCK):
                file.write(np.ones(min(BLOCK, before - start), np.float32).tobytes())
        own = np.ones(count, np.float32) if weights is None else np.asarray(weights, np.float32)
        self._files[name].write(own.tobytes())

    def finish(self, meta: dict[str, Any]) -> None:
        """Write the rest; meta.json comes last."""
        self._files["supervised"].write(np.packbits(self._carry).tobytes())
        no_names = not self._files["names"].tell()
        self.__exit__()
        content = {f"{name}.bin": file.listed() for name, file in self._files.items()}
        meta["stats"]["repeated_ids"] = drop_repeated_names(self.folder, self._starts, content)
        if no_names:
            for name in ("names.bin", "name_lengths.bin"):
                (self.folder / name).unlink()
                del content[name]
        files = [list(start) for start in self._starts]
        write_meta(self.folder, meta | {"dtype": self.dtype.name, "files": files, "content": content})


def _name(row: FileRow) -> bytes:
    name = row.data.get("id")
    if isinstance(name, bool) or not isinstance(name, str | int) or name == "":
        return b""
    return str(name)[:LONGEST_NAME].encode("utf-8", "replace")


def _check_found(task: TaskSection, optional: Sequence[str], notes: Counter[str]) -> None:
    """Refuse a column that the recipe names and no row has: a misspelt system prompt would be left out in silence."""
    for column in optional:
        if not notes.pop(f"{FOUND}{column}", 0):
            known = [note.removeprefix(COLUMN) for note in notes if note.startswith(COLUMN)]
            near = nearest(column, known)
            do = f"did you mean {near!r}?" if near else "correct it, or leave it out"
            raise UserError(f"no row has the column {column!r}", where=f"tasks.{task.name}.format", do=do)


def _nothing_learnt(
    task: TaskSection, where: str, fit_length: LengthPolicy, first: Example | None, tokenizer: Any, taken: int
) -> NoReturn:
    """Refuse a task that would train on nothing (elsewhere: loss 0.0 and "success")."""
    if first is None and taken:
        what = f"task {task.name} has nothing to learn: all {taken} rows have weight 0"
        raise UserError(what, where=f"tasks.{task.name}.row_weight", do="leave the task out, or name another column")
    if first is None:
        raise UserError(f"task {task.name} has no rows", where=where, do="check the files, or leave the task out")
    what = (
        f"all {fit_length.dropped} examples are longer than max_length {fit_length.max_length}"
        if fit_length.dropped >= taken
        else f"no supervised token is left within max_length {fit_length.max_length} (too_long: {fit_length.policy})"
    )
    raise UserError(
        f"task {task.name} has nothing to learn: {what}. The first example, learnt parts between ⟦ and ⟧, "
        f"{len(first.input_ids)} tokens:\n{draw(tokenizer, first)}",
        where=where,
        do="raise train.max_length, or choose train.too_long: truncate_left",
    )
