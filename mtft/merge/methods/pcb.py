"""PCB-Merging: entries compete inside a task and between tasks; those that lose are dropped.

    a = |x| clamped to its 1e-4 and 1 - 1e-4 order statistics;   b = exp(K minmax(a)^2) tanh(x sum_j x_j)
    b clamped below at its order statistic (1 - ratio);   c = minmax(b)
    D = scale * sum_k sign(x) a c / sum_k c

Du et al., "Parameter Competition Balancing for Model Merging" (NeurIPS 2024, arXiv 2410.02396). tanh makes the rule
hang on the scale of the deltas. `scope: global` takes the order statistics over the whole model, as the authors do;
`module` (default) over each matrix, which needs fewer passes. An adapter that lacks a module has no entries there.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from mtft.merge.linalg.streamed_delta import Rule, order_statistics
from mtft.merge.methods.base import ModulePass, Scope, Share
from mtft.merge.methods.elementwise_base import ElementwiseMethod, TaskDelta, task_delta

Ends = tuple[float, float]
"""Least and largest value of a clamp."""


Clamps = tuple[dict[str, Ends], dict[str, Ends]]
"""Of each task that competes: the clamp of |x|, and that of b."""


@dataclass(frozen=True)
class Pcb(ElementwiseMethod):
    """ratio: share of entries that survive (the authors: 0.05 together with a search of scale and weights).

    scope: order statistics per `module`, or `global`.
    """

    ratio: Share = 0.1
    scope: Scope = "module"

    def survey(self, modules: ModulePass) -> Clamps | None:
        """For `global`: the clamps over all modules."""
        return None if self.scope == "module" else self._clamps(lambda: (task_delta(parts) for parts in modules()))

    def rule(self, task: TaskDelta, seen: Clamps | None = None) -> Rule:
        clamps = seen or self._clamps(lambda: iter([task]))
        K = len(clamps[0])
        spans, limits = ([table[name] for name in task.names] for table in clamps)
        weights_K = task.weights_K.astype(task.stream.dtype)

        def rule(start: int, blocks: list[np.ndarray]) -> np.ndarray:
            blocks = [w * x for w, x in zip(weights_K, blocks)]
            top, bottom = np.zeros_like(blocks[0]), np.zeros_like(blocks[0])
            for x, b, span, (least, most) in zip(blocks, balance(blocks, spans, K), spans, limits):
                c = _minmax(np.maximum(b, least), least, most)
                top += np.sign(x) * np.clip(np.abs(x), *span) * c
                bottom += c
            return top / np.maximum(bottom, 1e-12)

        return rule

    def _clamps(self, tasks) -> Clamps:
        """tasks(): a pass over the modules. Every order statistic is taken over all of them together."""
        sizes: dict[str, int] = {}
        dtype = np.dtype(np.float32)
        for task in tasks():
            dtype = task.stream.dtype
            for name in task.names:
                sizes[name] = sizes.get(name, 0) + task.stream.size
        largest = max(sizes.values(), default=0)

        def channels(values) -> Iterator[list[np.ndarray]]:
            """Blocks with one array for each adapter of `sizes`, empty where it lacks the module."""
            for task in tasks():
                for blocks in task.weighted():
                    value_of = dict(zip(task.names, values(task, blocks)))
                    yield [value_of.get(name, np.empty(0, dtype)) for name in sizes]

        def ends(places: list[list[int]], values) -> dict[str, Ends]:
            statistics = order_statistics(lambda: channels(values), places, largest)
            return {name: (low, high) for name, (low, high) in zip(sizes, statistics)}

        edges = [[int(1e-4 * n), max(0, int((1 - 1e-4) * n - 1))] for n in sizes.values()]
        spans = ends(edges, lambda task, blocks: [np.abs(x) for x in blocks])
        tops = [[min(n - 1, int((1 - self.ratio) * n)), n - 1] for n in sizes.values()]

        def balanced(task: TaskDelta, blocks: list[np.ndarray]) -> list[np.ndarray]:
            return balance(blocks, [spans[name] for name in task.names], len(sizes))

        return spans, ends(tops, balanced)


def balance(blocks: list[np.ndarray], spans: list[Ends], K: int) -> list[np.ndarray]:
    """b of each task."""
    total = np.sum(blocks, axis=0)
    sharp = [np.exp(K * _minmax(np.clip(np.abs(x), *span), *span) ** 2) for x, span in zip(blocks, spans)]
    return [a * np.tanh(x * total) for a, x in zip(sharp, blocks)]


def _minmax(x: np.ndarray, least: float, most: float) -> np.ndarray:
    """x moved to [0, 1]; 1 where all are equal."""
    return (x - least) / (most - least) if most > least else np.ones_like(x)
