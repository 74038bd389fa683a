"""Token by token to text: nothing is shown that a later token, or a stop string, could still change."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

UNFINISHED = "\ufffd"  # what a decoder shows for the first bytes of a character


class IncrementalDetokenizer:
    """The text of one answer as it grows. `finished` once a stop string has come; it is not part of the text."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, stops: Sequence[str] = ()) -> None:
        self.tokenizer, self.stops = tokenizer, tuple(stops)
        self.tokens: list[int] = []
        self.text, self.finished = "", False
        self._shown = 0

    def add(self, token: int) -> str:
        """Take a token; the text that is certain now and has not been shown."""
        self.tokens.append(token)
        self.text = str(self.tokenizer.decode(self.tokens, skip_special_tokens=True))
        stop_starts = [at for stop in self.stops if (at := self.text.find(stop)) >= 0]
        if stop_starts:
            self.text, self.finished = self.text[: min(stop_starts)], True
            return self.rest()
        safe = self.text.rstrip(UNFINISHED)
        return self._show(len(safe) - self._held_back(safe))

    def rest(self) -> str:
        """What was held back: at the end nothing can change it any more."""
        return self._show(len(self.text))

    def _held_back(self, text: str) -> int:
        """Length of the longest end of `text` that begins a stop string."""
        longest = max((len(stop) - 1 for stop in self.stops), default=0)
        lengths = range(min(longest, len(text)), 0, -1)
        return next((n for n in lengths if any(stop.startswith(text[-n:]) for stop in self.stops)), 0)

    def _show(self, end: int) -> str:
        new = self.text[self._shown : end]
        self._shown = max(self._shown, end)
        return new
