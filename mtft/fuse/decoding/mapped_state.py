"""The models of a decode whose small side has another tokenizer: it reads the text anew in its own tokens.

After every token of the strong model the text is encoded for the small side. What is the same as before stays in the
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
    """As Sides; logits of the small models are over their own ids."""

    def __init__(
        self,
        strong: CachedModel,
        weak: CachedModel,
        own: Sequence[CachedModel],
        order: Sequence[tuple[int, int]],
        bridge: TokenMap,
        context: int,
    ) -> None:
        super().__init__(strong, weak, own, order)
        self.bridge, self.context = bridge, context
        self.texts: list[list[int]] = []  # strong ids of each row
        self.heads: list[list[int] | None] = []  # a prompt of the small models' own
        self.seen: list[list[int]] = []  # small ids in the caches
        self.last: tuple[list[Tensor], Tensor] | None = None  # logits after `seen`

    def read(
        self,
        ids_BL: Tensor,
        mask_BL: Tensor | None = None,
        keep: int | Tensor = 1,
        small_ids_BL: Tensor | None = None,
        small_mask_BL: Tensor | None = None,
    ) -> tuple[Tensor, list[Tensor], Tensor]:
        """As Sides.read. With keep = 0 or more than 1 the small side reads the text of every position by itself."""
        strong_BKV = self.strong.read(ids_BL, mask_BL, keep)[0]
        rows = ids_BL.tolist()
        real = [[True] * len(row) for row in rows] if mask_BL is None else mask_BL.bool().tolist()
        if not self.texts:
            self.texts, self.seen = [[] for _ in rows], [[] for _ in rows]
            self.heads = [None] * len(rows) if small_ids_BL is None else _rows(small_ids_BL, small_mask_BL)
        first = ids_BL.shape[1] - strong_BKV.shape[1]
        columns = []
        for at in range(ids_BL.shape[1]):
            for row, (ids, there) in enumerate(zip(rows, real, strict=True)):
                # with a prompt of its own the small side gets what comes after the strong one's prompt
                if there[at] and not (self.heads[row] is not None and self.last is None):
                    self.texts[row].append(ids[at])
            if at >= first:
                columns.append(self._catch_up())
        experts = [torch.stack([column[0][t] for column in columns], 1) for t in range(len(self.order))]
        return strong_BKV, experts, torch.stack([column[1] for column in columns], 1)

    def _catch_up(self) -> tuple[list[Tensor], Tensor]:
        """Logits ([B, M] per expert, base [B, M]) of the small models after the present text of every row."""
        wanted, torn = [], []
        for row, text in enumerate(self.texts):
            head = self.heads[row]
            ids, whole = self.bridge.encode(text, opening=head is None)
            wanted.append((head or []) + ids)
            torn.append(not whole or not wanted[-1])
        same = [_common(old, new) for old, new in zip(self.seen, wanted, strict=True)]
        # a text that has become shorter: its last token is read again, for its logits
        pairs = zip(same, self.seen, wanted, strict=True)
        same = [at if old == new else max(0, min(at, len(new) - 1)) for at, old, new in pairs]
        drop = [len(old) - at for old, at in zip(self.seen, same, strict=True)]
        fresh = [new[at:] for new, at in zip(wanted, same, strict=True)]
        if max(map(len, wanted)) > self.context:
            raise FusionError(
                f"the text has {max(map(len, wanted))} tokens of the small model, which reads {self.context}",
                do="shorten the prompt",
            )
        longest = max(map(len, fresh))
        for side in (self.weak, *self.own):
            side.forget(drop)
        if longest:
            ids = torch.tensor([[0] * (longest - len(row)) + row for row in fresh])
            mask = torch.tensor([[0] * (longest - len(row)) + [1] * len(row) for row in fresh])
            experts, base = self.read_weak(ids, mask, 1)
            new = [x[:, -1] for x in experts], base[:, -1]
            if self.last is not None:
                fresh_B1 = torch.tensor([bool(row) for row in fresh], device=new[1].device)[:, None]
                experts = [torch.where(fresh_B1, x, y) for x, y in zip(new[0], self.last[0], strict=True)]
                new = experts, torch.where(fresh_B1, new[1], self.last[1])
            self.last = new
        if self.last is None:
            raise FusionError("the prompt has no text for the small models", do="give at least one character")
        self.seen = wanted
        experts, base = self.last
        if any(torn):  # inside of a character the small models have nothing to say: no shift
            torn_B1 = torch.tensor(torn, device=base.device)[:, None]
            experts = [torch.where(torn_B1, base, expert) for expert in experts]
        return experts, base

    def select(self, keep: Tensor) -> None:
        super().select(keep)
        chosen = keep.tolist()
        self.texts, self.heads, self.seen = ([x[row] for row in chosen] for x in (self.texts, self.heads, self.seen))
        if self.last is not None:
            here = keep.to(self.last[1].device)
            self.last = [expert[here] for expert in self.last[0]], self.last[1][here]

    def absorb(self, other: CachedModels) -> None:
        super().absorb(other)
        if not isinstance(other, MappedModels) or self.last is None or other.last is None:
            raise TypeError("only sides that have read a prompt through the same bridge can be put together")
        self.texts, self.heads, self.seen = (
            self.texts + other.texts,
            self.heads + other.heads,
            self.seen + other.seen,
        )
        experts = [torch.cat(pair) for pair in zip(self.last[0], other.last[0], strict=True)]
        self.last = experts, torch.cat([self.last[1], other.last[1]])


def _rows(ids_BL: Tensor, mask_BL: Tensor | None) -> list[list[int] | None]:
    if mask_BL is None:
        return list(ids_BL.tolist())
    return [row[there.bool()].tolist() for row, there in zip(ids_BL, mask_BL, strict=True)]


def _common(old: Sequence[int], new: Sequence[int]) -> int:
    """Length of the common prefix."""
    return next((at for at, (a, b) in enumerate(zip(old, new)) if a != b), min(len(old), len(new)))
