"""Classification without generating: how likely each label is as the whole answer to a prompt.

    log p(label | prompt) = sum_t log p(label_t | prompt, label_<t), end token included

With the end token included, "no" does not win over "no idea" by being shorter.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch

from mtft.common.errors import UserError
from mtft.data.tokenize.encode import Example
from mtft.evaluation.heldout_loss import BatchLayout, Score, score_tasks
from mtft.evaluation.prompts import HeldOutPrompt

MOST_LABELS = 200


def label_tokens(
    names: Sequence[str], prompts: Sequence[HeldOutPrompt], references: Sequence[str], tokenizer: Any, task: str
) -> list[np.ndarray]:
    """Tokens of each label, end token included: those that training shows, from the rows that have it.

    references: the reference of each prompt as text. Raises UserError for more than MOST_LABELS, and for a label that
    no row has and whose tokens can't be told.
    """
    if len(names) > MOST_LABELS:
        what = f"{len(names):,} different answers in the held-out rows: these are no labels"
        raise UserError(what, where=f"tasks.{task}.metrics", do="take exact_match or f1, or name the `labels`")
    found: dict[str, np.ndarray] = {}
    for prompt, text in zip(prompts, references, strict=True):
        found.setdefault(text, prompt.reference)
    known = references[0]
    return [found[name] if name in found else _spelled(tokenizer, found[known], known, name, task) for name in names]


def _spelled(tokenizer: Any, like: np.ndarray, known: str, name: str, task: str) -> np.ndarray:
    """Tokens of a label that no row has: those of another one, with the name in its place."""
    text = tokenizer.decode(like.tolist(), skip_special_tokens=False)
    again = tokenizer(text, add_special_tokens=False)["input_ids"]
    if text.count(known) != 1 or again != like.tolist():
        what = f"no held-out row has the label {name!r}, and its tokens can't be told from those of {known!r}"
        raise UserError(
            what, where=f"tasks.{task}.metrics", do="add a held-out row with it, or take it out of `labels`"
        )
    return np.asarray(tokenizer(text.replace(known, name), add_special_tokens=False)["input_ids"], dtype=np.int32)


class LabelledPrompts:
    """Every prompt with every label behind it, as a store: example n * L + l is prompt n with label l."""

    def __init__(self, task: str, prompts: Sequence[HeldOutPrompt], labels: Sequence[np.ndarray]) -> None:
        self.task, self._prompts, self._labels = task, prompts, labels
        lengths_N = np.array([len(prompt.prompt) for prompt in prompts])
        self.lengths = np.add.outer(lengths_N, [len(label) for label in labels]).flatten()
        self.row_numbers = np.arange(len(self.lengths))
        self.ids = [str(i) for i in self.row_numbers]

    @property
    def num_examples(self) -> int:
        return len(self.lengths)

    def example(self, i: int) -> Example:
        prompt, label = self._prompts[i // len(self._labels)].prompt, self._labels[i % len(self._labels)]
        supervised = np.zeros(len(prompt) + len(label), dtype=bool)
        supervised[len(prompt) :] = True
        return Example(np.concatenate([prompt, label]).astype(np.int32), supervised)


def label_log_probs(
    score: Score,
    task: str,
    prompts: Sequence[HeldOutPrompt],
    labels: Sequence[np.ndarray],
    layout: BatchLayout,
    *,
    device: torch.device | str = "cpu",
) -> np.ndarray:
    """float64 [N, L]: log-probability of label l (natural logarithm) as the answer to prompt n. A collective call.

    score: as in mtft.evaluation.heldout_loss.score_tasks, which shares the rows out over the ranks.
    """
    store = LabelledPrompts(task, prompts, labels)
    longest = int(store.lengths.max())  # a label may be longer than the row's own
    roomy = replace(
        layout,
        max_length=max(layout.max_length, longest),
        micro_batch_tokens=max(layout.micro_batch_tokens, longest),
    )
    scores = score_tasks(score, [store], roomy, device=device)[task]
    return -scores.nll_N.reshape(len(prompts), len(labels))
