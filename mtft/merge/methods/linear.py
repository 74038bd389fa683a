"""Task arithmetic: the weighted sum of the deltas, exactly.

    D = sum_k w_k D_k

Ilharco et al., "Editing Models with Task Arithmetic" (ICLR 2023, arXiv 2212.04089). Negative weights negate a task.
PEFT's `linear` adds A and B apart, which is another matrix (https://github.com/huggingface/peft/issues/1155);
this is what it calls `cat`, and, cut to rank r, `svd`: the names here differ in the rank policy only.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from mtft.merge.linalg.core_space import CoreSpace
from mtft.merge.methods.base import CoreSpaceMethod


@dataclass(frozen=True)
class LinearMerge(CoreSpaceMethod):
    """sum w_k D_k, cut to the rank asked for."""

    def rule(self, core: CoreSpace) -> np.ndarray:
        return core.sum()


@dataclass(frozen=True)
class Cat(LinearMerge):
    """sum w_k D_k, nothing cut: the rank is what the sum has."""

    default_rank: ClassVar[str] = "lossless"


@dataclass(frozen=True)
class Svd(LinearMerge):
    """sum w_k D_k, best approximation of the rank asked for (Eckart & Young)."""
