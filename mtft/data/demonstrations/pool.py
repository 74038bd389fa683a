"""The rows that a task's demonstrations are taken from, and which of them a row gets (`tasks.*.shots`).

A demonstration is a training row of a task (the own one, another, or rows of no task) as turns of user and assistant,
without its system message and its thinking. Which ones a row gets hangs on the recipe's seed and the row's place alone,
or, with bm25, on its prompt. Demonstrations by likeness are Liu et al.'s (arXiv 2101.06804), BM25 is UDR's first
baseline (Li et al., arXiv 2305.04320, whose trained retriever is not here); from other tasks: Chatterjee et al. (arXiv
2405.10548); training with them: MetaICL (Min et al., arXiv 2110.15943).

A row is known by its content and by its prompt's words, so it is never shown to itself: not as another row with the
same prompt, nor when another task, or the held-out file, has it too.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from typing import Any

from mtft.common.errors import UserError
from mtft.common.fingerprint import hash_number
from mtft.data.demonstrations.prompt_index import PromptIndex
from mtft.data.formats.draws import drawn_order
from mtft.data.formats.messages import Conversation, Message, RowError
from mtft.data.formats.task_reader import TaskReader, first_rows
from mtft.data.readers.row_files import FileRow
from mtft.data.readers.sources import SourcePart
from mtft.data.tokenize.template import inline_thought
from mtft.recipe.schema.recipe import Recipe
from mtft.recipe.schema.shots import DemonstrationRows
from mtft.recipe.schema.task import TaskSection

# Of a source with more rows, or more text, the first are used: each process that encodes rows holds the pool in memory.
MOST_ROWS, MOST_CHARACTERS = 100_000, 1 << 28

Turns = tuple[Message, ...]


@dataclass(frozen=True)
class PoolSource:
    """Where demonstrations come from. task: how the rows are read; parts: its training rows."""

    task: TaskSection
    parts: Sequence[SourcePart]


@dataclass
class DemonstrationPool:
    """Turns of each demonstration; `prompts`: what is asked in them; `known`: numbers of those with a row's keys."""

    n: int
    seed: int
    turns: list[Turns] = field(default_factory=list)
    prompts: list[int] = field(default_factory=list)
    known: dict[int, list[int]] = field(default_factory=dict)
    index: PromptIndex | None = None

    def choose(self, place: str, conversation: Conversation, keys: set[int]) -> list[Turns]:
        """At most n demonstrations of different prompts, the nearest first. keys: of the row, which none may have."""
        own = {number for key in keys for number in self.known.get(key, ())}
        chosen: list[Turns] = []
        prompts: set[int] = set()
        for number in self._candidates(place, conversation):
            if len(chosen) == self.n:
                break
            if number not in own and self.prompts[number] not in prompts:
                chosen.append(self.turns[number])
                prompts.add(self.prompts[number])
        return chosen

    def _candidates(self, place: str, conversation: Conversation) -> Iterator[int]:
        near: set[int] = set()
        for number in self.index.ranked(prompt_of(conversation)) if self.index is not None else ():
            near.add(number)
            yield number
        # of those that are nothing like it, and of all without bm25: as drawn
        yield from (k for k in drawn_order(self.seed, "shots", place, len(self.turns)) if k not in near)


def pool_task(recipe: Recipe, task: TaskSection) -> TaskSection | None:
    """How the rows of a task's demonstrations are read; None: the task has none. UserError: `from` names no task."""
    if task.shots is None:
        return None
    source = task.shots.source
    if isinstance(source, DemonstrationRows):
        return TaskSection(name=task.name, **dict(source))
    found = next((other for other in recipe.tasks if other.name == (source or task.name)), None)
    if found is None:
        do = f"name one of {', '.join(recipe.task_names)}, or write {{data: FILE}}"
        raise UserError(f"names a task that is not there: {source!r}", where=f"tasks.{task.name}.shots.from", do=do)
    return found


