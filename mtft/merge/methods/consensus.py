"""TALL masks and Consensus merging: which task does an entry of the sum belong to?

    mask_k = |D_k| > lam * |sum_j D_j - D_k|;   consensus: keep entries of the sum with at least `min_tasks` masks on

Wang et al., "Localizing Task Information for Improved Model Merging and Compression" (ICML 2024, arXiv 2405.07813).
lam is searched in [0.2, 6]. With `tall`, the named task's own part of the sum is exported instead.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

import numpy as np
from pydantic import Field, FiniteFloat

from mtft.merge.linalg.streamed_delta import Rule
from mtft.merge.methods.elementwise_base import ElementwiseMethod, TaskDelta


@dataclass(frozen=True)
class Consensus(ElementwiseMethod):
    """lam: how much a task must stand out. min_tasks: masks needed. tall: an adapter's name, for its mask alone."""

    lam: Annotated[FiniteFloat, Field(gt=0)] = 0.4
    min_tasks: Annotated[int, Field(ge=1)] = 2
    tall: str = ""

    def rule(self, task: TaskDelta, seen: object = None) -> Rule:
        weights_K = task.weights_K.astype(task.stream.dtype)

        def rule(start: int, blocks: list[np.ndarray]) -> np.ndarray:
            blocks = [w * x for w, x in zip(weights_K, blocks)]
            total = np.sum(blocks, axis=0)
            masks = [np.abs(x) > self.lam * np.abs(total - x) for x in blocks]
            if self.tall:  # an adapter without this module has no part in it
                keep = masks[task.names.index(self.tall)] if self.tall in task.names else np.zeros(total.shape, bool)
            else:
                keep = np.sum(masks, axis=0) >= self.min_tasks
            return np.where(keep, total, 0)

        return rule
