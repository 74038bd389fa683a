"""Delta-guided weights: in each module a task counts as much as it moved it.

    w_k = ||D_k||^p / sum_j ||D_j||^p per module,   D = sum_k w_k D_k

After the idea of CoDiEmb (arXiv 2508.11442: fusion weights from each parameter's deviation from its start). Only the
abstract was available to us: this is our form of it, not a reproduction.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

import numpy as np
from pydantic import Field, FiniteFloat

from mtft.merge.linalg.core_space import CoreSpace
from mtft.merge.methods.base import CoreSpaceMethod


@dataclass(frozen=True)
class DeltaNorm(CoreSpaceMethod):
    """power: p; 0 = plain average."""

    power: Annotated[FiniteFloat, Field(ge=0)] = 1.0

    def rule(self, core: CoreSpace) -> np.ndarray:
        return np.sum([w * M for w, M in zip(self.weights(core), core.cores)], axis=0)

    def weights(self, core: CoreSpace) -> np.ndarray:
        """w_K, adding up to 1."""
        norms = np.array([np.linalg.norm(M) for M in core.cores], dtype=np.float64)
        shares = (norms / norms.max()) ** self.power
        return shares / shares.sum()
