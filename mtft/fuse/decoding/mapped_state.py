"""The models of a decode whose small models have another tokenizer: they read the text in their own tokens.

After every token of the strong model the text is encoded for the small models. What is the same as before stays in the
cache; the rest is forgotten there and read again. So the small models see what they would see on the text alone, at the
price of one or two more tokens per step.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from mtft.fuse.alpha.spec import FusionError
from mtft.fuse.decoding.model_state import CachedModels, ModelLogits, PaddedIds
from mtft.fuse.decoding.prompts import left_pad
from mtft.fuse.tokenizers.token_map import TokenMap, common_prefix


@dataclass
class _Row:
    """One text: in strong ids, and the small ids in the caches.

    own_prompt: of the small models, in their ids: it ends with a special token, and the rest of it is `tail`, whose
    last token may grow together with what follows. skip: strong tokens still to come that it stands for.
    """

    own_prompt: list[int] | None = None
    tail: str = ""
    skip: int = 0
    strong_ids: list[int] = field(default_factory=list)
    small_ids: list[int] = field(default_factory=list)


@dataclass(eq=False)
class MappedModels(CachedModels):
    """As CachedModels; logits of the small models are over their own ids."""

    token_map: TokenMap
    context: int  # positions that the small models can read
    rows: list[_Row] = field(default_factory=list)
    small_logits: list[Tensor] | None = None  # of the experts and the base after each row's `small_ids`, [B, M]

    def read(
        self,
        ids_BL: Tensor,
        mask_BL: Tensor | None = None,
        keep: int | Tensor = 1,
        small_prompt: PaddedIds | None = None,
    ) -> ModelLogits:
        """As CachedModels.read; with keep = 0 or > 1 the small models read the text of every position by itself.

        small_prompt: counts at the first read; a row without tokens has no prompt of its own.
        """
        strong_BKV = self.strong.read(ids_BL, mask_BL, keep)[0]
        is_token_BL = torch.ones_like(ids_BL) if mask_BL is None else mask_BL
        if not self.rows:
            self.begin(small_prompt, is_token_BL.sum(-1).tolist())
        first = ids_BL.shape[1] - strong_BKV.shape[1]
        columns = []
        for at, (ids, is_token) in enumerate(zip(ids_BL.T.tolist(), is_token_BL.T.tolist(), strict=True)):
            for row, token, real in zip(self.rows, ids, is_token, strict=True):
                if real and row.skip:
                    row.skip -= 1
                elif real:
                    row.strong_ids.append(token)
            if at >= first:
                columns.append(self._update_small_models())
        *experts, base = (torch.stack(column, 1) for column in zip(*columns, strict=True))
        return ModelLogits(strong_BKV, experts, base)

    def begin(self, small_prompt: PaddedIds | None, strong_lengths: Sequence[int]) -> None:
        """Rows whose small models have a prompt of their own, in place of so many strong tokens."""
        prompts = [[] for _ in strong_lengths] if small_prompt is None else _unpad(*small_prompt)
        for prompt, length in zip(prompts, strong_lengths, strict=True):
            head, tail = self.token_map.split_tail(prompt) if prompt else (None, "")
            self.rows.append(_Row(head, tail, length if prompt else 0))

    def _update_small_models(self) -> list[Tensor]:
        """Logits [B, M] of the experts and the base after the present text of every row."""
        new_ids, stale_counts, silent = [], [], []
        for row in self.rows:
            ids, complete = self.token_map.encode(row.strong_ids, opening=row.own_prompt is None, before=row.tail)
            ids = (row.own_prompt or []) + ids
            if len(ids) > self.context:
                raise FusionError(
                    f"the text has {len(ids)} tokens of the small model, which reads {self.context}",
                    do="shorten the prompt",
                )
            same = common_prefix(row.small_ids, ids)
            if ids != row.small_ids:  # a text that has become shorter: its last token is read again, for its logits
                same = max(0, min(same, len(ids) - 1))
            new_ids.append(ids[same:])
            stale_counts.append(len(row.small_ids) - same)
            silent.append(not complete or not ids)
            row.small_ids = ids
        for cached in (self.weak, *self.own):
            cached.drop_last(stale_counts)
        if any(new_ids):
            experts, base = self.read_weak(*left_pad(new_ids, 0))
            latest = [x[:, -1] for x in (*experts, base)]
            if self.small_logits is not None:
                has_new_B1 = torch.tensor([bool(ids) for ids in new_ids], device=base.device)[:, None]
                latest = [torch.where(has_new_B1, x, y) for x, y in zip(latest, self.small_logits, strict=True)]
            self.small_logits = latest
        if self.small_logits is None:
            raise FusionError("the prompt has no text for the small models", do="give at least one character")
        *experts, base = self.small_logits
        if any(silent):  # inside of a character the small models have nothing to say: no shift
            silent_B1 = torch.tensor(silent, device=base.device)[:, None]
            experts = [torch.where(silent_B1, base, expert) for expert in experts]
        return [*experts, base]

    def select(self, keep: Tensor) -> None:
        super().select(keep)
        self.rows = [self.rows[row] for row in keep.tolist()]
        if self.small_logits is not None:
            self.small_logits = [x[keep.to(x.device)] for x in self.small_logits]

    def append_rows(self, other: CachedModels) -> None:
        super().append_rows(other)
        if not isinstance(other, MappedModels) or self.small_logits is None or other.small_logits is None:
            raise TypeError("only models that have read a prompt through the same token map can be put together")
        self.rows += other.rows
        self.small_logits = [torch.cat(pair) for pair in zip(self.small_logits, other.small_logits, strict=True)]


def _unpad(ids_BL: Tensor, mask_BL: Tensor | None) -> list[list[int]]:
    if mask_BL is None:
        return ids_BL.tolist()
    return [row[is_token.bool()].tolist() for row, is_token in zip(ids_BL, mask_BL, strict=True)]
