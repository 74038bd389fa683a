"""DARE: drop entries at random and rescale the rest, then add up or hold a TIES election.

    T_k = mask_k * D_k / d,   mask ~ Bernoulli(d)

Yu et al., "Language Models are Super Mario" (ICML 2024, arXiv 2311.03099). `rescale: l1` is mergekit's way: each task
keeps its L1 norm exactly, not only in the mean. Masks hang on (seed, adapter's name, module) alone.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np

from mtft.merge.linalg.streamed_delta import BernoulliMask, Rule
from mtft.merge.methods.base import Share
from mtft.merge.methods.elementwise_base import ElementwiseMethod, TaskDelta
from mtft.merge.methods.ties import Cut, Value, Variant, elect_signs

Then = Literal["linear", "ties"]
Rescale = Literal["inverse", "l1"]


@dataclass(frozen=True)
class Dare(ElementwiseMethod):
    """density: d. then: `linear` or `ties` (with its variant and value). rescale: `inverse` (1/d) or `l1`."""

    density: Share = 0.5
    then: Then = "linear"
    variant: Variant = "paper"
    value: Value = "mean"
    rescale: Rescale = "inverse"

    def rule(self, task: TaskDelta, seen: object = None) -> Rule:
        masks = [BernoulliMask(task.seed, name, task.module, task.stream.n) for name in task.names]

        def drop(start: int, blocks: list[np.ndarray]) -> list[np.ndarray]:
            return [np.where(mask.uniform(start, len(x)) < self.density, x, 0) for mask, x in zip(masks, blocks)]

        factor = 1 / self.density
        cut: Cut = lambda start, blocks: [x.dtype.type(factor) * x for x in drop(start, blocks)]  # noqa: E731
        return after_drop(task, keep_l1(task, drop) if self.rescale == "l1" else cut, self)


def keep_l1(task: TaskDelta, drop: Cut) -> Cut:
    """`drop`, then each task scaled to its own L1 norm (one more pass)."""
    before, after = np.zeros(task.stream.K), np.zeros(task.stream.K)
    for start, blocks in task.stream:
        before += [np.abs(x).sum(dtype=np.float64) for x in blocks]
        after += [np.abs(x).sum(dtype=np.float64) for x in drop(start, blocks)]
    factors = np.divide(before, after, out=np.ones_like(before), where=after > 0)
    return lambda start, blocks: [x.dtype.type(c) * x for c, x in zip(factors, drop(start, blocks))]


def after_drop(task: TaskDelta, cut: Cut, options) -> Rule:
    """Weighted sum or election of what `cut` leaves; options: then, variant, value."""
    if options.then == "linear":
        weights_K = task.weights_K.astype(task.stream.dtype)
        return lambda start, blocks: np.sum([w * x for w, x in zip(weights_K, cut(start, blocks))], axis=0)
    return elect_signs(task, cut, options.variant, options.value)
