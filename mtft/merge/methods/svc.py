"""SVC, singular value calibration: shrink directions of a merged update in which the tasks add up too often.

    M = U S V^T,  p_ik = <u_i^T M, u_i^T D_k> / ||u_i^T D_k||^2,  sigma_i *= K / sum_k max(alpha, p_ik)

Li et al., "When Shared Knowledge Hurts: Spectral Over-Accumulation in Model Merging" (ICML 2026, arXiv 2602.05536). A
step after another method: `of` names it. p_ik is how many times its own strength task k finds in direction i. Where a
task has nothing in direction i (below 1e-10 of its norm), p_ik = alpha.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

import numpy as np
from pydantic import Field, FiniteFloat

from mtft.merge.linalg.core_space import CoreSpace, svd
from mtft.merge.methods.base import CoreSpaceMethod
from mtft.merge.methods.inner_method import InnerName, core_method


@dataclass(frozen=True)
class Svc(CoreSpaceMethod):
    """alpha: floor of p (the authors' configs 0.1, their docstring 1.0). of: linear, tsv, iso_c, iso_cts or wudi."""

    alpha: Annotated[FiniteFloat, Field(gt=0)] = 0.1
    of: InnerName = "linear"

    def rule(self, core: CoreSpace) -> np.ndarray:
        U, S, Vt = svd(core_method(self.of).rule(core))
        total = np.zeros(len(S))
        for M in core.cores:
            rows = U.T @ M
            strength = np.sum(rows**2, axis=1)
            shared = S * np.sum(Vt * rows, axis=1)
            acts = strength > 1e-20 * np.sum(M**2)
            p = np.where(acts, shared / np.where(acts, strength, 1.0), self.alpha)
            total += np.maximum(self.alpha, p)
        return (U * (S * len(core.cores) / total)) @ Vt
