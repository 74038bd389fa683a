"""TSV-Merge: whiten the tasks' singular vectors against each other before adding.

    D_k = U_k S_k V_k^T,   D = polar+([U_1 .. U_K]) diag(S_1 .. S_K) polar+([V_1 .. V_K])^T

Gargiulo et al., "Task Singular Vectors" (CVPR 2025, arXiv 2412.00081). They keep min(m, n)/K triples of each task,
which for a LoRA adds arbitrary null vectors; here each task brings as many as its delta has rank. polar+ is restricted
to the non-zero singular values, since the plain polar factor is arbitrary when adapters overlap.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from mtft.merge.linalg.core_space import CoreSpace, polar
from mtft.merge.methods.base import CoreSpaceMethod


@dataclass(frozen=True)
class Tsv(CoreSpaceMethod):
    """No options: every task keeps all of its triples."""

    def rule(self, core: CoreSpace) -> np.ndarray:
        spectra = [core.spectrum(k) for k in range(len(core.cores))]
        U = polar(np.hstack([s.U for s in spectra]))
        V = polar(np.hstack([s.Vt.T for s in spectra]))
        return (U * np.concatenate([s.S for s in spectra])) @ V.T
