"""RegMean: the matrix that answers each task's inputs as the task's own adapter does, in the least squares.

    D = (sum_k D_k G_k) (sum_k G_k)^-1,   G_k = X_k^T X_k / N, off-diagonals * rho

Jin et al., "Dataless Knowledge Fusion by Merging Weights of Language Models" (ICLR 2023, arXiv 2212.09849). The base
weight cancels; in factors B stays and A_k becomes A_k G_k (sum G)^-1. The caller gives G_k, from unlabelled inputs
of each module, as GRAMS/NAME.safetensors with one tensor [n, n] per module (NAME: the adapter's). Modules that share
their input (q, k, v; gate, up) hold the same G. A ridge of 1e-6 of the mean diagonal keeps the sum invertible.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated

import numpy as np
from pydantic import Field, FiniteFloat
from scipy.linalg import cho_factor, cho_solve

from mtft.adapters.lora_factors import LoraFactors
from mtft.adapters.safetensors_io import TensorFile
from mtft.common.errors import MergeError
from mtft.merge.linalg.core_space import MergedCore, to_core
from mtft.merge.methods.base import MergeMethod, ModuleInputs


@dataclass(frozen=True)
class RegMean(MergeMethod):
    """grams: folder of the G_k. rho: shrinks off-diagonals (in use: 0.1 to 1). ridge: share of the mean diagonal."""

    grams: str = ""
    rho: Annotated[float, Field(ge=0, le=1)] = 0.9
    ridge: Annotated[FiniteFloat, Field(ge=0)] = 1e-6
    space = "factors"

    def describe(self) -> dict[str, object]:
        return {**super().describe(), "grams": Path(self.grams).name}  # a folder's place is no property of the merge

    def merge(self, parts: ModuleInputs, seen: object = None) -> MergedCore:
        if not self.grams:
            raise MergeError("regmean needs the inputs' Gram matrices", where="options.grams", do="give their folder")
        grams = [self._read(name, parts.module, parts.shape[1]) for name in parts.names]
        changed = regmean_factors(parts.factors, grams, self.rho, self.ridge)
        core = to_core(changed, parts.weights_K, parts.dtype)
        return MergedCore(core.sum(), core.rows, core.cols)

    def _read(self, name: str, module: str, n: int) -> np.ndarray:
        path = Path(self.grams) / f"{name}.safetensors"
        if not path.is_file():
            raise MergeError(f"no Gram matrices of adapter {name!r}", where=str(path), do="write one tensor per module")
        file = TensorFile(path)
        if module not in file.entries or file.entries[module].shape != (n, n):
            raise MergeError(f"no {n} x {n} tensor {module!r}", where=str(path), do="write X^T X / N of its inputs")
        return file.read(module)


def regmean_factors(
    factors: Sequence[LoraFactors], grams: Sequence[np.ndarray], rho: float, ridge: float
) -> list[LoraFactors]:
    """The factors with A_k G_k (sum G)^-1 in place of A_k."""
    shrunk = [rho * G + (1 - rho) * np.diag(np.diag(G)) for G in grams]
    total = np.sum(shrunk, axis=0)
    n = len(total)
    inverse = cho_factor(total + (ridge * np.trace(total) / n) * np.eye(n))
    # (A G) total^-1 = (total^-1 (A G)^T)^T, as both are symmetric.
    return [replace(f, A_RN=cho_solve(inverse, (f.A_RN @ G).T).T.astype(f.A_RN.dtype)) for f, G in zip(factors, shrunk)]
