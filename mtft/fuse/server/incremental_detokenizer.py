"""Token by token to text: nothing is shown that a later token, or a stop string, could still change.

A token costs the same at the end of a long text as at its start: only the last few tokens are decoded again, because
what a decoder makes of a token (a space in front of it, a character of several bytes) depends on its neighbours only.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

UNFINISHED = "\ufffd"  # what a decoder shows for the first bytes of a character
PATIENCE = 32  # tokens that may wait for the end of a character: it has four bytes at the most


class IncrementalDetokenizer:
    """The text of one answer as it grows. `finished` once a stop string has come; it is not part of the text."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, stops: Sequence[str] = ()) -> None:
        self.tokenizer, self.stops = tokenizer, tuple(stops)
        self.tokens: list[int] = []
        self.finished = False
        self._shown: list[str] = []
        self._held = ""  # certain, but it may begin a stop string
        self._start = self._read = 0  # tokens[start:read] have become text, and are decoded again as a context
        self._context = ""  # their text
        self._longest_stop = max(map(len, self.stops), default=0)

    @property
    def text(self) -> str:
        """All text so far that is certain."""
        return "".join(self._shown) + self._held

    def add(self, token: int) -> str:
        """Take a token; the text that is certain now and has not been shown."""
        self.tokens.append(token)
        new = self._new_text()
        waited = len(self.tokens) - self._read
        if waited > PATIENCE or (new and not new.endswith(UNFINISHED)):
            self._take(new)
            stop_starts = [at for stop in self.stops if (at := self._held.find(stop)) >= 0]
            if stop_starts:
                self._held, self.finished = self._held[: min(stop_starts)], True
                return self.rest()
        return self._show(len(self._held) - self._held_back())

    def rest(self) -> str:
        """What was held back: at the end nothing can change it any more."""
        if not self.finished:
            self._take(self._new_text())
        return self._show(len(self._held))

    def _new_text(self) -> str:
        """What the tokens that have not become text add to their context."""
        return self._decode(self._start)[len(self._context) :] if self._read < len(self.tokens) else ""

    def _take(self, new: str) -> None:
        self._held += new
        self._start, self._read = self._read, len(self.tokens)
        self._context = self._decode(self._start)

    def _decode(self, start: int) -> str:
        return str(self.tokenizer.decode(self.tokens[start:], skip_special_tokens=True))

    def _held_back(self) -> int:
        """Length of the longest end of the held text that begins a stop string."""
        lengths = range(min(self._longest_stop - 1, len(self._held)), 0, -1)
        return next((n for n in lengths if any(stop.startswith(self._held[-n:]) for stop in self.stops)), 0)

    def _show(self, end: int) -> str:
        new, self._held = self._held[:end], self._held[end:]
        if new:
            self._shown.append(new)
        return new
