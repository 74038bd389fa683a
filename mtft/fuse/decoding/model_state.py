"""One model in a decode: its rows, its cache, its mask and its positions.

The strong model has one group of rows; the groups of the small base are the experts and itself; an expert that can't be
rows is a CachedModel of its own. Each may hold its own prompt: only the continuation is shared.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import PreTrainedModel

from mtft.fuse.decoding.multi_lora import MultiLoraLayout
from mtft.models.preallocated_cache import preallocated_cache

PaddedIds = tuple[Tensor, Tensor | None]  # ids [B, L] and their mask
DENSE = 0.75  # share of a cache's columns in use below which its gaps are dropped


class CachedModel:
    """A model and what it has read so far. B prompts become len(groups) * B rows, group-major.

    width: number of ids of the real vocabulary; the logits are cut to it. substitute: what the model reads in place of
    an id that it does not know (an id >= known).
    """

    def __init__(
        self,
        model: PreTrainedModel,
        groups: Sequence[int],
        *,
        width: int,
        layout: MultiLoraLayout | None = None,
        known: int | None = None,
        substitute: int = 0,
    ) -> None:
        self.model, self.groups, self.layout = model, tuple(groups), layout
        self.width, self.known, self.substitute = width, known, substitute
        self.cache: Any = preallocated_cache(model)  # its layers differ by model; we use keys and values
        self.mask_BC: Any = None  # a Tensor after the first read; 1 = a token, 0 = padding or a rejected draft
        self.has_gaps = False  # any zero in mask_BC

    @property
    def length(self) -> int:
        """Columns in the cache."""
        return 0 if self.mask_BC is None else self.mask_BC.shape[1]

    @torch.no_grad()
    def read(self, ids_BL: Tensor, mask_BL: Tensor | None = None, keep: int | Tensor = 1) -> Tensor:
        """Read L more tokens per prompt; logits [groups, B, kept, width] at the last `keep` positions (0 = all)."""
        rows = len(ids_BL)
        device = self.model.device
        ids_BL = ids_BL.to(device)
        if self.known is not None:
            ids_BL = ids_BL.masked_fill(ids_BL >= self.known, self.substitute)
        new_BL = torch.ones_like(ids_BL) if mask_BL is None else mask_BL.to(ids_BL)
        if mask_BL is not None:
            self.has_gaps = self.has_gaps or not bool(new_BL.all())
        if self.has_gaps:
            before_B1 = 0 if self.mask_BC is None else self.mask_BC.sum(-1, keepdim=True)
            positions_BL = (before_B1 + new_BL.cumsum(-1) - 1).clamp(min=0)
        else:
            positions_BL = torch.arange(self.length, self.length + ids_BL.shape[1], device=device).expand(rows, -1)
        self.mask_BC = new_BL if self.mask_BC is None else torch.cat([self.mask_BC, new_BL], -1)
        count = len(self.groups)
        if self.layout is not None:
            self.layout.set(self.groups, rows)
        logits = self.model(
            input_ids=ids_BL if count == 1 else ids_BL.repeat(count, 1),
            attention_mask=self.mask_BC.repeat(count, 1) if self.has_gaps else None,
            position_ids=positions_BL if count == 1 else positions_BL.repeat(count, 1),
            cache=self.cache,
            use_cache=True,
            logits_to_keep=keep,
        ).logits
        return logits[..., : self.width].unflatten(0, (count, rows))

    def select(self, keep: Tensor) -> None:
        """Go on with some of the prompts only."""
        keep = keep.to(self.mask_BC.device)
        rows = self.mask_BC.shape[0]
        self.mask_BC = self.mask_BC[keep]
        self.has_gaps = self.has_gaps and not bool(self.mask_BC.all())
        self.cache.batch_select_indices(torch.cat([group * rows + keep for group in range(len(self.groups))]))

    def crop(self, columns: int) -> None:
        """Forget the last columns."""
        if columns:
            self.cache.crop(-columns)
            self.mask_BC = self.mask_BC[:, :-columns]

    def mask_last(self, columns_BL: Tensor) -> None:
        """Leave some of the last L columns in the cache, but never attend to them again (bool, True = rejected)."""
        length = columns_BL.shape[1]
        mask_BC = self.mask_BC.clone()
        mask_BC[:, -length:] *= ~columns_BL.to(mask_BC.device)
        self.mask_BC, self.has_gaps = mask_BC, self.has_gaps or bool(columns_BL.any())

    def drop_last(self, counts: Sequence[int]) -> None:
        """Never attend again to the last tokens of each prompt, so many."""
        if not any(counts):
            return
        if not self.has_gaps and len(set(counts)) == 1:
            self.crop(counts[0])
            return
        counts_B1 = torch.tensor(counts, device=self.mask_BC.device)[:, None]
        from_right_BC = self.mask_BC.flip(-1).cumsum(-1).flip(-1)
        self.mask_BC, self.has_gaps = self.mask_BC * (from_right_BC > counts_B1), True
        self.squeeze()

    def squeeze(self) -> None:
        """Drop the gaps where they have become many."""
        if self.has_gaps and float(self.mask_BC.sum()) < DENSE * self.mask_BC.numel():
            self.drop_gaps()

    def drop_gaps(self) -> None:
        """Drop what is never attended to: each row's tokens move to the right, in order, behind left padding."""
        length = int(self.mask_BC.sum(-1).max())
        order_BC = self.mask_BC.argsort(dim=-1, stable=True)[:, -length:]  # zeros first
        self.mask_BC = self.mask_BC.gather(-1, order_BC)
        self.has_gaps = not bool(self.mask_BC.all())
        index_RC = order_BC.repeat(len(self.groups), 1)[:, None, :, None]
        self._fill_cache(lambda x: x.gather(2, index_RC.expand(-1, x.shape[1], -1, x.shape[3])), self)

    def split(self, group: int) -> CachedModel:
        """Give the rows of one group to a CachedModel of its own, which reads on by itself."""
        at, rows = self.groups.index(group), self.mask_BC.shape[0]
        other = copy.copy(self)
        other.groups, self.groups = (group,), (*self.groups[:at], *self.groups[at + 1 :])
        other._fill_cache(lambda x: x[at * rows : (at + 1) * rows], self, keep=True)
        self._fill_cache(lambda x: torch.cat([x[: at * rows], x[(at + 1) * rows :]]), self)
        return other

    def join(self, other: CachedModel, at: int) -> None:
        """Take back a group that was split off, as group number `at`. Both must have read the same tokens.

        `other` is empty after it.
        """
        for cached in (self, other):
            if cached.has_gaps:
                cached.drop_gaps()
        if not torch.equal(self.mask_BC, other.mask_BC):
            raise ValueError("only models that have read the same tokens can be joined")
        start = at * self.mask_BC.shape[0]
        self.groups = (*self.groups[:at], *other.groups, *self.groups[at:])
        self._fill_cache(lambda x, y: torch.cat([x[:start], y, x[start:]]), self, other)

    def append_rows(self, other: CachedModel) -> None:
        """Take in the prompts of another cache of the same model and groups, behind left padding where needed.

        `other` is empty after it.
        """
        length = max(self.length, other.length)

        def append(*both: Tensor) -> Tensor:
            padded = [F.pad(x, (0, 0, length - x.shape[2], 0)).unflatten(0, (len(self.groups), -1)) for x in both]
            return torch.cat(padded, 1).flatten(0, 1)

        self._fill_cache(append, self, other)
        self.mask_BC = torch.cat([F.pad(cached.mask_BC, (length - cached.length, 0)) for cached in (self, other)])
        self.has_gaps = not bool(self.mask_BC.all())

    def _fill_cache(self, change: Callable[..., Tensor], *sources: CachedModel, keep: bool = False) -> None:
        """A new cache: `change` of the sources' keys, and of their values [rows, heads, columns, width], per layer.

        The sources give up each layer as it is taken over, so that never more than one is held twice; unless they are
        to `keep` them.
        """
        cache = preallocated_cache(self.model)
        for index, layers in enumerate(zip(*(source.cache.layers for source in sources), strict=True)):
            keys, values = (change(*(getattr(layer, part) for layer in layers)) for part in ("keys", "values"))
            if not keep:
                for layer in layers:
                    layer.reset()  # dynamic layers drop their tensors
            cache.update(keys, values, index)
        self.cache = cache

    @property
    def movable(self) -> bool:
        """All keys and values are kept as they are: rows may be merged, cut and split."""
        return self.cache.is_croppable and not any(self.cache.is_sliding) and not any(self.cache.is_linear)


