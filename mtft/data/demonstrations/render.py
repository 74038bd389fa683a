"""Rows with their demonstrations in front, as many as fit into the longest example.

A row is not cut for the sake of its demonstrations: those farthest from its prompt are left out first.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby

from mtft.data.demonstrations.pool import DemonstrationPool, Turns, row_keys, with_demonstrations
from mtft.data.formats.messages import Conversation, RowError
from mtft.data.formats.task_reader import TaskReader
from mtft.data.notes import SHOTS_FEW, SHOTS_LEFT_OUT, SHOTS_NO_PLACE
from mtft.data.readers.row_files import FileRow
from mtft.data.tokenize.assistant_turns import RenderedChat
from mtft.data.tokenize.chat_template import ChatRenderer
from mtft.data.tokenize.encode import Example, encode

Indexed = tuple[int, Example]  # an example, and which row of the block it is of


class DemonstrationRenderer:
    """Renders rows of a task with demonstrations. max_length: tokens of the longest example; None: any."""

    def __init__(
        self, pool: DemonstrationPool, reader: TaskReader, renderer: ChatRenderer, max_length: int | None
    ) -> None:
        self.pool, self.reader, self.renderer, self.max_length = pool, reader, renderer, max_length
        self._shown: dict[int, tuple[Conversation, list[Turns]]] = {}

    def render(self, index: int, row: FileRow, conversation: Conversation) -> list[RenderedChat]:
        """As ChatRenderer.render, with all demonstrations of the row. Raises RowError."""
        notes = self.renderer.notes
        self._shown.pop(index, None)  # of an earlier block
        keys = row_keys(self.reader, row, conversation)
        chosen = self.pool.choose(f"{row.file}:{row.line}", conversation, keys)
        with_all = with_demonstrations(conversation, chosen)
        if with_all is None:
            notes[SHOTS_NO_PLACE] += 1
            return self.renderer.render(conversation)
        if len(chosen) < self.pool.n:
            notes[SHOTS_FEW] += 1
        self._shown[index] = conversation, chosen
        try:
            return self.renderer.render(with_all)
        except RowError as error:
            self.renderer.render(conversation)  # what is wrong with the row itself is said without them
            raise RowError(f"with demonstrations in front (tasks.*.shots): {error.what}") from error

    def fit(self, encoded: Sequence[Indexed]) -> list[Indexed]:
        """The examples of rows that `render` has made, with fewer demonstrations where they are too long."""
        fitting: list[Indexed] = []
        for index, examples in groupby(encoded, key=lambda one: one[0]):
            own = [example for _, example in examples]
            conversation, chosen = self._shown.pop(index, (None, []))
            if conversation is not None and chosen and not self._fits(own):
                own = self._with_fewer(conversation, chosen)
                self.renderer.notes[SHOTS_LEFT_OUT] += 1
            fitting += [(index, example) for example in own]
        return fitting

    def _with_fewer(self, conversation: Conversation, chosen: Sequence[Turns]) -> list[Example]:
        """The row with as many of the nearest demonstrations as fit, not with all."""
        notes = self.renderer.notes.copy()
        low, high, best = 0, len(chosen) - 1, None
        while low < high:
            middle = (low + high + 1) // 2
            found = self._encoded(conversation, chosen[:middle])
            low, high, best = (middle, high, found) if self._fits(found) else (low, middle - 1, best)
        found = best if best is not None else self._encoded(conversation, chosen[:low])
        self.renderer.notes.clear()  # the row was counted when it was rendered with all
        self.renderer.notes.update(notes)
        return found

    def _encoded(self, conversation: Conversation, chosen: Sequence[Turns]) -> list[Example]:
        with_some = with_demonstrations(conversation, chosen)
        assert with_some is not None
        return encode(self.renderer.tokenizer, self.renderer.render(with_some))

    def _fits(self, examples: Sequence[Example]) -> bool:
        return self.max_length is None or all(len(one.input_ids) <= self.max_length for one in examples)
