"""KnOTS: align the adapters by one SVD, then merge elementwise there.

    [D_1 .. D_K] = U S [V_1 .. V_K];   D = U f(S V_1, .., S V_K)   or, with pre_scale off,   D = U S f(V_1, .., V_K)

Stoica et al., "Model merging with SVD to tie the Knots" (ICLR 2025, arXiv 2410.19735), f = TIES or DARE. The SVD is
one of R x R K cores; only the elementwise part sees n columns. The authors cut singular values below an absolute
1e-5, which LoRA deltas of usual size fall under; here the cut is relative.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from mtft.merge.linalg.core_space import CoreSpace, IdentityBasis, MergedCore, svd
from mtft.merge.methods.base import CoreSpaceMethod, Share
from mtft.merge.methods.dare import Dare, Then
from mtft.merge.methods.elementwise_base import ElementwiseMethod
from mtft.merge.methods.ties import Ties, Value, Variant

CUT = 1e-5


def knots(core: CoreSpace, inner: ElementwiseMethod, pre_scale: bool) -> MergedCore:
    """The alignment around an elementwise rule."""
    U, S, Vt = svd(np.hstack(core.cores), CUT)
    width = core.cols.dim
    eye = np.eye(width, dtype=core.dtype)
    Qt = core.cols.apply(eye).T
    rows = [Vt[:, k * width : (k + 1) * width] @ Qt for k in range(len(core.cores))]
    if pre_scale:
        rows = [S[:, None] * x for x in rows]
    ones = np.ones(len(rows))  # the weights are in the cores already
    labels = {"names": core.names, "module": core.module, "seed": core.seed}
    merged = inner.merge_arrays(rows, ones, **labels)
    left = U if pre_scale else U * S
    return MergedCore(left @ merged, core.rows, IdentityBasis(core.cols.size))


@dataclass(frozen=True)
class KnotsTies(CoreSpaceMethod):
    """density, variant, value: of TIES. pre_scale: merge S V_k (the authors' code) or V_k."""

    density: Share = 0.2
    variant: Variant = "paper"
    value: Value = "mean"
    pre_scale: bool = True

    def merge_core(self, core: CoreSpace, seen: object = None) -> MergedCore:
        return knots(core, Ties(self.density, self.variant, self.value), self.pre_scale)


@dataclass(frozen=True)
class KnotsDare(CoreSpaceMethod):
    """density: of DARE. then: linear or ties. pre_scale: as above."""

    density: Share = 0.5
    then: Then = "ties"
    pre_scale: bool = True

    def merge_core(self, core: CoreSpace, seen: object = None) -> MergedCore:
        return knots(core, Dare(self.density, self.then), self.pre_scale)
