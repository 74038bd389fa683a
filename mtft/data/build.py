"""Building a token store: rows -> conversations -> text with spans -> tokens -> flat files, some thousand rows at once.

Memory does not grow with the data: what is in flight is one block of rows.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, BinaryIO, NoReturn

import numpy as np

from ..errors import UserError
from ..recipe.schema import TaskSection
from .badrows import BadRows
from .chat import Rendered, Renderer
from .columns import RowReader, make_reader
from .encode import Example, draw, encode
from .files import Problem, Row
from .messages import RowError
from .progress import progress
from .sources import Part

PEEK = 50  # rows that decide how columns are read
BLOCK_ROWS, BLOCK_CHARACTERS = 2000, 4_000_000
LONGEST_NAME = 200  # characters of a row id that are kept


def build(
    folder: Path,
    task: TaskSection,
    which: str,
    parts: Sequence[Part],
    tokenizer: Any,
    fingerprint: str,
    *,
    max_length: int,
    too_long: str,
    bad_rows: str,
    limit: int | None,
    total: int | None,
) -> None:
    """Write the store's files into `folder`. `total` rows are expected (for the progress bar)."""
    renderer, reader = Renderer(tokenizer), _reader(task, parts)
    bad = BadRows(f"tasks.{task.name}.{'data' if which == 'train' else 'eval_data'}", bad_rows)
    cut = Cutter(max_length, too_long, tokenizer.bos_token_id)
    first: Example | None = None
    with Writer(folder, len(tokenizer)) as writer, progress(f"tokenising {task.name} ({which})", limit or total) as bar:
        taken = 0
        for part in parts:
            writer.start_file(part.name)
            rows = 0
            for block in _blocks(part.rows(), None if limit is None else limit - taken):
                good = _render(block, reader, renderer, bad)
                rows, taken = rows + len(block), taken + len({row.line for row, _ in good})
                bar(len(block))
                if bad.fatal:  # nothing will be written: go on for the sake of the other bad rows
                    continue
                for (row, _), example in zip(good, encode(tokenizer, [text for _, text in good])):
                    first = first or example
                    kept = cut(example, f"{row.file}:{row.line}")
                    if kept is not None:
                        writer.add(kept, row)
            if bad.empty is not None and not taken:
                bad.example = _draw_empty(reader, renderer, tokenizer, bad.empty)
            bad.end_of_file(part.name, rows)
        bad.finish()
        cut.finish(bad.where)
        if not writer.examples:
            _nothing_learnt(task, bad.where, cut, first, tokenizer, taken)
        stats = {
            "rows": taken,
            "examples": writer.examples,
            "tokens": writer.tokens,
            "supervised": writer.learnt,
            "longest": writer.longest,
            "truncated": cut.truncated,
            "dropped": cut.dropped + cut.unsupervised,
            "unsupervised": cut.unsupervised,
            "skipped": bad.count,
            "notes": dict(renderer.notes),
        }
        about = {"task": task.name, "which": which, "max_length": max_length}
        writer.finish({"fingerprint": fingerprint, **about, "stats": stats})


class Cutter:
    """What happens to examples longer than max_length: drop, truncate_left, truncate_right or error. Counted.

    truncate_left keeps the end, and the BOS in front of it: models look at that token whatever follows.
    """

    def __init__(self, max_length: int, policy: str, bos: int | None) -> None:
        self.max_length, self.policy, self.bos = max_length, policy, bos
        self.truncated = self.dropped = self.unsupervised = self.refused = 0
        self._longest: list[str] = []

    def __call__(self, example: Example, where: str) -> Example | None:
        ids, supervised = example
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
            ids, supervised = ids[keep], supervised[keep].copy()
            supervised[:1] = False
        if not supervised.any():
            self.unsupervised += 1
            return None
        return Example(ids, supervised)

    def finish(self, where: str) -> None:
        if self.refused:
            listed = "\n    ".join(self._longest)
            raise UserError(
                f"{self.refused} examples are longer than max_length {self.max_length}:\n    {listed}",
                where=where,
                do="raise train.max_length, or set train.too_long to drop, truncate_left or truncate_right",
            )