def read_pool(task: TaskSection, source: PoolSource, seed: int) -> DemonstrationPool:
    """The demonstrations for a task. Rows that can't be used are passed over: their own task says what is wrong.

    Raises UserError where no row can be one.
    """
    assert task.shots is not None
    where = f"tasks.{task.name}.shots"
    reader = TaskReader(source.task, *_first_rows(source), seed)
    pool, texts = DemonstrationPool(task.shots.n, seed), []
    characters = 0
    for row in _rows(source):
        try:
            conversation = reader(row)
        except RowError:
            continue
        turns = _demonstration(conversation)
        if turns is None:
            continue
        prompt = prompt_of(conversation)
        for key in row_keys(reader, row, conversation):
            pool.known.setdefault(key, []).append(len(pool.turns))
        pool.turns.append(turns)
        pool.prompts.append(_asked(reader, row, conversation))
        texts.append(prompt)
        characters += sum(len(turn["content"]) for turn in turns)
        if characters > MOST_CHARACTERS:
            break
    if not pool.turns:
        what = f"none of the first rows of {source.parts[0].name} can be a demonstration"
        do = "it takes rows of turns of user and assistant in their order, without calls of tools"
        raise UserError(what, where=where, do=do)
    if task.shots.retrieve == "bm25":
        pool.index = PromptIndex(texts, f"{where}.retrieve")
    return pool


def row_keys(reader: TaskReader, row: FileRow, conversation: Conversation) -> set[int]:
    """What a row is known by: its content, its prompt, and what is asked in it under any template."""
    content = _hash(json.dumps(row.data, sort_keys=True, default=repr))
    return {content, _hash(prompt_of(conversation)), _asked(reader, row, conversation)}


def _asked(reader: TaskReader, row: FileRow, conversation: Conversation) -> int:
    """The prompt, of several templates under the first: so that two rows that ask the same are known by it."""
    if len(reader.readers) > 1:
        with suppress(RowError):  # the row's own template reads it, and that is what counts
            return _hash(prompt_of(reader.first(row.data)))
    return _hash(prompt_of(conversation))


def prompt_of(conversation: Conversation) -> str:
    """What the user says, with single spaces."""
    said = (message["content"] for message in conversation.messages if message["role"] == "user")
    return " ".join(" ".join(said).split())


def with_demonstrations(conversation: Conversation, chosen: Sequence[Turns]) -> Conversation | None:
    """The conversation with demonstrations in front of its first turn, behind its system message; the nearest is last.

    None where they have no place: the conversation does not begin with the user.
    """
    messages = conversation.messages
    start = next((i for i, m in enumerate(messages) if m["role"] not in ("system", "developer")), len(messages))
    if start == len(messages) or messages[start]["role"] != "user":
        return None
    shown = [turn for turns in reversed(chosen) for turn in turns]
    return replace(conversation, messages=(*messages[:start], *shown, *messages[start:]))


def _rows(source: PoolSource) -> Iterator[FileRow]:
    """The rows that may be demonstrations: the first ones of the task's training rows."""
    left = min(MOST_ROWS, source.task.limit or MOST_ROWS)
    for part in source.parts:
        for row in part.rows():
            if left == 0:
                return
            left -= 1
            if isinstance(row, FileRow):
                yield row


def _first_rows(source: PoolSource) -> tuple[list[dict[str, Any]], Any]:
    rows, names = first_rows(source.parts)
    return rows, names.get


def _demonstration(conversation: Conversation) -> Turns | None:
    """User and assistant in turns, none of them learnt; None for rows that hold anything else."""
    turns = [message for message in conversation.messages if message["role"] not in ("system", "developer")]
    in_turns = ["user", "assistant"] * (len(turns) // 2)
    if not turns or [turn["role"] for turn in turns] != in_turns or any("tool_calls" in turn for turn in turns):
        return None
    return tuple(_turn(turn) for turn in turns)


def _turn(message: Message) -> Message:
    if message["role"] == "user":
        return {"role": "user", "content": message["content"]}
    thought = inline_thought(message["content"])
    answer = message["content"] if thought is None else thought.answer.lstrip()
    return {"role": "assistant", "content": answer, "train": False}


def _hash(text: str) -> int:
    return hash_number(text, "big")
