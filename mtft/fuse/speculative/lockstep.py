"""Rows that run ahead of each other, shown to the outside in lockstep.

Speculation gives each row another number of tokens a round. Stopping criteria, streamers and returned scores must see
what they would see without it: one column after the other, all rows at once (some criteria keep state per row). So
tokens wait here until every unfinished row has one for the next column.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from transformers import MaxLengthCriteria

from mtft.fuse.decoding.decode import GeneratedColumns
from mtft.fuse.decoding.generate_request import GenerateRequest


@dataclass
class WaitingToken:
    """A token that waits: scores and log-probabilities if they are asked for, and how the observer is told."""

    id: int
    scores_V: Any = None
    logprobs_V: Any = None
    notify: Callable[[], None] | None = None


class Lockstep:
    """All rows of a request. `over[row]`: the row needs no more tokens, as far as can be told from its own."""

    def __init__(self, request: GenerateRequest, vocabulary: int) -> None:
        rows, prompt = request.ids_BL.shape
        self.request = request
        self.output = GeneratedColumns(request, vocabulary)
        self.made: list[list[int]] = [[] for _ in range(rows)]  # all tokens of a row, shown or waiting
        self.over = [False] * rows
        self._waiting: list[deque[WaitingToken]] = [deque() for _ in range(rows)]
        limits = [c.max_length - prompt for c in request.criteria if isinstance(c, MaxLengthCriteria)]
        self.limit = min(limits, default=float("inf"))

    @property
    def done(self) -> bool:
        return bool(self.output.finished_B.all())

    def room(self, row: int) -> float:
        """How many more tokens a row may get."""
        return self.limit - len(self.made[row])

    def add(self, row: int, token: WaitingToken) -> bool:
        """Take a token; False if the row is over now."""
        self.made[row].append(token.id)
        self._waiting[row].append(token)
        self.over[row] = token.id in self.request.end_ids or self.room(row) <= 0
        return not self.over[row]

    def release(self) -> None:
        """Show every column that all unfinished rows have."""
        while not self.done:
            live_A = (~self.output.finished_B).nonzero().squeeze(-1)
            live = live_A.tolist()
            if not all(self._waiting[row] for row in live):
                return
            column = [self._waiting[row].popleft() for row in live]
            next_B = torch.full_like(self.request.ids_BL[:, 0], self.request.pad)
            next_B[live_A] = torch.tensor([token.id for token in column], device=next_B.device)
            for token in column:
                if token.notify is not None:
                    token.notify()
            scored = None
            if self.output.keeps_scores:
                scores_AV = torch.stack([token.scores_V for token in column])
                scored = live_A, scores_AV, torch.stack([token.logprobs_V for token in column])
            self.output.append(next_B, scored)
            for row in self.output.finished_B.nonzero().squeeze(-1).tolist():
                self.over[row] = True
