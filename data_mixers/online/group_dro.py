"""group_dro: exponentiated gradient on the excess over reference losses (DoReMi, Xie et al., arXiv 2305.10429; group
DRO, Sagawa et al., ICLR 2020, arXiv 1911.08731)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np

from data_mixers.mixture.bounds import Bounds
from data_mixers.mixture.mixture import Floats
from data_mixers.online.rule import PeriodicRule, bounded, lists_to_tuples
from data_mixers.plan.replanned import ReplannedPlan


@dataclass(frozen=True)
class DoReMi:
    """Group DRO on the excess loss over a reference model.

        log a <- log a + eta score,  score_k = mean over the domain's tokens of max(proxy - reference loss, 0)
        a <- a / sum a,   a <- (1 - eps) a + eps / K;    the result is the mean of a over all steps

    eta = 1, eps = 1e-4 as in the released code. An absent domain (NaN) keeps its last score.
    """

    alpha: tuple[float, ...]
    scores: tuple[float, ...]
    total: tuple[float, ...]  # sum of alpha over the steps
    steps: int = 0
    eta: float = 1.0
    epsilon: float = 1e-4

    @classmethod
    def start(cls, shares: Sequence[float], *, eta: float = 1.0, epsilon: float = 1e-4) -> DoReMi:
        """alpha = shares (the paper starts from uniform)."""
        zeros = (0.0,) * len(shares)
        return cls(tuple(float(share) for share in shares), zeros, zeros, eta=eta, epsilon=epsilon)

    @property
    def shares(self) -> Floats:
        """Mean of alpha over the steps so far: what the large run uses."""
        return np.array(self.alpha) if self.steps == 0 else np.array(self.total) / self.steps

    def update(self, excess: Sequence[float], bounds: Bounds | None = None) -> DoReMi:
        """excess [K]: mean clipped excess loss of each domain; NaN = absent from this step."""
        seen = np.asarray(excess, dtype=np.float64)
        score = np.where(np.isfinite(seen), np.maximum(seen, 0.0), self.scores)
        logits = np.log(np.maximum(self.alpha, 1e-300)) + self.eta * score
        alpha = np.exp(logits - logits.max())
        alpha = (1 - self.epsilon) * alpha / alpha.sum() + self.epsilon / len(alpha)
        alpha = np.array(bounded(alpha, bounds))
        total = np.array(self.total) + alpha
        return replace(
            self,
            alpha=tuple(alpha.tolist()),
            scores=tuple(score.tolist()),
            total=tuple(total.tolist()),
            steps=self.steps + 1,
        )


class GroupDRO(PeriodicRule):
    """DoReMi's rule, once every `every` steps, on the mean excess of their training losses over `reference_K`.

    The shares follow alpha itself, as in group DRO (Sagawa et al., ICLR 2020); DoReMi's own result, the mean of alpha
    over the steps, is about what the whole run has played.
    """

    def __init__(
        self,
        shares: Sequence[float],
        reference_K: Sequence[float],
        *,
        every: int,
        eta: float = 1.0,
        smoothing: float = 1e-4,
    ) -> None:
        super().__init__(every)
        self.dro = DoReMi.start(shares, eta=eta, epsilon=smoothing)
        self.reference_K = np.asarray(reference_K, dtype=np.float64)
        self._clear()

    def _clear(self) -> None:
        self.seen, self.sum_K = 0, np.zeros(len(self.reference_K))
        self.count_K = np.zeros(len(self.reference_K), dtype=np.int64)

    def see(self, loss_K: Floats, drawn_K: Floats) -> None:
        present_K = np.isfinite(loss_K)
        self.seen += 1
        self.sum_K += np.where(present_K, loss_K, 0.0)
        self.count_K += present_K

    def choose(self, step: int, chain: ReplannedPlan, bounds: Bounds, valid_K: Floats | None) -> Floats:
        with np.errstate(invalid="ignore"):
            mean_K = self.sum_K / self.count_K  # 0/0: absent
        self.dro = self.dro.update((mean_K - self.reference_K).tolist(), bounds)
        self._clear()
        return np.array(self.dro.alpha)

    def state(self) -> dict[str, Any]:
        seen = {"seen": self.seen, "sum": self.sum_K.tolist(), "count": self.count_K.tolist()}
        return {**seen, "dro": asdict(self.dro)}

    def restore(self, state: Mapping[str, Any]) -> None:
        self.seen, self.dro = state["seen"], DoReMi(**lists_to_tuples(state["dro"]))
        self.sum_K, self.count_K = np.array(state["sum"]), np.array(state["count"], dtype=np.int64)
