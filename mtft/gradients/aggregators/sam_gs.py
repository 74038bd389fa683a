"""SAM-GS: gradients of unlike lengths are made equally long; gradients of like lengths are scaled by their momentum.

    psi_ij = 2 n_i n_j / (n_i^2 + n_j^2),  n_k = |g_k|;  Psi = mean of psi over the pairs i < j
    m_k <- .9 m_k + .1 g_k;   h <- .99 h + .01 (1 - Psi)^2      at every step; both corrected for their start as Adam's
    Psi < gamma:  d = sum_k p_k mean(n) / n_k g_k
    else:         d = sum_k p_k |m_k| * g_k / sqrt(h + 1e-6)        coordinate by coordinate

Borsani, Rosani, Nicosia & Di Fatta, "Gradient Similarity Surgery in Multi-Task Deep Learning" (arXiv 2506.06130). The
printed second branch is ambiguous; this is what the authors' code does (ThomBors/samgs), with its constants. It uses
gamma 0.7 on real data. Two things to know about the second branch: it needs the gradients themselves and a momentum of
each task (K x P numbers, in the checkpoint too), so it works at every step only, and its d goes with the square of the
gradients, so the step's length jumps where the branches change. Our default, gamma = 1, is the first branch alone.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar

import numpy as np
import torch
from pydantic import Field
from torch import Tensor

from mtft.gradients.aggregators.base import Aggregator, lengths
from mtft.gradients.gramian import combine

MOMENTUM, SPREAD, FLOOR = 0.9, 0.99, 1e-6  # of m; of h; below h


@dataclass(eq=False)
class SamGs(Aggregator):
    """`gamma`: from this similarity of lengths on the second branch is taken; 1 = never."""

    gamma: Annotated[float, Field(gt=0, le=1)] = 1.0
    NAME: ClassVar[str] = "sam_gs"

    def __post_init__(self, seed: int, where: str) -> None:
        super().__post_init__(seed, where)
        self.momentum: dict[str, Tensor] = {}  # m [K, *shape] by parameter, not corrected
        self.seen_K: Tensor | None = None  # steps in which each task was there
        self.spread, self.steps = 0.0, 0  # h, not corrected; steps with two tasks or more

    @property
    def from_gram(self) -> bool:
        return self.gamma >= 1

    def solve(self, gram: np.ndarray, p: np.ndarray, step: int) -> np.ndarray:
        length = lengths(gram)
        moved = length > 0
        return np.where(moved, p * length[moved].mean() / np.where(moved, length, 1), p)

    def direction(
        self, jacobian: Mapping[str, Tensor], gram_KK: Tensor, p_K: Tensor, *, step: int = 0
    ) -> tuple[dict[str, Tensor], Tensor]:
        alpha_K = self.weights(gram_KK, p_K, step=step)
        if self.from_gram:
            return combine(jacobian, alpha_K), alpha_K
        present_K = alpha_K > 0
        alike = similarity(gram_KK.diagonal()[present_K].clamp(min=0).sqrt().double().numpy())
        self._remember(jacobian, present_K, alike)
        if alike is None or alike < self.gamma:
            return combine(jacobian, alpha_K), alpha_K
        assert self.seen_K is not None
        share_K = torch.where(present_K, p_K.double(), 0.0)
        scale_K = share_K / share_K.sum() / (1 - MOMENTUM ** self.seen_K.clamp(min=1).double())
        scale_K = scale_K / math.sqrt(self.spread / (1 - SPREAD**self.steps) + FLOOR)
        modulated = {name: block * self.momentum[name].abs() for name, block in jacobian.items()}
        return combine(modulated, scale_K), torch.full_like(alpha_K, torch.nan)

    def _remember(self, jacobian: Mapping[str, Tensor], present_K: Tensor, alike: float | None) -> None:
        """An absent task keeps its momentum; a step with one task says nothing about lengths."""
        if alike is not None:
            self.spread, self.steps = SPREAD * self.spread + (1 - SPREAD) * (1 - alike) ** 2, self.steps + 1
        self.seen_K = present_K.long() if self.seen_K is None else self.seen_K + present_K
        for name, block in jacobian.items():
            old = self.momentum[name].to(block) if name in self.momentum else torch.zeros_like(block)
            is_present = present_K.to(block.device).reshape(-1, *[1] * (block.dim() - 1))
            self.momentum[name] = torch.where(is_present, MOMENTUM * old + (1 - MOMENTUM) * block, old)

    def state_dict(self) -> dict[str, Any]:
        own_state = {"momentum": dict(self.momentum), "seen": self.seen_K, "spread": self.spread, "steps": self.steps}
        return {**super().state_dict(), **own_state}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        super().load_state_dict(state)
        self.momentum, self.seen_K = dict(state["momentum"]), state["seen"]
        self.spread, self.steps = state["spread"], state["steps"]


def similarity(length: np.ndarray) -> float | None:
    """Psi of these lengths; two zero gradients are alike. None for fewer than two: there is nothing to compare."""
    if len(length) < 2:
        return None
    n = length / max(length.max(), 1e-300)
    above, below = 2 * np.outer(n, n), np.add.outer(n**2, n**2)
    psi = np.where(below > 0, above / np.where(below > 0, below, 1), 1)
    return float(psi[np.triu_indices(len(n), k=1)].mean())
