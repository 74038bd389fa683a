"""LiNeS: scale the merged update by depth, so that early layers, which hold what all tasks share, move least.

    layer l of L:  alpha + beta * l / (L - 1);   outside the blocks and for L = 1:  alpha
    alpha = N(sum_k D_k) / N(merged) / K over all modules (1/K for `linear`)

Wang et al., "LiNeS: Post-training Layer Scaling Prevents Forgetting and Enhances Model Merging" (ICLR 2025,
arXiv 2410.17146). A step after another method (`of`). The authors search beta on validation data; left out, it is
1 - alpha, so that the last layer is merged at full strength. Their N is the L1 norm, ours Frobenius by default, which
needs no dense matrix.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal

import numpy as np
from pydantic import FiniteFloat

from mtft.merge.linalg.core_space import MergedCore, balanced_factors, svd
from mtft.merge.methods.base import MergeMethod, ModuleInputs, ModulePass
from mtft.merge.methods.inner_method import InnerName, core_method

ROWS = 256


@dataclass(frozen=True)
class Lines(MergeMethod):
    """of: linear, tsv, iso_c, iso_cts or wudi. alpha, beta: see above. norm: frobenius or l1."""

    of: InnerName = "linear"
    alpha: FiniteFloat | None = None
    beta: FiniteFloat | None = None
    norm: Literal["frobenius", "l1"] = "frobenius"
    space = "core"

    def survey(self, modules: ModulePass) -> dict[str, float]:
        """The factor of every module."""
        layers: dict[str, int | None] = {}
        of_sum = of_merged = 0.0
        largest_K = 1
        needs_norms = self.alpha is None and self.of != "linear"
        for parts in modules():
            layers[parts.module] = layer_of(parts.module)
            largest_K = max(largest_K, len(parts.names))
            if needs_norms:
                core = parts.core
                of_sum += self._size(MergedCore(core.sum(), core.rows, core.cols))
                of_merged += self._size(core_method(self.of).merge_core(core))
        ratio = of_sum / of_merged if needs_norms and of_merged else 1.0
        if self.norm == "frobenius":
            ratio = float(np.sqrt(ratio))  # _size summed squares
        alpha = ratio / largest_K if self.alpha is None else self.alpha
        beta = 1 - alpha if self.beta is None else self.beta
        depth = max((layer for layer in layers.values() if layer is not None), default=0) + 1
        return {module: layer_factor(layer, depth, alpha, beta) for module, layer in layers.items()}

    def merge(self, parts: ModuleInputs, seen: object = None) -> MergedCore:
        factors: dict[str, float] = seen  # type: ignore[assignment]
        merged = core_method(self.of).merge_core(parts.core)
        return MergedCore(factors[parts.module] * merged.X, merged.rows, merged.cols)

    def _size(self, merged: MergedCore) -> float:
        """Squared Frobenius norm, or L1 norm in row blocks."""
        if self.norm == "frobenius":
            return merged.square
        B, A = balanced_factors(svd(merged.X), merged.rows, merged.cols)
        return float(sum(np.abs(B[i : i + ROWS] @ A).sum() for i in range(0, len(B), ROWS)))


def layer_of(module: str) -> int | None:
    """The block's number: the first component of the name that is a number, None outside of blocks."""
    match = re.search(r"(?:^|\.)(\d+)(?:\.|$)", module)
    return int(match[1]) if match else None


def layer_factor(layer: int | None, depth: int, alpha: float, beta: float) -> float:
    """alpha + beta * layer/(depth - 1)."""
    return alpha if layer is None or depth < 2 else alpha + beta * layer / (depth - 1)
