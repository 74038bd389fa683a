"""Prompts on their way into a running batch. They are read in parts, between its tokens: a long prompt halts nobody."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

from mtft.fuse.decoding.model_state import CachedModels, ModelLogits, PaddedIds
from mtft.fuse.server.jobs import GenerationJob

PART = 256  # tokens of all prompts together: what the others' next token has to wait for


@dataclass
class Prefill:
    """Jobs, the models that read their prompts, and the parts still to be read: of the strong model, of the small
    ones where they have their own."""

    jobs: Sequence[GenerationJob]
    models: CachedModels
    parts: deque[tuple[PaddedIds, PaddedIds | None]]

    def read(self) -> ModelLogits | None:
        """Reads one part; after the last, the logits at every prompt's last token."""
        prompt, small_prompt = self.parts.popleft()
        logits = self.models.read(*prompt, small_prompt=small_prompt)
        return None if self.parts else logits.last()


def cut_prompts(prompts: PaddedIds, small: PaddedIds | None, width: int) -> deque[tuple[PaddedIds, PaddedIds | None]]:
    """Prompts [B, L] in as many parts as the longest needs; those of the small models in as many."""
    lengths = [padded[0].shape[1] for padded in (prompts, small) if padded is not None]
    count = min(-(-max(lengths) // width), min(lengths))

    def cut(padded: PaddedIds) -> list[PaddedIds]:
        ids_BL, mask_BL = padded
        masks = [None] * count if mask_BL is None else mask_BL.tensor_split(count, 1)
        return list(zip(ids_BL.tensor_split(count, 1), masks, strict=True))

    return deque(zip(cut(prompts), [None] * count if small is None else cut(small), strict=True))
