"""The models of a decode whose small models have another tokenizer: they read the text in their own tokens.

After every token of the strong model the text is encoded for the small models. What is the same as before stays in the
cache; the rest is forgotten there and read again. So the small models see what they would see on the text alone, at the
price of one or two more tokens per step.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from mtft.fuse.alpha.spec import FusionError
from mtft.fuse.decoding.model_state import CachedModel, CachedModels
from mtft.fuse.tokenizers.token_map import TokenMap


class MappedModels(CachedModels):
    """As CachedModels; logits of the small models are over their own ids."""

    def __init__(
        self,
        strong: CachedModel,
        weak: CachedModel,
        own: Sequence[CachedModel],
        order: Sequence[tuple[int, int]],
        token_map: TokenMap,
        context: int,
    ) -> None:
        super().__init__(strong, weak, own, order)
        self.token_map, self.context = token_map, context
        self.strong_ids: list[list[int]] = []  # strong ids of each row
        self.own_prompts: list[list[int] | None] = []  # a prompt of the small models' own
        self.small_ids: list[list[int]] = []  # small ids in the caches
        self.last_logits: tuple[list[Tensor], Tensor] | None = None  # logits after `small_ids`

    def read(
        self,
        ids_BL: Tensor,
        mask_BL: Tensor | None = None,
        keep: int | Tensor = 1,
        small_ids_BL: Tensor | None = None,
        small_mask_BL: Tensor | None = None,
    ) -> tuple[Tensor, list[Tensor], Tensor]:
        """As CachedModels.read; with keep = 0 or > 1 the small models read the text of every position by itself."""
        strong_BKV = self.strong.read(ids_BL, mask_BL, keep)[0]
        rows = ids_BL.tolist()
        real = [[True] * len(row) for row in rows] if mask_BL is None else mask_BL.bool().tolist()
        if not self.strong_ids:
            self.strong_ids, self.small_ids = [[] for _ in rows], [[] for _ in rows]
            self.own_prompts = [None] * len(rows) if small_ids_BL is None else _unpad(small_ids_BL, small_mask_BL)
        first = ids_BL.shape[1] - strong_BKV.shape[1]
        columns = []
        for at in range(ids_BL.shape[1]):
            for row, (ids, is_token) in enumerate(zip(rows, real, strict=True)):
                # with a prompt of its own the small models get what comes after the strong one's prompt
                if is_token[at] and not (self.own_prompts[row] is not None and self.last_logits is None):
                    self.strong_ids[row].append(ids[at])
            if at >= first:
                columns.append(self._update_small_models())
        experts = [torch.stack([column[0][t] for column in columns], 1) for t in range(len(self.order))]
        return strong_BKV, experts, torch.stack([column[1] for column in columns], 1)

    def _update_small_models(self) -> tuple[list[Tensor], Tensor]:
        """Logits ([B, M] per expert, base [B, M]) of the small models after the present text of every row."""
        target_ids, incomplete = [], []
        for row, text in enumerate(self.strong_ids):
            own_prompt = self.own_prompts[row]
            ids, complete = self.token_map.encode(text, opening=own_prompt is None)
            target_ids.append((own_prompt or []) + ids)
            incomplete.append(not complete or not target_ids[-1])
        common_lengths = [_common_prefix(old, new) for old, new in zip(self.small_ids, target_ids, strict=True)]
        # a text that has become shorter: its last token is read again, for its logits
        pairs = zip(common_lengths, self.small_ids, target_ids, strict=True)
        common_lengths = [at if old == new else max(0, min(at, len(new) - 1)) for at, old, new in pairs]
        stale_counts = [len(old) - at for old, at in zip(self.small_ids, common_lengths, strict=True)]
        new_ids = [new[at:] for new, at in zip(target_ids, common_lengths, strict=True)]
        if max(map(len, target_ids)) > self.context:
            raise FusionError(
                f"the text has {max(map(len, target_ids))} tokens of the small model, which reads {self.context}",
                do="shorten the prompt",
            )
        longest = max(map(len, new_ids))
        for cached in (self.weak, *self.own):
            cached.drop_last(stale_counts)
        if longest:
            ids = torch.tensor([[0] * (longest - len(row)) + row for row in new_ids])
            mask = torch.tensor([[0] * (longest - len(row)) + [1] * len(row) for row in new_ids])
            experts, base = self.read_weak(ids, mask, 1)
            new = [x[:, -1] for x in experts], base[:, -1]
            if self.last_logits is not None:
                has_new_B1 = torch.tensor([bool(row) for row in new_ids], device=new[1].device)[:, None]
                experts = [torch.where(has_new_B1, x, y) for x, y in zip(new[0], self.last_logits[0], strict=True)]
                new = experts, torch.where(has_new_B1, new[1], self.last_logits[1])
            self.last_logits = new
        if self.last_logits is None:
            raise FusionError("the prompt has no text for the small models", do="give at least one character")
        self.small_ids = target_ids
        experts, base = self.last_logits
        if any(incomplete):  # inside of a character the small models have nothing to say: no shift
            incomplete_B1 = torch.tensor(incomplete, device=base.device)[:, None]
            experts = [torch.where(incomplete_B1, base, expert) for expert in experts]
        return experts, base

    def select(self, keep: Tensor) -> None:
        super().select(keep)
        chosen = keep.tolist()
        self.strong_ids, self.own_prompts, self.small_ids = (
            [x[row] for row in chosen] for x in (self.strong_ids, self.own_prompts, self.small_ids)
        )
        if self.last_logits is not None:
            rows = keep.to(self.last_logits[1].device)
            self.last_logits = [expert[rows] for expert in self.last_logits[0]], self.last_logits[1][rows]

    def append_rows(self, other: CachedModels) -> None:
        super().append_rows(other)
        if not isinstance(other, MappedModels) or self.last_logits is None or other.last_logits is None:
            raise TypeError("only models that have read a prompt through the same token map can be put together")
        self.strong_ids, self.own_prompts, self.small_ids = (
            self.strong_ids + other.strong_ids,
            self.own_prompts + other.own_prompts,
            self.small_ids + other.small_ids,
        )
        experts = [torch.cat(pair) for pair in zip(self.last_logits[0], other.last_logits[0], strict=True)]
        self.last_logits = experts, torch.cat([self.last_logits[1], other.last_logits[1]])


def _unpad(ids_BL: Tensor, mask_BL: Tensor | None) -> list[list[int] | None]:
    if mask_BL is None:
        return list(ids_BL.tolist())
    return [row[is_token.bool()].tolist() for row, is_token in zip(ids_BL, mask_BL, strict=True)]


def _common_prefix(old: Sequence[int], new: Sequence[int]) -> int:
    """Length of the common prefix."""
    return next((at for at, (a, b) in enumerate(zip(old, new)) if a != b), min(len(old), len(new)))
