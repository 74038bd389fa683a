"""Blocks of rows to blocks of examples, in this process or in many. (On several machines: ray_encode.py.)

Tokenizers use all cores by themselves, but reading columns and rendering templates is Python. For large tasks whole
blocks go to worker processes, and come back in order: the store is the same to the byte, however many there are.
"""

from __future__ import annotations

import itertools
import os
import sys
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from typing import Any, NamedTuple

from data_mixers.common.spawn_context import spawn_context
from mtft.common.errors import UserError
from mtft.data.demonstrations.pool import DemonstrationPool
from mtft.data.demonstrations.render import DemonstrationRenderer
from mtft.data.formats.messages import Conversation, RowError, is_blank
from mtft.data.formats.render_limit import EndlessTemplate
from mtft.data.formats.task_reader import TaskReader
from mtft.data.notes import COLUMN, MORE_COLUMNS, MOST_NAMED, WEIGHT_ZERO
from mtft.data.readers.row_files import FileRow, RowProblem
from mtft.data.tokenize.assistant_turns import RenderedChat
from mtft.data.tokenize.chat_template import ChatRenderer
from mtft.data.tokenize.encode import Example, draw, encode
from mtft.recipe.schema.task import TaskSection

BLOCK_ROWS, BLOCK_CHARACTERS = 2000, 4_000_000
ROWS_PER_PROCESS = 50_000  # a process takes seconds to start; below this it does not pay
MOST_PROCESSES = 16
FOUND = "found:"  # counts rows that have a column which the recipe names and the first rows did not have

Block = list[FileRow | RowProblem]


class EncodedBlock(NamedTuple):
    """What became of a block: examples and problems with the index of their row, and the renderer's notes."""

    examples: list[tuple[int, Example]]
    problems: list[tuple[int, RowProblem]]
    notes: Counter[str]


class RowEncoder:
    """Rows of one task to examples. `rows`: the first ones, which decide how columns are read.

    seed: of the recipe; pool: the demonstrations, where the task has some, which fill an example up to max_length.
    """

    def __init__(
        self,
        tokenizer: Any,
        task: TaskSection,
        rows: Sequence[Mapping[str, Any]],
        label_names: dict[str, list[str]],
        seed: int = 0,
        pool: DemonstrationPool | None = None,
        max_length: int | None = None,
    ) -> None:
        self.arguments = (tokenizer, task, rows, label_names, seed, pool, max_length)
        where = f"tasks.{task.name}.chat_template_kwargs"
        self.tokenizer, self.renderer = (
            tokenizer,
            ChatRenderer(tokenizer, task.chat_template_kwargs, where, thinking_weight=task.thinking_weight),
        )
        self.task_reader = TaskReader(task, rows, label_names.get, seed)
        self.reader = self.task_reader.first
        self._demonstrations = pool and DemonstrationRenderer(pool, self.task_reader, self.renderer, max_length)

    def __call__(self, block: Block, tokenise: bool = True) -> EncodedBlock:
        """tokenise=False only looks for problems."""
        texts: list[tuple[int, RenderedChat]] = []
        examples: list[tuple[int, Example]] = []
        waiting = 0  # characters of texts
        problems: list[tuple[int, RowProblem]] = []
        notes = self.renderer.notes
        notes.clear()
        for index, row in enumerate(block):
            if isinstance(row, RowProblem):
                problems.append((index, row))
                continue
            unread = self.reader.unread(row.data)
            for column in unread[:MOST_NAMED]:
                notes[f"{COLUMN}{column}"] += 1
            if len(unread) > MOST_NAMED:
                notes[MORE_COLUMNS] += 1
            for column in self.reader.unseen:
                notes[f"{FOUND}{column}"] += not is_blank(row.data.get(column))
            try:
                conversation = self.task_reader(row)
                if conversation.weight == 0:
                    notes[WEIGHT_ZERO] += 1
                    continue
                rendered = self._rendered(index, row, conversation)
                texts += [(index, text) for text in rendered] if tokenise else []
                waiting += sum(len(text.text) for text in rendered)
            except EndlessTemplate as error:
                raise UserError(error.what, where=f"{row.file}:{row.line}", do=error.do) from error
            except RowError as error:
                problems.append((index, RowProblem(row.file, row.line, error.what, error.column, error.value)))
            if waiting > BLOCK_CHARACTERS:  # a template that splits conversations makes much text of few rows
                examples += self._encoded(texts)
                texts, waiting = [], 0
        return EncodedBlock([*examples, *self._encoded(texts)], problems, Counter(notes))

    def _rendered(self, index: int, row: FileRow, conversation: Conversation) -> list[RenderedChat]:
        if self._demonstrations is not None:
            return self._demonstrations.render(index, row, conversation)
        return self.renderer.render(conversation)

    def _encoded(self, texts: list[tuple[int, RenderedChat]]) -> list[tuple[int, Example]]:
        found = encode(self.tokenizer, [text for _, text in texts])
        encoded = [(index, example) for (index, _), example in zip(texts, found, strict=True)]
        return encoded if self._demonstrations is None else self._demonstrations.fit(encoded)

    def preview_empty_row(self, row: FileRow) -> str | None:
        """How the example of a row without an answer would look; None if that is not all that is wrong with it."""

        def fill(value: Any) -> Any:
            if isinstance(value, str):
                return value if value.strip() else "(empty)"
            if isinstance(value, list):
                return [fill(item) for item in value]
            return {key: fill(item) for key, item in value.items()} if isinstance(value, dict) else value

        try:
            rendered = self.renderer.render(self.task_reader(row._replace(data=fill(row.data))))
        except (RowError, RecursionError):
            return None
        return draw(self.tokenizer, encode(self.tokenizer, rendered)[0])


