"""SCE: select the entries in which the tasks differ most, weigh tasks by their energy, erase the minority's sign.

    keep the int(f * count of non-zero variances) entries of largest variance over tasks;  s = sign of the sum;
    w_k = mean(D_k^2) / sum_j mean(D_j^2) of what is kept;   value = sum of agreeing w_k D_k / sum of agreeing w_k

Wan et al., "FuseChat" (arXiv 2408.07990). mergekit falls back to uniform weights when sum mean(D^2) < 1e-6, which
LoRA deltas are below; there is no such absolute limit here.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from mtft.merge.linalg.streamed_delta import Rule, order_statistics
from mtft.merge.methods.base import Share
from mtft.merge.methods.elementwise_base import ElementwiseMethod, TaskDelta, kept_count


@dataclass(frozen=True)
class Sce(ElementwiseMethod):
    """density: f, share of the entries with variance that are kept."""

    density: Share = 1.0

    def rule(self, task: TaskDelta, seen: object = None) -> Rule:
        least = self._threshold(task)
        energy = np.zeros(task.stream.K)
        for blocks in task.weighted():
            keep = True if least is None else np.var(blocks, axis=0) >= least
            energy += [np.sum(np.where(keep, x, 0) ** 2, dtype=np.float64) for x in blocks]
        shares = (energy / energy.sum() if energy.sum() else energy).astype(task.stream.dtype)
        weights_K = task.weights_K.astype(task.stream.dtype)

        def rule(start: int, blocks: list[np.ndarray]) -> np.ndarray:
            blocks = [w * x for w, x in zip(weights_K, blocks)]
            if least is not None:
                keep = np.var(blocks, axis=0) >= least
                blocks = [np.where(keep, x, 0) for x in blocks]
            sign = np.where(np.sum(blocks, axis=0) >= 0, 1, -1)
            total, share = np.zeros_like(blocks[0]), np.zeros_like(blocks[0])
            for c, x in zip(shares, blocks):
                agrees = np.sign(x) == sign
                total += np.where(agrees, c * x, 0)
                share += np.where(agrees, c, 0)
            return total / np.where(share == 0, 1, share)

        return rule

    def _threshold(self, task: TaskDelta) -> float | None:
        """Variance of the last entry kept, None = all."""
        if self.density == 1:
            return None
        varied = sum(int(np.count_nonzero(np.var(blocks, axis=0))) for blocks in task.weighted())
        if varied == 0:  # one task, or equal ones: nothing tells the entries apart
            return None
        place = task.stream.size - kept_count(self.density, varied, task.module)
        statistics = order_statistics(
            lambda: ([np.var(blocks, axis=0)] for blocks in task.weighted()), [[place]], task.stream.size
        )
        return statistics[0][0]
