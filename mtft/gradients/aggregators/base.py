"""What an aggregator is given and gives: the Gram matrix of the task gradients -> one number a task.

    G_ij = <g_i, g_j>          d = sum_k alpha_k g_k = J^T alpha        the direction that is followed (downhill: -d)

An aggregator sees inner products only, so it costs the same for any model (sam_gs can ask for more). float64 on the
CPU, the same on all ranks.
p_k, the user's preference, adds up to 1; what it does to a method stands in the method's file.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import InitVar, dataclass
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from mtft.common.errors import UserError
from mtft.gradients.gramian import combine
from mtft.recipe.method_options import check_options


@dataclass(eq=False)
class Aggregator(ABC):
    """Base of all aggregators. A subclass declares its options as dataclass fields and writes `solve`.

    seed   of the methods that draw
    where  the recipe's key that the options stand under, for error messages
    """

    seed: InitVar[int] = 0
    where: InitVar[str] = "loss.gradients.options"
    NAME: ClassVar[str]

    def __post_init__(self, seed: int, where: str) -> None:
        self.draw_seed, self._where = seed, where
        check_options(self, where)

    @property
    def from_gram(self) -> bool:
        """Whether inner products are all that the method needs, as for all but one of them."""
        return True

    def check_from_gram(self, why: str) -> None:
        """UserError where this method, with these options, needs the gradients themselves. why: they can't be had."""
        if not self.from_gram:
            raise UserError(
                f"{self.NAME} with these options needs the gradients of every step themselves: {why}",
                where=self._where,
                do=f"leave the options of {self.NAME} out, or set loss.gradients.aggregator without flat",
            )

    @abstractmethod
    def solve(self, gram: np.ndarray, p: np.ndarray, step: int) -> np.ndarray:
        """alpha of P present tasks. gram: [P, P] symmetric, finite, not all 0; p: > 0, adds up to 1."""

    def weights(self, gram_KK: Tensor, p_K: Tensor | None = None, *, step: int = 0) -> Tensor:
        """alpha_K, float64. `step` seeds the methods that draw.

        gram_KK  [K, K]; a task whose own entry is NaN or infinite is absent: alpha 0. An unknown product of two
                 present tasks counts as 0.
        p_K      the user's preference, any positive scale (None: equal). A task with 0 takes no part: alpha 0.
        Where all gradients are 0, alpha = p.
        """
        gram = gram_KK.detach().double().cpu().numpy()
        K = len(gram)
        p = np.ones(K) if p_K is None else p_K.detach().double().cpu().numpy()
        if gram.shape != (K, K) or p.shape != (K,):
            raise ValueError(f"Gram matrix {gram.shape}, preference {p.shape}: expected [K, K] and [K]")
        if not (np.isfinite(p) & (p >= 0)).all():
            raise ValueError(f"the preference must be finite and >= 0, got {p.tolist()}")
        present = np.flatnonzero(np.isfinite(np.diag(gram)) & (p > 0))
        alpha = np.zeros(K)
        if len(present):
            part = np.nan_to_num(gram[np.ix_(present, present)], nan=0.0, posinf=0.0, neginf=0.0)
            part, share = (part + part.T) / 2, p[present] / p[present].sum()
            alpha[present] = self.solve(part, share, step) if np.diag(part).max() > 0 else share
        return torch.from_numpy(alpha)

    def direction(
        self, jacobian: Mapping[str, Tensor], gram_KK: Tensor, p_K: Tensor, *, step: int = 0
    ) -> tuple[dict[str, Tensor], Tensor]:
        """(d by parameter, alpha_K), of the gradients themselves: d = J^T alpha, or alpha is NaN.

        jacobian: {parameter: [K, *shape]}, rows of absent tasks ignored; the rest as in `weights`.
        """
        alpha_K = self.weights(gram_KK, p_K, step=step)
        return combine(jacobian, alpha_K), alpha_K

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint needs. `weights` gives the same alpha for the same (G, p, step), so mostly the name."""
        return {"aggregator": self.NAME}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from `state_dict()`; refuses the state of another method."""
        if state["aggregator"] != self.NAME:
            raise UserError(
                f"the checkpoint was written with aggregator {state['aggregator']}, the recipe asks for {self.NAME}",
                where="loss.gradients.aggregator",
                do="go back to that one, or start over with --fresh",
            )


def lengths(gram: np.ndarray) -> np.ndarray:
    """|g_k|."""
    return np.sqrt(np.diag(gram).clip(min=0))


def cosines(gram: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(C, |g|): G with unit rows, and their lengths. A zero gradient has cosine 0 with everything, itself included.

    Methods that work on C don't lose a task whose gradient is 1e10 times smaller than another's.
    """
    length = lengths(gram)
    inverse = np.where(length > 0, 1 / np.where(length > 0, length, 1), 0)
    return gram * inverse[:, None] * inverse[None, :], length


def root(gram: np.ndarray) -> np.ndarray:
    """R with R^T R = G, [P, P]: columns that have the inner products of the gradients."""
    cosine, length = cosines(gram)
    value, vector = np.linalg.eigh(cosine)
    return np.sqrt(value.clip(min=0))[:, None] * vector.T * length


def even_out(gram: np.ndarray, alpha: np.ndarray) -> np.ndarray:
    """Tasks with one and the same gradient share its alpha evenly: the direction stays, a tie has no winner."""
    square = np.diag(gram)
    apart = square[:, None] + square[None, :] - 2 * gram  # |g_i - g_j|^2
    same = apart <= 1e-12 * np.maximum(square[:, None], square[None, :])
    return same @ alpha / same.sum(axis=1)
