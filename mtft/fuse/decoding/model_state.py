"""One model in a decode: its rows, its cache, its mask and its positions.

The strong model has one group of rows; the groups of the small base are the experts and itself; an expert that can't be
rows is a CachedModel of its own. Each may hold its own prompt: only the continuation is shared.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import PreTrainedModel

from mtft.fuse.decoding.multi_lora import MultiLoraLayout
from mtft.fuse.decoding.preallocated_cache import preallocated_cache


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
        if float(self.mask_BC.sum()) < 0.75 * self.mask_BC.numel():
            self.drop_gaps()

    def drop_gaps(self) -> None:
        """Drop what is never attended to: each row's tokens move to the right, in order, behind left padding."""
        length = int(self.mask_BC.sum(-1).max())
        order_BC = self.mask_BC.argsort(dim=-1, stable=True)[:, -length:]  # zeros first
        self.mask_BC = self.mask_BC.gather(-1, order_BC)
        self.has_gaps = not bool(self.mask_BC.all())
        index_RC = order_BC.repeat(len(self.groups), 1)[:, None, :, None]
        self._replace_cache(lambda x_RHCD: x_RHCD.gather(2, index_RC.expand(-1, x_RHCD.shape[1], -1, x_RHCD.shape[3])))

    def split(self, group: int) -> CachedModel:
        """Give the rows of one group to a CachedModel of its own, which reads on by itself."""
        at, rows = self.groups.index(group), self.mask_BC.shape[0]
        mine = slice(at * rows, (at + 1) * rows)
        other = self._copy_for((group,))
        other._replace_cache(lambda x: x[mine], self.cache)
        self.groups = tuple(g for g in self.groups if g != group)
        self._replace_cache(lambda x: torch.cat([x[: mine.start], x[mine.stop :]]))
        return other

    def join(self, other: CachedModel, at: int) -> None:
        """Take back a group that was split off, as group number `at`. Both must have read the same tokens."""
        for cached in (self, other):
            if cached.has_gaps:
                cached.drop_gaps()
        if not torch.equal(self.mask_BC, other.mask_BC):
            raise ValueError("only models that have read the same tokens can be joined")
        rows = self.mask_BC.shape[0]
        self.groups = (*self.groups[:at], *other.groups, *self.groups[at:])
        pairs = iter([(layer.keys, layer.values) for layer in other.cache.layers])
        cache = preallocated_cache(self.model)
        for index, layer in enumerate(self.cache.layers):
            both = zip((layer.keys, layer.values), next(pairs), strict=True)
            keys, values = (torch.cat([x[: at * rows], y, x[at * rows :]]) for x, y in both)
            cache.update(keys, values, index)
        self.cache = cache

    def append_rows(self, other: CachedModel) -> None:
        """Take in the prompts of another cache of the same model and groups, behind left padding where needed."""
        length = max(self.length, other.length)
        both = [F.pad(cached.mask_BC, (length - cached.length, 0)) for cached in (self, other)]
        cache = preallocated_cache(self.model)
        layers: list[Any] = list(zip(self.cache.layers, other.cache.layers, strict=True))
        for index, (mine, theirs) in enumerate(layers):
            grown = []
            for x, y in ((mine.keys, theirs.keys), (mine.values, theirs.values)):
                parts = [F.pad(z, (0, 0, length - z.shape[2], 0)).unflatten(0, (len(self.groups), -1)) for z in (x, y)]
                grown.append(torch.cat(parts, 1).flatten(0, 1))
            cache.update(*grown, index)
        self.cache, self.mask_BC = cache, torch.cat(both)
        self.has_gaps = not bool(self.mask_BC.all())

    def _copy_for(self, groups: tuple[int, ...]) -> CachedModel:
        cut = {"width": self.width, "layout": self.layout, "known": self.known, "substitute": self.substitute}
        twin = CachedModel(self.model, groups, **cut)
        twin.mask_BC, twin.has_gaps = self.mask_BC, self.has_gaps
        return twin

    def _replace_cache(self, change: Callable[[Tensor], Tensor], source: Any = None) -> None:
        """A new cache with `change` applied to all keys and values [rows, heads, columns, width]."""
        cache = preallocated_cache(self.model)
        for index, layer in enumerate((source or self.cache).layers):
            cache.update(change(layer.keys), change(layer.values), index)
        self.cache = cache


class CachedModels:
    """All the models of one fused decode: strong, then the small ones. The last group of `weak` is the base."""

    def __init__(
        self, strong: CachedModel, weak: CachedModel, own: Sequence[CachedModel], order: Sequence[tuple[int, int]]
    ) -> None:
        """order[t] = (-1, group of `weak`) or (index in `own`, 0): where expert t is."""
        self.strong, self.weak, self.own, self.order = strong, weak, list(own), list(order)

    @property
    def all(self) -> list[CachedModel]:
        return [self.strong, self.weak, *self.own]

    def read(
        self,
        ids_BL: Tensor,
        mask_BL: Tensor | None = None,
        keep: int | Tensor = 1,
        small_ids_BL: Tensor | None = None,
        small_mask_BL: Tensor | None = None,
    ) -> tuple[Tensor, list[Tensor], Tensor]:
        """(strong [B, k, V], T experts [B, k, M], base [B, k, M]) on the strong model's device.

        small_ids_BL: another prompt for the small models (their own chat template); the continuation is shared.
        """
        strong_BKV = self.strong.read(ids_BL, mask_BL, keep)[0]
        small = (ids_BL, mask_BL) if small_ids_BL is None else (small_ids_BL, small_mask_BL)
        return strong_BKV, *self.read_weak(*small, keep)

    def read_weak(
        self, ids_BL: Tensor, mask_BL: Tensor | None = None, keep: int | Tensor = 1
    ) -> tuple[list[Tensor], Tensor]:
        """The small models alone: (T experts, base)."""
        device = self.strong.model.device
        weak_GBKM = self.weak.read(ids_BL, mask_BL, keep).to(device)
        own = [cached.read(ids_BL, mask_BL, keep)[0].to(device) for cached in self.own]
        return [weak_GBKM[group] if index < 0 else own[index] for index, group in self.order], weak_GBKM[-1]

    def select(self, keep: Tensor) -> None:
        for cached in self.all:
            cached.select(keep)

    def append_rows(self, other: CachedModels) -> None:
        for cached, more in zip(self.all, other.all, strict=True):
            cached.append_rows(more)

    @property
    def movable(self) -> bool:
        """All keys and values are kept as they are: rows may be merged, cut and split."""
        caches = [cached.cache for cached in self.all]
        return all(cache.is_croppable and not any(cache.is_sliding) and not any(cache.is_linear) for cache in caches)
