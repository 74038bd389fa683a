"""Rows of one task to conversations: its format, a row's own template of several, its system prompt."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from mtft.common.errors import UserError
from mtft.data.formats.columns import RowReader, make_readers
from mtft.data.formats.draws import draw
from mtft.data.formats.messages import Conversation
from mtft.data.readers.row_files import FileRow
from mtft.data.readers.sources import SourcePart
from mtft.recipe.schema.task import TaskSection

PEEK = 50  # rows that decide how columns are read


class TaskReader:
    """Call it with a row. rows: the first ones, which decide how columns are read; seed: of the recipe.

    Raises UserError if the task asks for what its rows have no place for.
    """

    def __init__(
        self,
        task: TaskSection,
        rows: Sequence[Mapping[str, Any]],
        names_of: Callable[[str], list[str] | None],
        seed: int = 0,
    ) -> None:
        self.task, self.seed = task, seed
        # without a row that can be read the reader is never called: the problems speak for themselves
        self.readers = make_readers(task, rows, names_of) if rows else (RowReader("text", {}),)
        asked = {"shots": task.shots, "system": task.system, "chat_template_kwargs": task.chat_template_kwargs}
        for key, value in asked.items() if rows and self.readers[0].name == "text" else ():
            if value:
                what = "the rows are plain text, which is learnt as it is, without turns or a chat template"
                raise UserError(what, where=f"tasks.{task.name}.{key}", do="leave it out, or say which column is what")

    @property
    def first(self) -> RowReader:
        """With the first template; the others read the same columns."""
        return self.readers[0]

    def __call__(self, row: FileRow) -> Conversation:
        """The conversation of a row; raises RowError."""
        place = f"{row.file}:{row.line}"
        return with_system_prompt(self.readers[self.template_of(place)](row.data), self.task.system)

    def template_of(self, place: str) -> int:
        """Which of the templates a row has. place: FILE:LINE."""
        return template_of(place, len(self.readers), self.seed)


def template_of(place: str, templates: int, seed: int) -> int:
    """Which of so many templates the row at FILE:LINE has."""
    return draw(seed, "template", place, templates) if templates > 1 else 0


def with_system_prompt(conversation: Conversation, system: str | None) -> Conversation:
    """The conversation with a system message in front, if it has none of its own (and no developer's)."""
    roles = {message["role"] for message in conversation.messages}
    if system is None or not roles or roles & {"system", "developer"}:
        return conversation
    return replace(conversation, messages=({"role": "system", "content": system}, *conversation.messages))


def first_rows(parts: Sequence[SourcePart]) -> tuple[list[dict[str, Any]], dict[str, list[str]]]:
    """The rows that decide how columns are read, and the names of labels by column."""
    rows = (row.data for part in parts for row in part.rows() if isinstance(row, FileRow))
    peeked = list(itertools.islice(rows, PEEK))
    columns = {column for row in peeked for column in row}
    names = {column: label_names for column in columns for part in parts if (label_names := part.label_names(column))}
    return peeked, names
