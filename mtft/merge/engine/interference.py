"""How much adapters are in each other's way, from their factors alone.

    cosine_jk       = <D_j, D_k> / (||D_j|| ||D_k||)
    overlap_jk      = ||V_j^T V_k||^2 / min(r_j, r_k)   (left: U), 1 = one row space holds the other
    interference_k  = ||(X - D_k) P_k|| / ||D_k||, P_k the projector on the row space of D_k, X the merged delta:
                      how wrong X is on the inputs that D_k reacts to; 0 = as the expert alone

All depend on D_k only, not on how it is split into B and A.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from mtft.adapters.lora_factors import LoraAdapter, read_adapter, read_adapters
from mtft.merge.linalg.core_space import CoreSpace, one_thread, svd, to_core


def interference(core: CoreSpace, X: np.ndarray) -> np.ndarray:
    """interference_k [K] of the merged core X, in core coordinates."""
    return np.array([np.linalg.norm((X - M) @ svd(M).Vt.T) / np.linalg.norm(M) for M in core.cores])


def cosines(core: CoreSpace) -> np.ndarray:
    """cosine_jk [K, K]."""
    flat = np.stack([M.ravel() for M in core.cores])
    norms = np.linalg.norm(flat, axis=1)
    return flat @ flat.T / np.outer(norms, norms)


def diagnose(adapters: Sequence[str | Path | LoraAdapter], merged: str | Path | LoraAdapter) -> dict[str, object]:
    """Norms, cosines, overlaps and interference of adapters against a merged adapter, as plain JSON.

    `modules`: per module; the top level sums squares over modules, so a large module counts as much as it weighs.
    Adapters count as they are, without merge weights. Modules that are all zero in an adapter are left out of it.
    """
    experts = read_adapters(adapters)
    result = merged if isinstance(merged, LoraAdapter) else read_adapter(merged, "merged")
    names = [adapter.name for adapter in experts]
    K = len(names)
    dots_KK, error_K, square_K = np.zeros((K, K)), np.zeros(K), np.zeros(K)
    square_merged = 0.0
    overlap_KK, right_KK, left_KK = np.zeros((K, K)), np.zeros((K, K)), np.zeros((K, K))
    table = {}
    for module in sorted({name for adapter in experts for name in adapter.modules} & result.modules.keys()):
        factors = [adapter.factors(module) for adapter in experts]
        present = [k for k, f in enumerate(factors) if f is not None and f.B_MR.any() and f.A_RN.any()]
        if not present:
            continue
        with one_thread():
            core = to_core([*(factors[k] for k in present), result.factors(module)], np.ones(len(present) + 1))
            *cores, X = core.cores
            experts_core = CoreSpace(cores, core.rows, core.cols, core.weights_K[:-1])
            spectra = [svd(M) for M in cores]
            wrong = interference(experts_core, X)
        at = np.ix_(present, present)
        norms = np.array([np.linalg.norm(M) for M in cores])
        dots_KK[at] += cosines(experts_core) * np.outer(norms, norms)
        right_KK[at] += _overlap([s.Vt.T for s in spectra])
        left_KK[at] += _overlap([s.U for s in spectra])
        overlap_KK[at] += 1
        error_K[present] += (wrong * norms) ** 2
        square_K[present] += norms**2
        square_merged += float(np.sum(X**2))
        present_names = [names[k] for k in present]
        table[module] = {
            "norms": dict(zip(present_names, norms.tolist(), strict=True)),
            "merged_norm": float(np.linalg.norm(X)),
            "interference": dict(zip(present_names, wrong.tolist(), strict=True)),
        }
    norms_K = np.sqrt(square_K)
    return {
        "names": names,
        "norms": norms_K.tolist(),
        "merged_norm": float(np.sqrt(square_merged)),
        "cosines": _rows(dots_KK, np.outer(norms_K, norms_K)),
        "overlap_left": _rows(left_KK, overlap_KK),
        "overlap_right": _rows(right_KK, overlap_KK),
        "interference": [float(np.sqrt(e / s)) if s else None for e, s in zip(error_K, square_K, strict=True)],
        "modules": table,
    }


def _overlap(frames: list[np.ndarray]) -> np.ndarray:
    return np.array([[np.sum((a.T @ b) ** 2) / min(a.shape[1], b.shape[1]) for b in frames] for a in frames])


def _rows(sums: np.ndarray, counts: np.ndarray) -> list[list[float | None]]:
    """sums / counts; None where there was nothing to compare."""
    return [[float(a / b) if b else None for a, b in zip(*row, strict=True)] for row in zip(sums, counts, strict=True)]
