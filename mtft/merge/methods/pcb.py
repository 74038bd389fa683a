"""PCB-Merging: entries compete inside a task and between tasks; those that lose are dropped.

    a = |x| clamped to its 1e-4 and 1 - 1e-4 order statistics;   b = exp(K minmax(a)^2) tanh(x sum_j x_j)
    b clamped below at its order statistic (1 - ratio);   c = minmax(b)
    D = scale * sum_k sign(x) a c / sum_k c

Du et al., "Parameter Competition Balancing for Model Merging" (NeurIPS 2024, arXiv 2410.02396). tanh makes the rule
hang on the scale of the deltas. The authors take order statistics over the whole model; here they are per module.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from ..dense import Rule, select
from .elementwise import DenseMethod, Task, check_density


@dataclass(frozen=True)
class Pcb(DenseMethod):
    """ratio: share of entries that survive (the authors: 0.05 together with a search of scale and weights)."""

    ratio: float = 0.1

    def __post_init__(self) -> None:
        check_density(self.ratio, "ratio")

    def rule(self, task: Task, seen: object = None) -> Rule:
        size, K = task.stream.size, task.stream.K
        ends = [int(1e-4 * size), max(0, int((1 - 1e-4) * size - 1))]
        spans = select(lambda: ([np.abs(x) for x in blocks] for blocks in task.weighted()), [ends] * K, size)

        def clamp(x: np.ndarray, span: list[float]) -> np.ndarray:
            return np.clip(np.abs(x), span[0], span[1])

        def balance(blocks: list[np.ndarray]) -> list[np.ndarray]:
            total = np.sum(blocks, axis=0)
            return [
                np.exp(K * _minmax(clamp(x, span), *span) ** 2) * np.tanh(x * total) for x, span in zip(blocks, spans)
            ]

        places = [min(size - 1, int((1 - self.ratio) * size)), size - 1]
        limits = select(lambda: (balance(blocks) for blocks in task.weighted()), [places] * K, size)
        weights_K = task.weights_K.astype(task.stream.dtype)

        def rule(start: int, blocks: list[np.ndarray]) -> np.ndarray:
            blocks = [w * x for w, x in zip(weights_K, blocks)]
            top, bottom = np.zeros_like(blocks[0]), np.zeros_like(blocks[0])
            for x, b, span, (least, most) in zip(blocks, balance(blocks), spans, limits):
                c = _minmax(np.maximum(b, least), least, most)
                top += np.sign(x) * clamp(x, span) * c
                bottom += c
            return top / np.maximum(bottom, 1e-12)

        return rule


def _minmax(x: np.ndarray, least: float, most: float) -> np.ndarray:
    """x moved to [0, 1]; 1 where all are equal."""
    return (x - least) / (most - least) if most > least else np.ones_like(x)
