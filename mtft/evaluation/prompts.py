"""What is asked of a model on held-out rows: everything before the last learnt turn, and what should follow.

Read from the token store, so a prompt here is token for token what training shows in front of that answer.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from mtft.common.errors import UserError


@dataclass(frozen=True)
class HeldOutPrompt:
    """The last learnt turn of one row.

    row        place among the rows of the task's scores
    prompt     int32 [P], P > 0
    reference  int32 [L], up to and with the end token
    where      file:line
    """

    row: int
    prompt: np.ndarray
    reference: np.ndarray
    where: str


def held_out_prompts(store: Any) -> list[HeldOutPrompt]:
    """One prompt a row of the store, in the order of its scores.

    Raises UserError for rows of plain text, in which everything is learnt: nothing is asked there.
    """
    found, rows = [], store.row_numbers
    lasts = np.flatnonzero(np.diff(rows, append=rows[-1] + 1)) if len(rows) else []
    for row, example in enumerate(lasts):
        ids, supervised = store.example(int(example))
        end = int(np.flatnonzero(supervised)[-1]) + 1
        before = np.flatnonzero(~supervised[:end])
        start = int(before[-1]) + 1
        where = store.place(int(example))
        if start < 2:  # the first token is never learnt
            raise UserError(
                f"{where}: everything in the row is learnt, so there is no prompt to answer",
                where=f"tasks.{store.task}.metrics",
                do="for plain text take loss, token_accuracy and exact_match; if train.max_length cuts the prompt off, "
                "raise it",
            )
        found.append(HeldOutPrompt(row, ids[:start], ids[start:end], where))
    return found


def end_tokens(prompts: Iterable[HeldOutPrompt], tokenizer: Any, model_ends: Any = None) -> tuple[int, ...]:
    """Ids that end an answer: the special ones that end the references, the tokenizer's and the model's own.

    model_ends: `eos_token_id` of a generation configuration.
    """
    special = {*tokenizer.all_special_ids}
    special |= {index for index, token in tokenizer.added_tokens_decoder.items() if token.special}
    own = [] if model_ends is None else [model_ends] if isinstance(model_ends, int) else list(model_ends)
    ends = {int(prompt.reference[-1]) for prompt in prompts} & special
    return tuple(sorted({*ends, *own, *({tokenizer.eos_token_id} - {None})}))


def answer_text(tokenizer: Any, ids: Sequence[int], ends: Sequence[int], stop: Sequence[str] = ()) -> str:
    """Tokens as text up to the first end token or stop text. Other special tokens stay: Mistral's `[TOOL_CALLS]`."""
    stopped = next((t for t, token in enumerate(ids) if token in ends), len(ids))
    text = tokenizer.decode([int(token) for token in ids[:stopped]], skip_special_tokens=False)
    cuts = [text.index(mark) for mark in stop if mark in text]
    return text[: min(cuts)] if cuts else text