class Writer:
    """Appends examples to the flat files of a store."""

    def __init__(self, folder: Path, vocabulary: int) -> None:
        self.folder = folder
        self.dtype = np.dtype(np.uint16 if vocabulary <= 1 << 16 else np.int32)
        self.examples = self.tokens = self.learnt = self.longest = 0
        self._files: dict[str, BinaryIO] = {}
        self._starts: list[list[Any]] = []
        self._carry = np.zeros(0, dtype=bool)  # bits that do not fill a byte yet

    def __enter__(self) -> Writer:
        for name in ("ids", "supervised", "offsets", "learnt", "lines", "names", "name_lengths"):
            self._files[name] = (self.folder / f"{name}.bin").open("wb")
        self._files["offsets"].write(np.int64(0).tobytes())
        return self

    def __exit__(self, *failure: object) -> None:
        for file in self._files.values():
            file.close()

    def start_file(self, name: str) -> None:
        self._starts.append([name, self.examples])

    def add(self, example: Example, row: Row) -> None:
        ids, supervised = example
        if len(ids) and int(ids.max()) > np.iinfo(self.dtype).max:
            raise ValueError(f"token id {ids.max()} is beyond the tokenizer's size")
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

    def finish(self, meta: dict[str, Any]) -> None:
        """Write the rest; meta.json comes last."""
        self._files["supervised"].write(np.packbits(self._carry).tobytes())
        no_names = not self._files["names"].tell()
        self.__exit__()
        if no_names:
            (self.folder / "names.bin").unlink()
            (self.folder / "name_lengths.bin").unlink()
        whole = meta | {"dtype": self.dtype.name, "files": self._starts}
        (self.folder / "meta.json").write_text(json.dumps(whole, indent=1), encoding="utf-8")


def _name(row: Row) -> bytes:
    name = row.data.get("id")
    if isinstance(name, bool) or not isinstance(name, str | int) or name == "":
        return b""
    return str(name)[:LONGEST_NAME].encode("utf-8", "replace")


def _reader(task: TaskSection, parts: Sequence[Part]) -> RowReader:
    rows = (row.data for part in parts for row in part.rows() if isinstance(row, Row))
    peeked = list(itertools.islice(rows, PEEK))
    if not peeked:  # no rows, or none that can be read: never called, the problems speak for themselves
        return RowReader("text", {})

    def names_of(column: str) -> list[str] | None:
        return next((names for part in parts if (names := part.label_names(column))), None)

    return make_reader(task, peeked, names_of)


def _blocks(rows: Iterable[Row | Problem], limit: int | None) -> Iterator[list[Row | Problem]]:
    """At most `limit` rows in blocks, bounded in number and in characters."""
    block: list[Row | Problem] = []
    size = 0
    for row in itertools.islice(rows, limit):
        block.append(row)
        size += sum(len(str(value)) for value in row.data.values()) if isinstance(row, Row) else 0
        if len(block) >= BLOCK_ROWS or size >= BLOCK_CHARACTERS:
            yield block
            block, size = [], 0
    if block:
        yield block


def _render(
    block: Sequence[Row | Problem], reader: RowReader, renderer: Renderer, bad: BadRows
) -> list[tuple[Row, Rendered]]:
    """The texts of a block, each with its row; what can't be used goes to `bad`."""
    good = []
    for row in block:
        if isinstance(row, Problem):
            bad.add(row)
            continue
        try:
            good += [(row, text) for text in renderer.render(reader(row.data))]
        except RowError as error:
            bad.add(Problem(row.file, row.line, error.what, error.column, error.value))
            if error.what == "is empty" and bad.empty is None:
                bad.empty = row
    return good


def _draw_empty(reader: RowReader, renderer: Renderer, tokenizer: Any, row: Row) -> str:
    """How an example with nothing to learn would look."""

    def fill(value: Any) -> Any:
        if isinstance(value, str):
            return value if value.strip() else "(empty)"
        if isinstance(value, list):
            return [fill(item) for item in value]
        return {key: fill(item) for key, item in value.items()} if isinstance(value, dict) else value

    return draw(tokenizer, encode(tokenizer, renderer.render(reader(fill(row.data))))[0])


def _nothing_learnt(
    task: TaskSection, where: str, cut: Cutter, first: Example | None, tokenizer: Any, taken: int
) -> NoReturn:
    """Refuse a task that would train on nothing (elsewhere: loss 0.0 and "success")."""
    if first is None:
        raise UserError(f"task {task.name} has no rows", where=where, do="check the files, or leave the task out")
    what = (
        f"all {cut.dropped} examples are longer than max_length {cut.max_length}"
        if cut.dropped >= taken
        else f"no supervised token is left within max_length {cut.max_length} (too_long: {cut.policy})"
    )
    raise UserError(
        f"task {task.name} has nothing to learn: {what}. The first example, learnt parts between ⟦ and ⟧, "
        f"{len(first.input_ids)} tokens:\n{draw(tokenizer, first)}",
        where=where,
        do="raise train.max_length, or choose train.too_long: truncate_left",
    )
