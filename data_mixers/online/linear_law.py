"""linear_law: how training on one task lowers the others' held-out losses, measured in every round (Aioli, Chen et al.,
arXiv 2411.05735)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np

from data_mixers.mixture.bounds import Bounds
from data_mixers.mixture.mixture import Floats
from data_mixers.online.rule import OnlineRule, bounded, lists_to_tuples
from data_mixers.plan.replanned import ReplannedPlan


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
        return cls((1 / tasks,) * tasks if shares is None else tuple(shares), h=h, eta=eta, ema=ema)

    @property
    def shares(self) -> Floats:
        return np.array(self.probabilities)

    def probes(self) -> Floats:
        """H [K, K]: row j is the mixture to train `lp_steps` on before noting column j of D."""
        K = len(self.probabilities)
        rest = (1 - self.h) / max(1, K - 1)
        return np.full((K, K), rest) + np.eye(K) * (self.h - rest)

    def law(self, D: Floats, H: Floats | None = None) -> Floats:
        """A [K, K] from D [K, K]: A_i solves H A_i = D_i. H [K, K]: what the probes really held, row j probe j; of the
        smallest norm where they can't be told apart. None: `probes()`."""
        D = np.asarray(D, dtype=np.float64)
        if H is None:
            return np.asarray(np.linalg.solve(self.probes(), D.T).T, dtype=np.float64)
        return np.asarray(np.linalg.lstsq(H, D.T, rcond=1e-3)[0].T, dtype=np.float64)

    def update(
        self, D: Floats, bounds: Bounds | None = None, *, normalize: bool = False, H: Floats | None = None
    ) -> Aioli:
        """D_ij = fall of the validation loss of i over the probe of j. normalize: shift by a negative minimum and
        divide by the sum, so that eta means the same early and late. H: as in `law`."""
        D = np.asarray(D, dtype=np.float64)
        if normalize:
            D = D - min(0.0, float(D.min()))
            D = D / max(float(D.sum()), 1e-300)
        pull, start, average = self.law(D, H).sum(axis=0), self.shares, self.average
        if self.ema is not None:
            pull = pull if average is None else (1 - self.ema) * pull + self.ema * np.array(average)
            start, average = np.full(len(pull), 1 / len(pull)), tuple(pull.tolist())
        logits = np.log(np.maximum(start, 1e-300)) + self.eta * pull
        p = np.exp(logits - logits.max())
        return replace(self, probabilities=bounded(p / p.sum(), bounds), average=average)


class LinearLaw(OnlineRule):
    """Aioli: rounds of `every` steps. The first K * probe_steps of a round play the smoothed one-hot mixtures in a
    random order, with the held-out losses (of the same rows in the whole round) taken before, between and after; then
    the law is solved, and what it says is played until the next round.

    The probes are steps of the run like others: nothing is rolled back. H is what they really held, so rounding and
    bounds are in the law. A loss that was not measured has no say. The steps before the first round play the mixture
    of the start; a round whose probes would not end before the run does is not begun.
    """

    def __init__(
        self,
        shares: Sequence[float],
        *,
        every: int,
        steps: int,
        warmup: int = 0,
        probe_steps: int = 5,
        probe_share: float = 0.75,
        eta: float = 0.5,
        ema: float | None = None,
        seed: int = 0,
    ) -> None:
        self.every, self.steps, self.warmup, self.probe_steps, self.seed = every, steps, warmup, probe_steps, seed
        self.open_K = np.asarray(shares) > 0  # tasks with a share
        self.tasks = int(self.open_K.sum())
        if self.tasks * probe_steps >= every:
            raise ValueError(f"{self.tasks} probes of {probe_steps} steps leave none of {every} to play the result")
        start = np.asarray(shares)[self.open_K]
        self.law = Aioli.start(self.tasks, h=probe_share, eta=eta, ema=ema, shares=start.tolist())
        self.before: list[float] = []  # held-out losses at the last look
        self.falls: dict[int, list[float]] = {}  # probed task -> fall of each loss
        self.held: dict[int, list[float]] = {}  # probed task -> what its probe held

    def _turn(self, step: int) -> int | None:
        """How many probes of this round are done; None: not between two probes, or in no round."""
        begin = step - step % self.every
        turn, rest = divmod(step - begin, self.probe_steps)
        if rest or turn > self.tasks or begin < max(1, self.warmup):
            return None
        return turn if begin + self.tasks * self.probe_steps < self.steps else None  # else nothing is left to play

    def due(self, step: int) -> bool:
        return self._turn(step) is not None

    def measures(self, step: int) -> int | None:
        return step - step % self.every

    def choose(self, step: int, chain: ReplannedPlan, bounds: Bounds, valid_K: Floats | None) -> Floats:
        turn = self._turn(step)
        if turn is None or valid_K is None:
            raise ValueError(f"nothing to choose after step {step}")
        begin = step - step % self.every
        order = np.random.default_rng([self.seed, begin]).permutation(self.tasks).tolist()
        valid = valid_K[self.open_K]
        if turn == 0:
            self.falls, self.held = {}, {}
        else:
            probed = order[turn - 1]
            amount_K = (chain.amounts(step) - chain.amounts(step - self.probe_steps))[self.open_K]
            self.falls[probed] = (np.array(self.before) - valid).tolist()
            self.held[probed] = (amount_K / amount_K.sum()).tolist()
        self.before = valid.tolist()
        if turn < self.tasks:
            return self._all(self.law.probes()[order[turn]])
        D = np.array([self.falls[j] for j in range(self.tasks)]).T
        H = np.array([self.held[j] for j in range(self.tasks)])
        known = np.isfinite(D).all(axis=1, keepdims=True)
        self.law = self.law.update(np.where(known, D, 0.0), self._open(bounds), normalize=True, H=H)
        return self._all(self.law.shares)

    def _all(self, open_shares: Floats) -> Floats:
        out_K = np.zeros(len(self.open_K))
        out_K[self.open_K] = open_shares
        return out_K

    def _open(self, bounds: Bounds) -> Bounds:
        """The bounds of the tasks that have a share."""
        names = tuple(name for name, is_open in zip(bounds.names or (), self.open_K, strict=True) if is_open)
        floors, caps = ({name: limits[name] for name in names} for limits in (bounds.floors, bounds.caps))
        groups = (replace(group, members=tuple(m for m in group.members if m in names)) for group in bounds.groups)
        return Bounds(floors, caps, tuple(groups), names=names)

    def state(self) -> dict[str, Any]:
        falls, held = ([[j, values] for j, values in of.items()] for of in (self.falls, self.held))
        return {"law": asdict(self.law), "before": self.before, "falls": falls, "held": held}

    def restore(self, state: Mapping[str, Any]) -> None:
        self.law, self.before = Aioli(**lists_to_tuples(state["law"])), list(state["before"])
        self.falls, self.held = ({int(j): values for j, values in state[key]} for key in ("falls", "held"))
