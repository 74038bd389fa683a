"""WUDI-Merging in closed form: the matrix that disturbs each task least on the task's own inputs.

    min_X  sum_k ||(X - D_k) D_k^T||^2 / ||D_k||^2        (rows of D_k stand for the inputs that task k reacts to)
    X G = C,  G = sum D_k^T D_k / ||D_k||^2,  C = sum D_k D_k^T D_k / ||D_k||^2
    ridge towards X0 = sum D_k:  X = (C + q X0)(G + q I)^-1,  q = ridge * K / rank(G)   (tr G = K)

Cheng et al., "Whoever Started the Interference Should End It" (ICML 2025, arXiv 2503.08099). They run 300 steps of
Adam from the sum, which is early stopping: another matrix. Without the ridge the norm blows up when the A_k nearly
coincide. ridge 0 has zero interference wherever that is possible.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

import numpy as np
from pydantic import Field, FiniteFloat

from mtft.merge.linalg.core_space import CoreSpace, svd
from mtft.merge.methods.base import CoreSpaceMethod


@dataclass(frozen=True)
class Wudi(CoreSpaceMethod):
    """ridge: pull towards the plain sum, as a share of the mean eigenvalue of G."""

    ridge: Annotated[FiniteFloat, Field(ge=0)] = 0.1

    def rule(self, core: CoreSpace) -> np.ndarray:
        norms = [np.linalg.norm(M) for M in core.cores]
        cores = [(M, norm) for M, norm in zip(core.cores, norms) if norm > 0]
        # With T = [D_k / ||D_k||] stacked, G = T^T T: its SVD gives G's without squaring the condition number.
        U, S, Vt = svd(np.vstack([M / norm for M, norm in cores]))
        C = np.hstack([M @ M.T / norm for M, norm in cores]) @ (U * S) @ Vt
        q = self.ridge * len(cores) / len(S)
        X0 = core.sum() if q else 0.0
        return ((C + q * X0) @ Vt.T / (S**2 + q)) @ Vt