def batch_rows(rows: Iterable[FileRow | RowProblem], limit: int | None) -> Iterator[Block]:
    """At most `limit` rows in blocks, bounded in number and in characters."""
    block: Block = []
    size = 0
    for row in itertools.islice(rows, limit):
        block.append(row)
        size += sum(len(str(value)) for value in row.data.values()) if isinstance(row, FileRow) else 0
        if len(block) >= BLOCK_ROWS or size >= BLOCK_CHARACTERS:
            yield block
            block, size = [], 0
    if block:
        yield block


def num_processes(rows: int | None) -> int:
    """How many processes pay for so many rows (None = unknown)."""
    return max(1, min(usable_cores(), MOST_PROCESSES, (rows or 0) // ROWS_PER_PROCESS))


def usable_cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count() or 1


Run = Callable[[Iterable[Block], Callable[[], bool]], Iterator[tuple[Block, EncodedBlock]]]


@contextmanager
def parallel_encode(encoder: RowEncoder, processes: int) -> Iterator[Run]:
    """Yields run(blocks, tokenise) -> (block, encoded) in order; `tokenise()` is asked before each block is started."""
    if processes == 1:
        yield lambda blocks, tokenise: ((block, encoder(block, tokenise())) for block in blocks)
        return
    # a fork would inherit the threads of torch and of the tokenizer in unknown states
    pool = ProcessPoolExecutor(processes, spawn_context(encoder.arguments), _start, encoder.arguments)

    def run(blocks: Iterable[Block], tokenise: Callable[[], bool]) -> Iterator[tuple[Block, EncodedBlock]]:
        waiting: deque[tuple[Block, Future[EncodedBlock] | None]] = deque()
        for block in blocks:
            waiting.append((block, submit(block, tokenise())))
            if len(waiting) > 2 * processes:  # what is in flight stays small, however large the file
                yield result(*waiting.popleft())
        while waiting:
            yield result(*waiting.popleft())

    # A dead pool (a worker killed for memory) costs time, not the build.
    def submit(block: Block, tokenise: bool) -> Future[EncodedBlock] | None:
        try:
            return pool.submit(_encode, block, tokenise)
        except BrokenProcessPool:
            return None

    def result(block: Block, future: Future[EncodedBlock] | None) -> tuple[Block, EncodedBlock]:
        try:
            return block, future.result() if future is not None else encoder(block)
        except BrokenProcessPool:
            return block, encoder(block)

    try:
        yield run
    finally:
        pool.shutdown(cancel_futures=True)


_worker: RowEncoder | None = None  # in a worker process


def _start(*arguments: Any) -> None:
    global _worker
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # the processes are the parallelism
    _worker = RowEncoder(*arguments)


def _encode(block: Block, tokenise: bool) -> EncodedBlock:
    assert _worker is not None
    return _worker(block, tokenise)
