"""Compress-then-Merge: merge in one common subspace of rank r, so that the result has rank r by itself.

    U [m, r], V [n, r] orthonormal, maximising sum_k ||U^T D_k V||^2;   D = U f(U^T D_1 V, ..) V^T for a rule f

"Compress then Merge: From Multiple LoRAs into One Low-Rank Adapter" (arXiv 2606.03723). How the paper finds U and V
could not be checked; here they start from the SVDs of [D_k] and [D_k^T] and are improved in turns (higher-order
orthogonal iteration) until V stands still. (To stop when the objective does, which is flat there, leaves V off by the
root of the tolerance.)
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

import numpy as np
from pydantic import Field

from mtft.merge.linalg.core_space import CoreSpace, ExplicitBasis
from mtft.merge.methods.base import CoreSpaceMethod
from mtft.merge.methods.inner_method import InnerName, core_method

SWEEPS = 50


@dataclass(frozen=True)
class Ctm(CoreSpaceMethod):
    """rank: of the common subspace. of: the rule inside it: linear, tsv, iso_c, iso_cts or wudi."""

    rank: Annotated[int, Field(ge=1)] = 16
    of: InnerName = "linear"

    def rule(self, core: CoreSpace) -> np.ndarray:
        U, V = common_subspace(core.cores, self.rank)
        small = CoreSpace(
            [U.T @ M @ V for M in core.cores], ExplicitBasis(U), ExplicitBasis(V), core.weights_K, core.names
        )
        return U @ core_method(self.of).rule(small) @ V.T


def common_subspace(cores: list[np.ndarray], rank: int) -> tuple[np.ndarray, np.ndarray]:
    """Orthonormal U [p, r], V [q, r] that hold most of all cores [p, q] at once."""
    U, V = _leading(np.hstack(cores), rank), _leading(np.hstack([M.T for M in cores]), rank)
    still = 1e-11 if V.dtype == np.float64 else 1e-5
    for _ in range(SWEEPS):
        before = V
        U = _leading(np.hstack([M @ V for M in cores]), rank)
        V = _leading(np.hstack([M.T @ U for M in cores]), rank)
        if np.linalg.norm(V - before @ (before.T @ V)) < still:
            break
    return U, V


def _leading(X: np.ndarray, rank: int) -> np.ndarray:
    return np.linalg.svd(X, full_matrices=False)[0][:, :rank]
