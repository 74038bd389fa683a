"""Rendered text to tokens, each one marked as learnt or not.

The whole text is tokenised once, so the ids are those of the whole rendering by construction; the spans are carried
over by character offsets. A token that holds any learnt character is learnt: no character of an answer is lost where
a token reaches over the border. Of characters with several weights it has the largest. Special tokens stand in the text
already, so none is added.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from mtft.common.errors import UserError
from mtft.data.tokenize.assistant_turns import RenderedChat


@dataclass(frozen=True, eq=False)
class Example:
    """One training example; it unpacks as (input_ids, supervised).

    input_ids   int32 [L];  supervised  bool [L]: token t is learnt (predicted from t - 1)
    weights     float32 [L]: how much token t counts, > 0 where it is learnt, else 0; None: 1 each
    row_weight  how much the row that it is of counts, > 0
    """

    input_ids: np.ndarray
    supervised: np.ndarray
    weights: np.ndarray | None = None
    row_weight: float = 1.0

    def __iter__(self) -> Iterator[np.ndarray]:
        return iter((self.input_ids, self.supervised))


def encode(tokenizer: Any, rendered: Sequence[RenderedChat]) -> list[Example]:
    """Examples of rendered texts, in order. Fast tokenizers use all cores (RAYON_NUM_THREADS sets how many)."""
    if not rendered:
        return []
    if not tokenizer.is_fast:
        return [replace(_in_pieces(tokenizer, one), row_weight=one.row_weight) for one in rendered]
    # verbose=False: being longer than the model's window is judged later, by max_length
    batch = tokenizer(
        [one.text for one in rendered], add_special_tokens=False, return_attention_mask=False, verbose=False
    )
    examples = []
    for index, one in enumerate(rendered):
        ids = np.asarray(batch["input_ids"][index], dtype=np.int32)
        supervised = np.zeros(len(ids), dtype=bool)
        for start, end in one.spans:
            supervised[slice(*_tokens(batch, index, start, end, len(one.text), len(ids)))] = True
        clear_first_token(supervised)
        weights = None
        if one.weights:
            weights = np.zeros(len(ids), dtype=np.float32)
            for start, end, weight in one.weights:
                own = weights[slice(*_tokens(batch, index, start, end, len(one.text), len(ids)))]
                np.maximum(own, weight, out=own)
        examples.append(_weighed(ids, supervised, weights, one.row_weight))
    return examples


def _weighed(ids: np.ndarray, supervised: np.ndarray, weights: np.ndarray | None, of_row: float = 1.0) -> Example:
    """The example; a token of weight 0 is not learnt, and weights that are all 1 are none."""
    if weights is None:
        return Example(ids, supervised, row_weight=of_row)
    weights = np.where(supervised, weights, np.float32(0))
    supervised = weights > 0
    return Example(ids, supervised, None if (weights[supervised] == 1).all() else weights, of_row)


def clear_first_token(supervised: np.ndarray) -> np.ndarray:
    """The first token of an example is predicted from nothing, so it can't be learnt."""
    supervised[:1] = False
    return supervised


def runs(tokenizer: Any, example: Example) -> list[tuple[str, bool]]:
    """The example as text, cut where learnt and not learnt tokens meet: [(text, learnt)]. For people to look at."""
    ids, supervised = example
    borders = [0, *(np.flatnonzero(np.diff(supervised)) + 1).tolist(), len(ids)]
    return [
        (tokenizer.decode(ids[a:b].tolist(), skip_special_tokens=False), bool(supervised[a]))
        for a, b in itertools.pairwise(borders)
        if b > a
    ]


def draw(tokenizer: Any, example: Example, *, limit: int = 1500) -> str:
    """The example as one string, learnt parts between ⟦ and ⟧."""
    text = "".join(f"⟦{part}⟧" if learnt else part for part, learnt in runs(tokenizer, example))
    return text if len(text) <= limit else f"{text[: limit // 2]} [...] {text[-limit // 2 :]}"


def _tokens(batch: Any, index: int, start: int, end: int, characters: int, tokens: int) -> tuple[int, int]:
    """Token range [first, last) of the characters [start, end); characters without a token are passed over."""
    first = next((t for c in range(start, end) if (t := batch.char_to_token(index, c)) is not None), None)
    if first is None:
        return 0, 0
    after = next((t for c in range(end, characters) if (t := batch.char_to_token(index, c)) is not None), tokens)
    last = next(t for c in range(end - 1, start - 1, -1) if (t := batch.char_to_token(index, c)) is not None)
    return first, max(after, last + 1)


def _in_pieces(tokenizer: Any, one: RenderedChat) -> Example:
    """Tokenizers without offsets: tokenise between the borders, and prove that the pieces make the whole."""
    pieces = one.weights or [(start, end, 1.0) for start, end in one.spans]
    borders = sorted({0, len(one.text), *(border for start, end, _ in pieces for border in (start, end))})
    ids: list[int] = []
    weights: list[float] = []
    for start, end in itertools.pairwise(borders):
        piece = tokenizer(one.text[start:end], add_special_tokens=False, verbose=False)["input_ids"]
        ids += piece
        weights += [max((weight for a, b, weight in pieces if a <= start and end <= b), default=0.0)] * len(piece)
    if ids != tokenizer(one.text, add_special_tokens=False, verbose=False)["input_ids"]:
        what = f"{type(tokenizer).__name__} has no character offsets, and its tokens reach over the borders of answers"
        raise UserError(what, where="model.path", do="use the fast tokenizer of this model (a tokenizer.json)")
    weight_L = np.asarray(weights, dtype=np.float32)
    return _weighed(np.asarray(ids, dtype=np.int32), clear_first_token(weight_L > 0), weight_L)
