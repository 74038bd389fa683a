"""TIES and DARE on the small cores instead of on the dense deltas: experimental, and cheap.

    D_k = U_k S_k V_k^T;   P, Q = left singular vectors of [U_k sqrt(S_k)] and of [V_k sqrt(S_k)]
    N_k = P^T D_k Q [R, R];   D = P f(N_1, .., N_K) Q^T

An elementwise rule depends on the basis, so this is neither TIES nor DARE of the deltas: it compares the adapters along
the directions that all of them together use most. Three choices make it a function of the deltas alone: each adapter is
balanced first, the bases are singular vectors of the stacks, and their signs are fixed (largest entry positive). Equal
singular values of a stack leave a basis undefined. After Core Space (Panariello et al., arXiv 2509.17786), whose cores
take f likewise.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from mtft.merge.linalg.core_space import CoreSpace, OrthonormalBasis, svd
from mtft.merge.methods.base import CoreSpaceMethod, Share
from mtft.merge.methods.dare import Dare, Then
from mtft.merge.methods.elementwise_base import ElementwiseMethod
from mtft.merge.methods.ties import Ties, Value, Variant


def on_cores(core: CoreSpace, inner: ElementwiseMethod) -> np.ndarray:
    """The merged core of an elementwise rule in the stacks' singular bases."""
    spectra = [core.spectrum(k) for k in range(len(core.cores))]
    P = _directions([s.U * np.sqrt(s.S) for s in spectra], core.rows)
    Q = _directions([s.Vt.T * np.sqrt(s.S) for s in spectra], core.cols)
    small = [P.T @ M @ Q for M in core.cores]
    labels = {"names": core.names, "module": core.module, "seed": core.seed}
    return P @ inner.merge_arrays(small, np.ones(len(small)), **labels) @ Q.T  # the weights are in the cores already


def _directions(columns: list[np.ndarray], basis: OrthonormalBasis) -> np.ndarray:
    """Left singular vectors of the stack in core coordinates, signs fixed by their largest entry in real ones."""
    U = svd(np.hstack(columns)).U
    real = basis.apply(U)
    if not U.shape[1]:
        return U
    signs = np.sign(real[np.abs(real).argmax(axis=0), np.arange(U.shape[1])])
    return U * np.where(signs == 0, 1, signs)


@dataclass(frozen=True)
class CoreTies(CoreSpaceMethod):
    """density, variant, value: of TIES, on the entries of the cores."""

    density: Share = 0.2
    variant: Variant = "paper"
    value: Value = "mean"

    def rule(self, core: CoreSpace) -> np.ndarray:
        return on_cores(core, Ties(self.density, self.variant, self.value))


@dataclass(frozen=True)
class CoreDare(CoreSpaceMethod):
    """density: of DARE. then: linear or ties."""

    density: Share = 0.5
    then: Then = "linear"

    def rule(self, core: CoreSpace) -> np.ndarray:
        return on_cores(core, Dare(self.density, self.then))
