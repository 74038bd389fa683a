"""Model Breadcrumbs: drop each task's smallest entries and its few largest, add up the rest.

    N entries sorted by |x|: t = int(d N), top = int(gamma N), bot = max(0, N - t - top); keep sorted[bot : bot + t]

Davari & Belilovsky, "Model Breadcrumbs" (ECCV 2024, arXiv 2312.06795). gamma 0 is plain trimming.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

import numpy as np
from pydantic import Field

from mtft.merge.linalg.streamed_delta import Rule, order_statistics
from mtft.merge.methods.base import Share
from mtft.merge.methods.elementwise_base import ElementwiseMethod, TaskDelta, kept_count


@dataclass(frozen=True)
class Breadcrumbs(ElementwiseMethod):
    """density: share of entries kept. gamma: share of largest entries dropped first."""

    density: Share = 0.9
    gamma: Annotated[float, Field(ge=0, lt=1)] = 0.01

    def rule(self, task: TaskDelta, seen: object = None) -> Rule:
        stream = task.stream
        count = kept_count(self.density, stream.size, task.module)
        low = max(0, stream.size - count - int(self.gamma * stream.size))
        bounds = order_statistics(
            lambda: ([np.abs(x) for x in blocks] for _, blocks in stream),
            [[low, low + count - 1]] * stream.K,
            stream.size,
        )
        weights_K = task.weights_K.astype(stream.dtype)

        def rule(start: int, blocks: list[np.ndarray]) -> np.ndarray:
            total = np.zeros_like(blocks[0])
            for w, x, (least, most) in zip(weights_K, blocks, bounds):
                size = np.abs(x)
                total += np.where((size >= least) & (size <= most), w * x, 0)
            return total

        return rule
