"""Isotropic merging: give every direction of the merged update the same strength.

iso_c:    sum_k D_k = U S V^T,   D = mean(S) U V^T

iso_cts:  the top c directions of the sum are kept, and each task adds its own top t directions outside of them;
          all left vectors are made orthonormal by polar+, all right vectors too, and every strength is their mean.
          rho = rank of the sum, t = round((rho - int(common * rho)) / K), c = rho - K t.

Marczak et al., "No Task Left Behind: Isotropic Model Merging with Common and Task-Specific Subspaces" (ICML 2025,
arXiv 2502.04959). Their mean runs over all min(m, n) singular values; for LoRAs most of these are zero and their
directions arbitrary, so here U, S, V are those of the support only.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

import numpy as np
from pydantic import Field

from mtft.merge.linalg.core_space import CoreSpace, polar, svd
from mtft.merge.methods.base import CoreSpaceMethod


@dataclass(frozen=True)
class IsoC(CoreSpaceMethod):
    """No options."""

    def rule(self, core: CoreSpace) -> np.ndarray:
        U, S, Vt = svd(core.sum())
        return (S.mean() if S.size else 0.0) * (U @ Vt)


@dataclass(frozen=True)
class IsoCts(CoreSpaceMethod):
    """common: share of the sum's rank that is kept as common directions."""

    common: Annotated[float, Field(ge=0, le=1)] = 0.8

    def rule(self, core: CoreSpace) -> np.ndarray:
        U, S, Vt = svd(core.sum())
        rho, K = len(S), len(core.cores)
        t = round((rho - int(self.common * rho)) / K)
        c = max(0, rho - K * t)
        common = U[:, :c]
        lefts, strengths, rights = [common], [S[:c]], [Vt[:c].T]
        for M in core.cores:
            U, S, Vt = svd(M - common @ (common.T @ M)).cut(t)
            lefts.append(U)
            strengths.append(S)
            rights.append(Vt.T)
        S = np.concatenate(strengths)
        return (S.mean() if S.size else 0.0) * (polar(np.hstack(lefts)) @ polar(np.hstack(rights)).T)
