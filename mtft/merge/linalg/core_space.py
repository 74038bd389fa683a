"""Core space: K deltas of one weight as K small matrices in shared orthonormal bases.

    [A_1^T .. A_K^T] = Qa Ra,  [B_1 .. B_K] = Qb Rb
    M_k = w_k s_k Rb_k Ra_k^T  [R, R],   w_k D_k = Qb M_k Qa^T,   R = sum of the ranks

A rule f with f(U M_1 V^T, ..) = U f(M_1, ..) V^T for orthonormal U, V gives the same on cores as on the full matrices:
sums, products, SVDs, norms, pseudo-inverses, not anything elementwise. (Panariello et al., "Accurate and Efficient
Low-Rank Model Merging in Core Space", arXiv 2509.17786.) Q is never formed: reflectors (float64, and stacks close to
rank deficiency), or R^-1 (well-conditioned float32 stacks), are applied to R x r blocks, which is cheaper.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import NamedTuple, Protocol

import numpy as np
from scipy.linalg import get_lapack_funcs, solve_triangular
from threadpoolctl import ThreadpoolController

from mtft.adapters.lora_factors import LoraFactors
from mtft.common.errors import MergeError

_threads = cache(ThreadpoolController)


def one_thread():
    """Context in which LAPACK keeps to one thread: on shared cores its threads spin for nothing."""
    return _threads().limit(limits=1)


ROWS = 8192
"""Taller stacks (vocabularies) are factored in chunks of so many rows first, to bound memory."""


class OrthonormalBasis(Protocol):
    """Orthonormal columns Q [size, dim], applied without being formed."""

    size: int
    dim: int

    def apply(self, C: np.ndarray) -> np.ndarray:
        """Q @ C, [dim, r] -> [size, r]."""
        ...


class HouseholderBasis:
    """Q of a QR factorisation [size, dim], kept as reflectors; `R` is its triangle [dim, columns]."""

    def __init__(self, stack: np.ndarray) -> None:
        self.size = stack.shape[0]
        self.dim = min(stack.shape)
        (geqrf, self._ormqr) = get_lapack_funcs(("geqrf", "ormqr"), (stack,))
        work = geqrf(stack, lwork=-1)[2]
        factored, self._tau, _, info = geqrf(stack, lwork=int(work[0].real))
        if info != 0:
            raise ValueError(f"geqrf failed with info {info}")
        self.R = np.triu(factored[: self.dim])
        self._reflectors = factored[:, : self.dim]

    def apply(self, C: np.ndarray) -> np.ndarray:
        padded = np.zeros((self.size, C.shape[1]), self.R.dtype, order="F")
        padded[: self.dim] = C
        if not C.shape[1]:
            return padded
        arguments = ("L", "N", self._reflectors, self._tau, padded)
        work = self._ormqr(*arguments, -1)[1]
        result, _, info = self._ormqr(*arguments, int(work[0].real), overwrite_c=1)
        if info != 0:
            raise ValueError(f"ormqr failed with info {info}")
        return result


class ChunkedBasis:
    """Tall-skinny QR: Householder by chunks of rows, then of the stacked triangles."""

    def __init__(self, blocks: Sequence[np.ndarray]) -> None:
        self._parts = [HouseholderBasis(block) for block in blocks]
        self._top = HouseholderBasis(np.vstack([part.R for part in self._parts]))
        self.R, self.dim = self._top.R, self._top.dim
        self.size = sum(part.size for part in self._parts)

    def apply(self, C: np.ndarray) -> np.ndarray:
        inner = self._top.apply(C)
        stops = np.cumsum([part.dim for part in self._parts])
        pieces = (part.apply(inner[stop - part.dim : stop]) for part, stop in zip(self._parts, stops, strict=True))
        return np.vstack(list(pieces))


class ExplicitBasis:
    """Orthonormal columns that exist as a matrix."""

    def __init__(self, Q: np.ndarray) -> None:
        self.Q = Q
        self.size, self.dim = Q.shape

    def apply(self, C: np.ndarray) -> np.ndarray:
        return self.Q @ C


class CholeskyBasis:
    """Q = X R^-1 for a float32 stack X [size, columns] of full rank: half the work of reflectors.

    R comes from the Gram matrix in float64, so Q is orthonormal to cond(X)^2 * 1e-16; above a condition of 1e4, and
    for duplicates, LinAlgError: then Householder is the way.
    """

    def __init__(self, stack: np.ndarray) -> None:
        self.size, self.dim = stack.shape
        gram = np.zeros((self.dim, self.dim))
        for start in range(0, self.size, ROWS):
            rows = stack[start : start + ROWS].astype(np.float64)
            gram += rows.T @ rows
        self._R = np.linalg.cholesky(gram).T
        (trcon,) = get_lapack_funcs(("trcon",), (self._R,))
        reciprocal, info = trcon(self._R)
        if info != 0 or not reciprocal > 1e-4:
            raise np.linalg.LinAlgError("the stack is close to rank-deficient")
        self._stack = stack
        self.R = self._R.astype(stack.dtype)

    def apply(self, C: np.ndarray) -> np.ndarray:
        return self._stack @ solve_triangular(self._R, C.astype(np.float64)).astype(self._stack.dtype)


class IdentityBasis:
    """All coordinates: Q = I."""

    def __init__(self, size: int) -> None:
        self.size = self.dim = size

    def apply(self, C: np.ndarray) -> np.ndarray:
        return C


def orthonormal_basis(stack: np.ndarray) -> HouseholderBasis | ChunkedBasis | CholeskyBasis:
    """QR of a stack [size, columns]; the triangle is in `.R`. Safe under rank deficiency."""
    if stack.dtype == np.float32 and stack.shape[0] >= 4 * stack.shape[1]:
        try:
            return CholeskyBasis(stack)
        except np.linalg.LinAlgError:
            pass
    if stack.shape[0] > 4 * ROWS and stack.shape[1] < ROWS:
        return ChunkedBasis(np.array_split(stack, -(-stack.shape[0] // ROWS)))
    return HouseholderBasis(stack)


class Spectrum(NamedTuple):
    """U diag(S) Vt in the coordinates of a Core, singular values falling."""

    U: np.ndarray
    S: np.ndarray
    Vt: np.ndarray

    def cut(self, rank: int | None) -> Spectrum:
        """Its leading `rank` triples; None: all."""
        return Spectrum(self.U[:, :rank], self.S[:rank], self.Vt[:rank])


@dataclass(frozen=True)
class CoreSpace:
    """K deltas in shared bases: w_k D_k = rows @ cores[k] @ cols^T; adapters without this module are not in it."""

    cores: list[np.ndarray]
    rows: OrthonormalBasis
    cols: OrthonormalBasis
    weights_K: np.ndarray
    names: tuple[str, ...] = ()
    module: str = ""
    seed: int = 0
    pairs: tuple[tuple[np.ndarray, np.ndarray], ...] | None = None
    """cores[k] = L R^T, where they came from factors."""

    @property
    def dtype(self) -> np.dtype:
        return self.cores[0].dtype

    def spectrum(self, k: int) -> Spectrum:
        """SVD of cores[k], through its factors if they are known: r_k x r_k instead of R x R."""
        if self.pairs is None:
            return svd(self.cores[k])
        left, right = (np.linalg.qr(x) for x in self.pairs[k])
        U, S, Vt = svd(left.R @ right.R.T)
        return Spectrum(left.Q @ U, S, Vt @ right.Q.T)

    def sum(self) -> np.ndarray:
        return np.sum(self.cores, axis=0)


@dataclass(frozen=True)
class MergedCore:
    """What a method returns for one module: rows @ X @ cols^T. `total`: ||W||^2 if X is only the best part of W."""

    X: np.ndarray
    rows: OrthonormalBasis
    cols: OrthonormalBasis
    total: float | None = None

    @property
    def square(self) -> float:
        if self.total is not None:
            return self.total
        with np.errstate(over="ignore"):  # infinite: the caller refuses it
            return float(np.sum(self.X.astype(np.float64) ** 2))


def to_core(
    factors: Sequence[LoraFactors | None],
    weights_K: Sequence[float] | np.ndarray,
    dtype: np.dtype | type = np.float64,
    **labels,
) -> CoreSpace:
    """Cores of the adapters that have this module. Shapes must agree; ValueError if none has it."""
    present = [(f, float(w)) for f, w in zip(factors, weights_K, strict=True) if f is not None]
    if not present:
        raise ValueError("no adapter has this module")
    cols = orthonormal_basis(np.concatenate([f.A_RN for f, _ in present]).astype(dtype, copy=False).T)
    rows = orthonormal_basis(np.concatenate([f.B_MR for f, _ in present], axis=1).astype(dtype, copy=False))
    stops = np.cumsum([f.rank for f, _ in present])
    slices = [slice(stop - f.rank, stop) for (f, _), stop in zip(present, stops)]
    lefts = [np.asarray((w * f.scale) * rows.R[:, part], dtype) for (f, w), part in zip(present, slices)]
    pairs = tuple(zip(lefts, (cols.R[:, part] for part in slices)))
    cores = [left @ right.T for left, right in pairs]
    if not all(np.isfinite(core).all() for core in cores):
        raise too_large(str(labels.get("module", "")))
    return CoreSpace(cores, rows, cols, np.array([w for _, w in present]), pairs=pairs, **labels)


def too_large(where: str) -> MergeError:
    """The error for products of finite values that are not finite."""
    return MergeError("the deltas overflow", where=where, do="leave out the adapter whose values are that large")


def svd(X: np.ndarray, tolerance: float | None = None) -> Spectrum:
    """SVD of the numerical rank only: sigma_i > tolerance * sigma_1 (default: 1e-10 in float64, else 1e-5)."""
    U, S, Vt = np.linalg.svd(X, full_matrices=False)
    if tolerance is None:
        tolerance = 1e-10 if X.dtype == np.float64 else 1e-5
    return Spectrum(U, S, Vt).cut(int(np.count_nonzero(tolerance * S[:1] < S)))


def polar(X: np.ndarray) -> np.ndarray:
    """polar+(X) = sum of u_i v_i^T over the non-zero singular values: the nearest partial isometry."""
    U, _, Vt = svd(X)
    return U @ Vt


def balanced_factors(
    spectrum: Spectrum, rows: OrthonormalBasis, cols: OrthonormalBasis
) -> tuple[np.ndarray, np.ndarray]:
    """B = rows U sqrt(S) [m, r], A = sqrt(S) Vt cols^T [r, n].

    The largest entry of each left vector is made positive (ties: the first), so equal inputs give equal files.
    """
    root = np.sqrt(spectrum.S)
    B = rows.apply(spectrum.U * root)
    A = cols.apply(spectrum.Vt.T * root).T
    if B.shape[1]:
        signs = np.sign(B[np.abs(B).argmax(axis=0), np.arange(B.shape[1])])
        signs[signs == 0] = 1
        B, A = B * signs, A * signs[:, None]
    return B, A