class ModelLogits(NamedTuple):
    """Logits at the same positions: of the strong model [..., V], of each expert and of the base [..., M]."""

    strong: Tensor
    experts: list[Tensor]
    base: Tensor

    def map(self, change: Callable[..., Tensor], *others: ModelLogits) -> ModelLogits:
        """`change` of each model's logits (and of the same model's in `others`)."""
        flat = [[logits.strong, *logits.experts, logits.base] for logits in (self, *others)]
        strong, *experts, base = (change(*parts) for parts in zip(*flat, strict=True))
        return ModelLogits(strong, experts, base)

    def select(self, rows: Tensor) -> ModelLogits:
        return self.map(lambda x: x[rows.to(x.device)])

    def last(self) -> ModelLogits:
        """At the last position: [B, L, *] -> [B, *]."""
        return self.map(lambda x: x[:, -1])


@dataclass(eq=False)
class CachedModels:
    """All the models of one fused decode: strong, then the small ones. The last group of `weak` is the base.

    order[t] = (-1, group of `weak`) or (index in `own`, 0): where expert t is.
    """

    strong: CachedModel
    weak: CachedModel
    own: list[CachedModel]
    order: list[tuple[int, int]]
    drafter: CachedModel | None = field(default=None, init=False)  # an expert that reads by itself: no `read` asks it

    @property
    def all(self) -> list[CachedModel]:
        caches = [self.strong, self.weak, *self.own]
        return caches if self.drafter is None or self.drafter in self.own else [*caches, self.drafter]

    def split_drafter(self, expert: int) -> CachedModel:
        """From now on this expert reads by itself, through what is returned."""
        if self.drafter is None:
            index, group = self.order[expert]
            self.drafter = self.weak.split(group) if index < 0 else self.own[index]
        return self.drafter

    def join_drafter(self, expert: int) -> None:
        """Take the expert back. It must have read what the others have."""
        if self.drafter is not None and self.drafter not in self.own:
            self.weak.join(self.drafter, self.order[expert][1])
        self.drafter = None

    def read(
        self,
        ids_BL: Tensor,
        mask_BL: Tensor | None = None,
        keep: int | Tensor = 1,
        small_prompt: PaddedIds | None = None,
    ) -> ModelLogits:
        """Logits at the last k = `keep` positions, [B, k, *], on the strong model's device.

        small_prompt: another one for the small models (their own chat template); the continuation is shared.
        """
        strong_BKV = self.strong.read(ids_BL, mask_BL, keep)[0]
        return ModelLogits(strong_BKV, *self.read_weak(*(small_prompt or (ids_BL, mask_BL)), keep))

    def read_weak(
        self, ids_BL: Tensor, mask_BL: Tensor | None = None, keep: int | Tensor = 1
    ) -> tuple[list[Tensor], Tensor]:
        """The small models alone: (T experts, base)."""
        device = self.strong.model.device
        weak_GBKM = self.weak.read(ids_BL, mask_BL, keep).to(device)
        experts = []
        for index, group in self.order:
            if index < 0 and group in self.weak.groups:
                experts.append(weak_GBKM[self.weak.groups.index(group)])
            elif index >= 0 and self.own[index] is not self.drafter:
                experts.append(self.own[index].read(ids_BL, mask_BL, keep)[0].to(device))
        return experts, weak_GBKM[-1]

    def select(self, keep: Tensor) -> None:
        for cached in self.all:
            cached.select(keep)

    def append_rows(self, other: CachedModels) -> None:
        for cached, more in zip(self.all, other.all, strict=True):
            cached.append_rows(more)

    def squeeze(self) -> None:
        """Drop gaps where rows that came or left have made them many; then caches move, if they may."""
        if self.movable:
            for cached in self.all:
                cached.squeeze()

    @property
    def movable(self) -> bool:
        return all(cached.movable for cached in self.all)
