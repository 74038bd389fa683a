"""Log-probabilities of tokens in OpenAI's two shapes, with the bytes that each token stands for and where it begins."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import lru_cache
from typing import Any

from mtft.fuse.server.jobs import TokenScore
from mtft.fuse.tokenizers.token_map import token_bytes


class TextOffset:
    """Where the next token begins in a text, in characters; a token may hold a part of a character only."""

    def __init__(self) -> None:
        self.characters = 0
        self._partial = b""

    def advance(self, data: bytes) -> int:
        """The offset of a token with these bytes; the next one begins behind it."""
        begin, known = self.characters, self._partial + data
        text = known.decode("utf-8", "ignore")
        cut = next((n for n in range(min(3, len(known)), 0, -1) if _begins_character(known[-n:])), 0)
        self._partial = known[len(known) - cut :]
        self.characters += len(text)
        return begin


def _begins_character(data: bytes) -> bool:
    """Are these the first bytes of a longer character?"""
    lead = data[0]
    length = 2 if 0xC2 <= lead < 0xE0 else 3 if 0xE0 <= lead < 0xF0 else 4 if 0xF0 <= lead < 0xF5 else 0
    return len(data) < length and all(0x80 <= byte < 0xC0 for byte in data[1:])


class LogprobShapes:
    """The shapes for one tokenizer."""

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer

    def completion(self, scores: Sequence[TokenScore], offset: TextOffset) -> dict[str, Any]:
        """The legacy shape: parallel lists. Two ids with one string: the larger number stays."""
        return {
            "tokens": [self._text(score.id) for score in scores],
            "token_logprobs": [_finite(score.logprob) for score in scores],
            "top_logprobs": [self._best(score) for score in scores],
            "text_offset": [offset.advance(self._bytes(score.id)) for score in scores],
        }

    def chat(self, scores: Sequence[TokenScore]) -> dict[str, Any]:
        """The shape of chats: an entry a token."""
        return {"content": [self._entry(s.id, s.logprob) | {"top_logprobs": self._entries(s)} for s in scores]}

    def _entries(self, score: TokenScore) -> list[dict[str, Any]]:
        return [self._entry(*pair) for pair in score.top]

    def _entry(self, i: int, value: float | None) -> dict[str, Any]:
        return {"token": self._text(i), "logprob": _finite(value), "bytes": list(self._bytes(i))}

    def _best(self, score: TokenScore) -> dict[str, float] | None:
        if score.logprob is None:
            return None
        chosen = ((score.id, score.logprob),) if score.top and math.isfinite(score.logprob) else ()
        by_text: dict[str, float] = {}
        for i, value in (*score.top, *chosen):
            text = self._text(i)
            by_text[text] = max(value, by_text.get(text, -math.inf))
        return by_text

    def _text(self, i: int) -> str:
        return str(self.tokenizer.decode([i]))

    def _bytes(self, i: int) -> bytes:
        """A token's own bytes, not those of what a decoder shows for half a character; a special token's name."""
        own = _all_bytes(self.tokenizer)
        data = own[i] if i < len(own) else None
        return self._text(i).encode() if data is None else data


@lru_cache(maxsize=4)
def _all_bytes(tokenizer: Any) -> list[bytes | None]:
    return token_bytes(tokenizer)


def _finite(value: float | None) -> float | None:
    """JSON has no infinity; OpenAI writes -9999."""
    return value if value is None or math.isfinite(value) else -9999.0
