"""Two tokenizers, one text: which token of the small model says the same as a token of the strong one (`tokens: map`).

The strong model's tokens are decoded and the text is encoded again for the small models. A token of the strong one gets
the shift of the small token with the same text, if there is one, and none otherwise. Special tokens go by their role:
bos, eos, and the end of a turn, which each chat template writes in its own way; else by their name.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor
from transformers.convert_slow_tokenizer import bytes_to_unicode

from mtft.data.tokenize.template import adds_bos
from mtft.fuse.decoding.prompts import end_of_turn, special_ids

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

TORN = "\ufffd"  # what the decoder makes of half a character
_BYTE = re.compile(r"<0x([0-9A-Fa-f]{2})>")


def token_strings(tokenizer: PreTrainedTokenizerBase) -> list[str | None]:
    """Token string of every id; None where an id has no token."""
    vocabulary = tokenizer.get_vocab()
    tokens: list[str | None] = [None] * (max(vocabulary.values()) + 1)
    for token, index in vocabulary.items():
        tokens[index] = token
    return tokens


def token_bytes(tokenizer: PreTrainedTokenizerBase) -> list[bytes | None]:
    """The bytes that each id stands for in a text; None for special tokens and ids without one."""
    backend: Any = tokenizer.backend_tokenizer if tokenizer.is_fast else None
    decoder = None if backend is None else json.loads(backend.to_str()).get("decoder")
    decoder_json = json.dumps(decoder, ensure_ascii=False)
    # byte-level BPE writes each byte as a printable character
    byte_of_char = {char: byte for byte, char in bytes_to_unicode().items()} if '"ByteLevel"' in decoder_json else {}
    spaced = "\u2581" in decoder_json
    special = special_ids(tokenizer)
    byte_strings: list[bytes | None] = []
    for index, token in enumerate(token_strings(tokenizer)):
        if token is None or index in special:
            byte_strings.append(None)
        elif byte_of_char and all(char in byte_of_char for char in token):
            byte_strings.append(bytes(byte_of_char[char] for char in token))
        elif spaced and (byte := _BYTE.fullmatch(token)):
            byte_strings.append(bytes([int(byte[1], 16)]))
        else:
            byte_strings.append((token.replace("\u2581", " ") if spaced else token).encode())
    return byte_strings


@dataclass(frozen=True)
class TokenMap:
    """From the strong tokenizer to the small one."""

    strong: PreTrainedTokenizerBase
    small: PreTrainedTokenizerBase

    @cached_property
    def small_id_V(self) -> Tensor:
        """int64 [V]: the small id that says what a strong id says, -1 where there is none."""
        id_of_bytes = {surface: index for index, surface in reversed(list(enumerate(self.small_bytes))) if surface}
        ids = [id_of_bytes.get(surface, -1) if surface else -1 for surface in self.strong_bytes]
        for index, small_id in self._special.items():
            ids[index] = small_id
        return torch.tensor(ids)

    @cached_property
    def strong_bytes(self) -> list[bytes | None]:
        """token_bytes of the strong tokenizer: of a quarter of a million ids that takes a second."""
        return token_bytes(self.strong)

    @cached_property
    def small_bytes(self) -> list[bytes | None]:
        """token_bytes of the small tokenizer."""
        return token_bytes(self.small)

    @property
    def width(self) -> int:
        """Ids of the small tokenizer."""
        return len(token_strings(self.small))

    @cached_property
    def _special(self) -> dict[int, int]:
        """Special ids with a counterpart: by role, or by the same string among the small one's special tokens.

        Where one token is both eos and end of turn, the end of turn decides: it is what an expert has learnt to say.
        """
        strings = {self.small.convert_ids_to_tokens(index): index for index in special_ids(self.small)}
        named = {index: self.strong.convert_ids_to_tokens(index) for index in sorted(special_ids(self.strong))}
        pairs = {index: strings[token] for index, token in named.items() if token in strings}
        roles = [
            tuple(getattr(side, f"{role}_token_id") for side in (self.strong, self.small)) for role in ("eos", "bos")
        ]
        for strong_id, small_id in (*roles, self.ends_of_turn):
            if strong_id is not None and small_id is not None:
                pairs[strong_id] = small_id
        return pairs

    @cached_property
    def ends_of_turn(self) -> tuple[int | None, int | None]:
        """The token that ends an answer: of the strong tokenizer, of the small one."""
        return end_of_turn(self.strong), end_of_turn(self.small)

    @cached_property
    def _opening(self) -> list[int]:
        """What the small tokenizer puts before every text by itself."""
        text = "a"
        usual, bare = self.small.encode(text), self.small.encode(text, add_special_tokens=False)
        return usual[: len(usual) - len(bare)] if bare and usual[-len(bare) :] == bare else []

    @cached_property
    def _added_bos(self) -> int | None:
        """The bos that the strong tokenizer puts before every text. The small one's own may mean something else
        (SmolLM2's opens a turn), so it stands there only if the small tokenizer puts it there too, as in training."""
        return cast(int, self.strong.bos_token_id) if adds_bos(self.strong) else None

    def encode(self, ids: Sequence[int], *, opening: bool = True, before: str = "") -> tuple[list[int], bool]:
        """(ids for the small models, complete?) of a text in strong ids; not complete: it ends inside of a character.

        Then the small ids stop before that character. opening: begin as the small tokenizer begins every text, not as
        the strong one does.
        before: text in front of it, which is encoded together with it.
        """
        small_ids: list[int] = []
        if opening and ids and ids[0] == self._added_bos and (len(ids) > 1 or ids[0] not in self._special):
            ids = ids[1:]  # where nothing follows, the small models' own bos is all that they could read
        if opening and self._opening and (not ids or self._special.get(ids[0]) != self._opening[0]):
            small_ids += self._opening
        begin, complete = 0, True
        for end in [*(at for at, index in enumerate(ids) if index in self._special), len(ids)]:
            text, before = before, ""
            if begin < end:
                text += self._text(list(ids[begin:end]), inside=begin == 0 and not opening)
                if end == len(ids) and text.endswith(TORN):
                    text, complete = text.rstrip(TORN), False
            if text:
                small_ids += self.small.encode(text, add_special_tokens=False)
            if end < len(ids):
                small_ids.append(self._special[ids[end]])
            begin = end + 1
        return small_ids, complete

    def _text(self, ids: list[int], *, inside: bool) -> str:
        """Text of strong ids. inside: it goes on with a text, so its first space counts (Llama's decoder drops it)."""
        front = self._anchor if inside else []
        texts = [
            str(self.strong.decode(part, skip_special_tokens=False, clean_up_tokenization_spaces=False))
            for part in (front, front + ids)
        ]
        return texts[1].removeprefix(texts[0])

    @cached_property
    def _anchor(self) -> list[int]:
        return self.strong.encode("a", add_special_tokens=False)

    def split_tail(self, small_ids: Sequence[int]) -> tuple[list[int], str]:
        """(ids up to the last special one, the text behind it): what follows a prompt is encoded with that text."""
        special = special_ids(self.small)
        cut = max((at + 1 for at, index in enumerate(small_ids) if index in special), default=0)
        tail = list(small_ids[cut:])
        text = str(self.small.decode(tail, skip_special_tokens=False, clean_up_tokenization_spaces=False))
        fits = self.small.encode(text, add_special_tokens=False) == tail
        return (list(small_ids[:cut]), text) if fits else (list(small_ids), "")

    def spread(self, small_NM: Tensor, empty: float) -> Tensor:
        """Values of small ids, put where the strong ids with the same text are; `empty` elsewhere."""
        index_V = self.small_id_V.to(small_NM.device)
        return small_NM.index_select(-1, index_V.clamp(min=0)).masked_fill_(index_V < 0, empty)


def common_prefix(old: Sequence[int], new: Sequence[int]) -> int:
    """Length of the common prefix."""
    return next((at for at, (a, b) in enumerate(zip(old, new)) if a != b), min(len(old), len(new)))
