"""bandit: EXP3 with the training loss as reward (ODM, Albalak et al., arXiv 2312.02406): what is still hard is drawn
more."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np

from data_mixers.mixture.bounds import Bounds
from data_mixers.mixture.mixture import Floats
from data_mixers.online.rule import PeriodicRule, bounded, lists_to_tuples
from data_mixers.plan.replanned import ReplannedPlan


@dataclass(frozen=True)
class OnlineBandit:
    """ODM: EXP3 with the training loss as reward, so that what is still hard is drawn more.

    R_k += (loss / 10) / p_k for the sampled k;   eps_t = min(1/K, sqrt(ln K / (K t))), eps_0 = 1/K
    p = (1 - K eps_t) softmax(eps_{t-1} R) + eps_t

    The paper draws one task a step, with probability p_k. A step that holds rows of several tasks, of task k a part
    n_k / G, is so many draws of weight 1/G: R_k += (loss / 10) (n_k / G) / p_k, where p is what the step was drawn by
    (`drawn`). Both add loss / 10 to R_k on average.
    """

    rewards: tuple[float, ...]
    probabilities: tuple[float, ...]
    t: int = 0
    scale: float = 10.0

    @classmethod
    def start(cls, tasks: int, *, scale: float = 10.0) -> OnlineBandit:
        """Uniform; scale: what a loss is divided by."""
        return cls((0.0,) * tasks, (1 / tasks,) * tasks, scale=scale)

    @property
    def shares(self) -> Floats:
        return np.array(self.probabilities)

    def epsilon(self, t: int) -> float:
        """Exploration at step t."""
        K = len(self.rewards)
        return 1 / K if t == 0 else min(1 / K, math.sqrt(math.log(K) / (K * t)))

    def update(
        self, losses: Mapping[int, float], bounds: Bounds | None = None, *, drawn: Sequence[float] | None = None
    ) -> OnlineBandit:
        """losses: {task: mean training loss} of the tasks that were drawn in this step.

        drawn: each task's part of the step's rows by the share that it was drawn with, [K]; None: one draw a task, with
        the present probabilities.
        """
        reward = np.array(self.rewards)
        weight = 1 / np.array(self.probabilities) if drawn is None else np.asarray(drawn)
        for task, loss in losses.items():
            reward[task] += loss / self.scale * weight[task]
        t, K = self.t + 1, len(reward)
        logits = self.epsilon(t - 1) * reward
        soft = np.exp(logits - logits.max())
        p = (1 - K * self.epsilon(t)) * soft / soft.sum() + self.epsilon(t)
        return replace(self, rewards=tuple(reward.tolist()), probabilities=bounded(p, bounds), t=t)


class Bandit(PeriodicRule):
    """ODM: every step is a draw; the shares follow every `every` steps."""

    def __init__(self, tasks: int, *, every: int, scale: float = 10.0) -> None:
        super().__init__(every)
        self.bandit = OnlineBandit.start(tasks, scale=scale)

    def see(self, loss_K: Floats, drawn_K: Floats) -> None:
        self.seen += 1
        present = np.flatnonzero(np.isfinite(loss_K))
        self.bandit = self.bandit.update({int(k): float(loss_K[k]) for k in present}, drawn=drawn_K.tolist())

    def choose(self, step: int, chain: ReplannedPlan, bounds: Bounds, valid_K: Floats | None) -> Floats:
        return self.bandit.shares

    def state(self) -> dict[str, Any]:
        return {"seen": self.seen, "bandit": asdict(self.bandit)}

    def restore(self, state: Mapping[str, Any]) -> None:
        self.seen, self.bandit = state["seen"], OnlineBandit(**lists_to_tuples(state["bandit"]))
