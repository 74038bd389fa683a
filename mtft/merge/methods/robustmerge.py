"""RobustMerge: trim the factors, rescale the ranks that lost most, average A and B apart.

    A'_k, B'_k: top 20% of |A_k|, |s_k B_k|;   c_k = row sums |A_k| / row sums |A'_k|, raised to its sorted 80% position
    A = 2 sum A'_k,   B = 2 sum c_k B'_k / sum c_k   (per rank)

Zeng et al., "Parameter Efficient Merging for Multimodal Large Language Models with Direction Robustness" (arXiv
2502.17159). The one method here that sees factors, not deltas: cross terms B_j A_k enter, and the same adapter
written differently merges differently.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from mtft.adapters.lora_factors import LoraFactors
from mtft.common.errors import MergeError
from mtft.merge.linalg.core_space import MergedCore, to_core
from mtft.merge.methods.base import MergeMethod, ModuleInputs, Share
from mtft.merge.methods.elementwise_base import kept_count


@dataclass(frozen=True)
class RobustMerge(MergeMethod):
    """density: share of each factor's entries kept. level: position of the floor of c among its sorted values."""

    density: Share = 0.2
    level: Share = 0.8
    space = "factors"

    def merge(self, parts: ModuleInputs, seen: object = None) -> MergedCore:
        ranks = {f.rank for f in parts.factors}
        if len(ranks) > 1:
            do = "choose a method that sees deltas, as ties or tsv"
            raise MergeError(f"robustmerge needs equal ranks, got {sorted(ranks)}", where=parts.module, do=do)
        rank = ranks.pop()
        A, B, total = np.zeros((rank, parts.shape[1])), np.zeros((parts.shape[0], rank)), np.zeros(rank)
        for weight, f in zip(parts.weights_K, parts.factors):
            trimmed = self._trim(f.A_RN, parts.module)
            row_sums = np.abs(trimmed).sum(axis=1)
            c = np.abs(f.A_RN).sum(axis=1) / np.where(row_sums > 0, row_sums, 1)
            c = np.maximum(c, np.sort(c)[min(rank - 1, int(self.level * rank))])
            A = A + trimmed
            B = B + c * self._trim(weight * f.scale * f.B_MR, parts.module)
            total += c
        core = to_core([LoraFactors(2 * A, 2 * B / total, 1.0)], [1.0], parts.dtype)
        return MergedCore(core.sum(), core.rows, core.cols)

    def _trim(self, X: np.ndarray, what: str) -> np.ndarray:
        size = np.abs(X)
        count = kept_count(self.density, X.size, what)
        return np.where(size >= np.partition(size, X.size - count, axis=None)[X.size - count], X, 0)
