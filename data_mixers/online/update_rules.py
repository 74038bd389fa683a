"""Mixtures that change while training: pure state machines, `update(state, observations) -> state`, `state.shares`.

A state is a frozen dataclass of plain numbers (JSON through `dataclasses.asdict`), so it rides in a checkpoint; at a
boundary the plan of the following steps is made from the new shares, with the visits made so far as its `start`.
Floors and caps apply through Bounds.project. Static mixtures are the default: DoReMi and ODM scored below good static
mixtures in RegMix's table (45.0 to 46.8 against 47.3).

DoReMi (arXiv 2305.10429), ODM (arXiv 2312.02406), Aioli (arXiv 2411.05735); early drop is in early_drop.py. When they
are asked in a training run, and what becomes of their answer, is in deciding.py.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from data_mixers.mixture.bounds import Bounds
from data_mixers.mixture.mixture import Floats


def bounded(shares: Sequence[float], bounds: Bounds | None) -> tuple[float, ...]:
    """The nearest allowed shares in KL."""
    return tuple(np.asarray(shares).tolist() if bounds is None else bounds.project(np.asarray(shares)).tolist())


@dataclass(frozen=True)
class DoReMi:
    """Group DRO on the excess loss over a reference model.

        log a <- log a + eta score,  score_k = mean over the domain's tokens of max(proxy - reference loss, 0)
        a <- a / sum a,   a <- (1 - eps) a + eps / K;    the result is the mean of a over all steps

    eta = 1, eps = 1e-4 as in the released code. The proxy's loss weight of domain k is weights_k = a_k / sampling_k.
    An absent domain (NaN or missing) keeps its last score.
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

    def weights(self, sampling: Sequence[float]) -> Floats:
        """Loss weight of each domain [K] when it is drawn with share sampling_k."""
        return np.array(self.alpha) / np.asarray(sampling)

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


@dataclass(frozen=True)
class Aioli:
    """A linear law of how training on one task lowers the loss of another, measured every round.

    A round trains `lp_steps` on each task's smoothed one-hot mixture H_j (share h on j, the rest spread evenly) and
    notes D_ij = fall of loss i after it. A_i = H^-1 D_i, and p <- p exp(eta sum_i A_ij), normalised. With `ema` the
    sums are an exponential mean over rounds, and p restarts from uniform in each.
    """

    probabilities: tuple[float, ...]
    h: float = 0.75
    eta: float = 0.5
    ema: float | None = None
    lp_steps: int = 5
    average: tuple[float, ...] | None = None

    @classmethod
    def start(
        cls,
        tasks: int,
        *,
        h: float = 0.75,
        eta: float = 0.5,
        ema: float | None = None,
        shares: Sequence[float] | None = None,
    ) -> Aioli:
        """p = shares; None: uniform, as in the paper."""
        if not 1 / tasks < h <= 1:
            raise ValueError(f"h is {h}: the smoothed one-hot mixtures need 1/K < h <= 1")
        p = (1 / tasks,) * tasks if shares is None else tuple(float(share) for share in shares)
        return cls(p, h=h, eta=eta, ema=ema)

    @property
    def shares(self) -> Floats:
        return np.array(self.probabilities)

    def probes(self) -> Floats:
        """H [K, K]: row j is the mixture to train `lp_steps` on before noting column j of D."""
        K = len(self.probabilities)
        return np.full((K, K), (1 - self.h) / max(1, K - 1)) + np.eye(K) * (self.h - (1 - self.h) / max(1, K - 1))

    def law(self, D: Floats, H: Floats | None = None) -> Floats:
        """A [K, K] from D [K, K]: A_i solves H A_i = D_i. H [K, K]: what the probes really held, row j probe j; of the
        smallest norm where they can't be told apart. None: `probes()`."""
        D = np.asarray(D, dtype=np.float64)
        if H is None:
            return np.asarray(np.linalg.solve(self.probes(), D.T).T, dtype=np.float64)
        return np.asarray(np.linalg.lstsq(H, D.T, rcond=1e-3)[0].T, dtype=np.float64)

    def update(
        self, D: Floats, bounds: Bounds | None = None, *, normalise: bool = False, H: Floats | None = None
    ) -> Aioli:
        """D_ij = fall of the validation loss of i over the probe of j. normalise: shift by a negative minimum and
        divide by the sum, so that eta means the same early and late. H: as in `law`."""
        D = np.asarray(D, dtype=np.float64)
        if normalise:
            D = D - min(0.0, float(D.min()))
            D = D / max(float(D.sum()), 1e-300)
        pull, start, average = self.law(D, H).sum(axis=0), self.shares, self.average
        if self.ema is not None:
            pull = pull if average is None else (1 - self.ema) * pull + self.ema * np.array(average)
            start, average = np.full(len(pull), 1 / len(pull)), tuple(pull.tolist())
        logits = np.log(np.maximum(start, 1e-300)) + self.eta * pull
        p = np.exp(logits - logits.max())
        return replace(self, probabilities=bounded(p / p.sum(), bounds), average=average)
