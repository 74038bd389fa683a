"""DELLA: drop entries at random, small ones more often, then elect signs as TIES does.

    in each row, rank i = 1 .. n of |x| rising:  p_i = d - eps + 2 eps (i - 1)/(n - 1),  keep with p_i, divide by p_i

Deep et al., "DELLA-Merging" (arXiv 2406.11617). `rescale: l1` is mergekit's way (no division; the L1 norm is kept).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

import numpy as np
from pydantic import Field

from mtft.common.errors import MergeError
from mtft.merge.linalg.streamed_delta import BernoulliMask, Rule
from mtft.merge.methods.base import Share
from mtft.merge.methods.dare import Rescale, Then, after_drop, keep_l1
from mtft.merge.methods.elementwise_base import ElementwiseMethod, TaskDelta
from mtft.merge.methods.ties import Value, Variant


@dataclass(frozen=True)
class Della(ElementwiseMethod):
    """density: d, the mean probability. epsilon: half the spread. then, variant, value, rescale: as in `dare`."""

    density: Share = 0.5
    epsilon: Annotated[float, Field(ge=0)] = 0.15
    then: Then = "ties"
    variant: Variant = "paper"
    value: Value = "mean"
    rescale: Rescale = "inverse"

    def __post_init__(self, where: str) -> None:
        super().__post_init__(where)
        if not 0 < self.density - self.epsilon <= self.density + self.epsilon < 1:
            where = f"{where}.density, {where}.epsilon"
            raise MergeError("density +- epsilon must lie inside (0, 1)", where=where, do="as 0.5 and 0.15")

    def rule(self, task: TaskDelta, seen: object = None) -> Rule:
        masks = [BernoulliMask(task.seed, name, task.module, task.stream.n) for name in task.names]
        divide = self.rescale == "inverse"

        def drop(start: int, blocks: list[np.ndarray]) -> list[np.ndarray]:
            thinned = []
            for mask, x in zip(masks, blocks):
                p = self.probabilities(x)
                y = np.where(mask.uniform(start, len(x)) < p, x, 0)
                thinned.append((y / p).astype(x.dtype) if divide else y)
            return thinned

        return after_drop(task, drop if divide else keep_l1(task, drop), self)

    def probabilities(self, x: np.ndarray) -> np.ndarray:
        """p [rows, n] of keeping each entry; one column: d."""
        n = x.shape[1]
        if n == 1:
            return np.full(x.shape, self.density)
        order = np.argsort(np.abs(x), axis=1, kind="stable")
        rank = np.empty(x.shape)
        np.put_along_axis(rank, order, np.broadcast_to(np.arange(n, dtype=float), x.shape), axis=1)
        return self.density - self.epsilon + 2 * self.epsilon * rank / (n - 1)
