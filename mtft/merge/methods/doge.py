"""DOGE, task arithmetic in the trust region: move all tasks by one X that lessens their conflicts, then add them.

    lam_k = 0.07 / ||D_k||;   loss(X) = sum_k || diag(D_k (D_k - sum_j lam_j (D_j + X))^T) ||^2,  X from 0 by Adam,
    gradient minus P gradient, P = projector on the top int(rank/6) left singular vectors of the stacked U_k
    D = sum_k lam_k mask_k (D_k + X),  mask = top 30% of |D_k|

Wei et al., "Modeling Multi-Task Model Merging as Adaptive Projective Gradient Descent" (ICML 2025, arXiv 2501.01230).
The gradient's rows lie in the row space of the D_k, so X = Y W^T with Y [m, R] and W the right singular vectors of the
stacked D_k. Adam runs on Y: another path than Adam on X [m, n], to the same minimiser. (In any other basis than W the
result would hang on how the adapters are written, since Adam is elementwise.) Norms are per module, masks over the
whole model (`scope: global`) or per module.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

import numpy as np
from pydantic import Field, FiniteFloat

from mtft.merge.linalg.core_space import CoreSpace, MergedCore, svd
from mtft.merge.linalg.streamed_delta import DeltaStream, compress
from mtft.merge.methods.base import MergeMethod, ModuleInputs, ModulePass, Scope, Share
from mtft.merge.methods.elementwise_base import global_thresholds, magnitude_thresholds


@dataclass(frozen=True)
class Doge(MergeMethod):
    """eta: size of a task. steps, learning_rate: of Adam. shared: protected part of the rank. density: the mask's."""

    eta: Annotated[FiniteFloat, Field(gt=0)] = 0.07
    steps: Annotated[int, Field(ge=0)] = 400
    learning_rate: Annotated[FiniteFloat, Field(gt=0)] = 1e-4
    shared: Annotated[float, Field(ge=0, le=1)] = 1 / 6
    density: Share = 0.3
    scope: Scope = "global"
    space = "dense"

    def survey(self, modules: ModulePass) -> dict[str, float] | None:
        """For `global`: each adapter's threshold over all of its modules."""
        return global_thresholds(modules, self.density) if self.scope == "global" else None

    def merge(self, parts: ModuleInputs, seen: object = None) -> MergedCore:
        core = parts.core
        lam_K = self.eta / np.array([np.linalg.norm(M) for M in core.cores])
        Y, _ = self.descend(core, lam_K)
        stream = DeltaStream.of_factors(parts.factors, parts.dtype, parts.module)
        if self.scope == "global":
            thresholds = [seen[name] for name in parts.names]  # type: ignore[index]
        else:
            thresholds = magnitude_thresholds(stream, self.density, parts.module)
        weights_K = parts.weights_K.astype(parts.dtype)
        Wt = core.cols.apply(_directions(core)).T

        def rule(start: int, blocks: list[np.ndarray]) -> np.ndarray:
            X = Y[start : start + len(blocks[0])] @ Wt
            moved = [np.where(np.abs(x) >= t, w * x + X, 0) for w, x, t in zip(weights_K, blocks, thresholds)]
            return np.sum([c * x for c, x in zip(lam_K, moved)], axis=0).astype(parts.dtype)

        return compress(stream, rule, parts.rank_cap, parts.module)

    def descend(self, core: CoreSpace, lam_K: np.ndarray) -> tuple[np.ndarray, list[float]]:
        """Y [m, R] and the loss before each step."""
        W = _directions(core)
        left = [core.rows.apply(M @ W) for M in core.cores]  # D_k = left_k W^T
        P = self.protected(core)
        Y = np.zeros_like(left[0])
        first, second = np.zeros_like(Y), np.zeros_like(Y)
        total, losses = sum(c * D for c, D in zip(lam_K, left)), []
        for step in range(1, self.steps + 1):
            gap = total + lam_K.sum() * Y
            errors = [np.sum(D * (D - gap), axis=1) for D in left]  # the diagonals, [m]
            losses.append(float(sum(np.sum(e**2) for e in errors)))
            gradient = sum((-2 * lam_K.sum() * e)[:, None] * D for e, D in zip(errors, left))
            gradient -= P @ (P.T @ gradient)
            first = 0.9 * first + 0.1 * gradient
            second = 0.999 * second + 0.001 * gradient**2
            size = np.sqrt(second / (1 - 0.999**step)) + 1e-8
            Y -= self.learning_rate * (first / (1 - 0.9**step)) / size
        return Y, losses

    def protected(self, core: CoreSpace) -> np.ndarray:
        """Orthonormal columns [m, int(shared * rank)] of the directions that X must not touch in the gradient."""
        U = svd(np.hstack([svd(M).U for M in core.cores])).U
        return core.rows.apply(U[:, : int(self.shared * U.shape[1])])


def _directions(core: CoreSpace) -> np.ndarray:
    """W [dim, rank] in core coordinates: right singular vectors of the stacked deltas."""
    return svd(np.vstack(core.cores)).Vt.T
