"""The base of the elementwise methods: one rule on row blocks, used on LoRA deltas and on any list of matrices."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from mtft.common.errors import MergeError
from mtft.merge.linalg.core_space import MergedCore
from mtft.merge.linalg.streamed_delta import DeltaStream, Rule, compress, order_statistics
from mtft.merge.methods.base import MergeMethod, ModuleInputs, ModulePass


@dataclass(frozen=True)
class TaskDelta:
    """What a rule may know of one module: unweighted deltas as a stream, weights, and names for the masks."""

    stream: DeltaStream
    weights_K: np.ndarray
    names: tuple[str, ...]
    module: str
    seed: int

    def weighted(self) -> Iterator[list[np.ndarray]]:
        """A pass over the weighted blocks w_k D_k."""
        for _, blocks in self.stream:
            yield [w * x for w, x in zip(self.weights_K.astype(self.stream.dtype), blocks)]


class ElementwiseMethod(MergeMethod):
    """Elementwise on the dense deltas; result of full rank."""

    space = "dense"

    def rule(self, task: TaskDelta, seen: object = None) -> Rule:
        """Rows of all unweighted D_k -> rows of the result."""
        raise NotImplementedError

    def merge(self, parts: ModuleInputs, seen: object = None) -> MergedCore:
        task = task_delta(parts)
        return compress(task.stream, self.rule(task, seen), parts.rank_cap, parts.module)

    def merge_arrays(self, arrays: Sequence[np.ndarray], weights_K: np.ndarray, **labels) -> np.ndarray:
        """The rule on matrices as they are. labels: names, module, seed."""
        labels = {"names": tuple(map(str, range(len(arrays)))), "module": "", "seed": 0, **labels}
        task = TaskDelta(DeltaStream(arrays), np.asarray(weights_K), **labels)
        rule = self.rule(task)
        return np.vstack([rule(start, blocks) for start, blocks in task.stream])


def task_delta(parts: ModuleInputs) -> TaskDelta:
    stream = DeltaStream.of_factors(parts.factors, parts.dtype, parts.module)
    return TaskDelta(stream, parts.weights_K, parts.names, parts.module, parts.seed)


def kept_count(density: float, size: int, what: str) -> int:
    """int(density * size), the peers' count; below 1: MergeError."""
    count = int(density * size)
    if count < 1:
        raise MergeError(f"density {density} keeps none of {size} entries", where=what, do="raise options.density")
    return count


def magnitude_thresholds(stream: DeltaStream, density: float, what: str) -> list[float]:
    """For each task the |x| of its k-th largest entry, k = int(density * size); 0 for density 1."""
    count = kept_count(density, stream.size, what)
    if count == stream.size:
        return [0.0] * stream.K
    place = stream.size - count
    statistics = order_statistics(
        lambda: ([np.abs(x) for x in blocks] for _, blocks in stream), [[place]] * stream.K, stream.size
    )
    return [values[0] for values in statistics]


def global_thresholds(modules: ModulePass, density: float) -> dict[str, float]:
    """Adapter -> the |x| of its k-th largest entry over all of its modules (2 passes over its factors in fp32)."""
    sizes: dict[str, int] = {}
    for parts in modules():
        for name in parts.names:
            sizes[name] = sizes.get(name, 0) + parts.shape[0] * parts.shape[1]
    thresholds = {}
    for name, size in sizes.items():  # one adapter at a time: adapters differ in their modules
        place = size - kept_count(density, size, name)

        def blocks(name: str = name) -> Iterator[list[np.ndarray]]:
            for parts in modules():
                if name in parts.names:
                    factors = [parts.factors[parts.names.index(name)]]
                    for _, block in DeltaStream.of_factors(factors, parts.dtype, parts.module):
                        yield [np.abs(block[0])]

        thresholds[name] = order_statistics(blocks, [[place]])[0][0] if place else 0.0
    return thresholds
