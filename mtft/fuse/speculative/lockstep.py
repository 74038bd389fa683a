"""Rows that run ahead of each other, shown to the outside in lockstep.

Speculation gives each row another number of tokens a round. Stopping criteria, streamers and returned scores must see
what they would see without it: one column after the other, all rows at once (some criteria keep state per row). So
tokens wait here until every unfinished row has one for the next column.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor
from transformers import EosTokenCriteria, MaxLengthCriteria

from mtft.fuse.decoding.decode import ScoreCollector
from mtft.fuse.decoding.generate_request import GenerateRequest


@dataclass
class ReleasedToken:
    """One token that waits: scores and log-probabilities if they are asked for, and what the observer is told."""

    id: int
    scores_V: Tensor | None = None
    logprobs_V: Tensor | None = None
    notify: Callable[[int], None] | None = None


@dataclass
class Lockstep:
    """All rows of a request. `over[row]`: the row needs no more tokens, as far as can be told from its own."""

    request: GenerateRequest
    width: int
    tokens_BL: Tensor = field(init=False)
    finished_B: Tensor = field(init=False)

    def __post_init__(self) -> None:
        ids_BL = self.request.ids_BL
        rows = len(ids_BL)
        self.tokens_BL, self.prompt = ids_BL, ids_BL.shape[1]
        self.finished_B = torch.zeros(rows, dtype=torch.bool, device=ids_BL.device)
        self.made: list[list[int]] = [[] for _ in range(rows)]  # all tokens of a row, shown or waiting
        self.over = [False] * rows
        self.collector = ScoreCollector(self.request, self.width)
        self._waiting: list[deque[ReleasedToken]] = [deque() for _ in range(rows)]
        criteria = self.request.criteria
        self._end_ids = {
            i for c in criteria if isinstance(c, EosTokenCriteria) for i in c.eos_token_id.flatten().tolist()
        }
        limits = [c.max_length - self.prompt for c in criteria if isinstance(c, MaxLengthCriteria)]
        self.limit = min(limits, default=None)

    @property
    def done(self) -> bool:
        return bool(self.finished_B.all())

    def room(self, row: int) -> float:
        """How many more tokens a row may get."""
        return float("inf") if self.limit is None else self.limit - len(self.made[row])

    def add(self, row: int, token: ReleasedToken) -> bool:
        """Take a token; False if the row is over now."""
        self.made[row].append(token.id)
        self._waiting[row].append(token)
        self.over[row] = token.id in self._end_ids or self.room(row) <= 0
        return not self.over[row]

    def release(self) -> None:
        """Show every column that all unfinished rows have."""
        request = self.request
        while not self.done:
            live = (~self.finished_B).nonzero().squeeze(-1).tolist()
            if any(not self._waiting[row] for row in live):
                return
            column = {row: self._waiting[row].popleft() for row in live}
            next_B = torch.full_like(self.tokens_BL[:, 0], request.pad)
            next_B[live] = torch.tensor([column[row].id for row in live], device=next_B.device)
            for row, token in column.items():
                if token.notify is not None:
                    token.notify(row)
            if column[live[0]].logprobs_V is not None:
                rows_A = torch.tensor(live, device=next_B.device)
                scores_AV = torch.stack([column[row].scores_V for row in live])
                self.collector.add(rows_A, scores_AV, torch.stack([column[row].logprobs_V for row in live]))
            self.tokens_BL = torch.cat([self.tokens_BL, next_B[:, None]], -1)
            if request.streamer is not None:
                request.streamer.put(next_B.cpu())
            self.finished_B = self.finished_B | request.criteria(self.tokens_BL, self.collector.scores)
            for row in self.finished_B.nonzero().squeeze(-1).tolist():
                self.over[row] = True
