"""The methods of a mixture that changes online, as a run asks them: what they look at, when, and what they want.

    bandit      EXP3 with the training loss as reward (ODM, arXiv 2312.02406): what is still hard is drawn more
    group_dro   exponentiated gradient on the excess over reference losses (DoReMi, arXiv 2305.10429)
    linear_law  how training on one task lowers the others' held-out losses, measured in every round (Aioli, 2411.05735)

The rules themselves are in online.py, what surrounds them in deciding.py. What a method wants follows from what it was
told alone.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

import numpy as np

from data_mixers.mixture.bounds import Bounds
from data_mixers.mixture.mixture import Floats
from data_mixers.online.update_rules import Aioli, DoReMi, OnlineBandit
from data_mixers.plan.replanned import ReplannedPlan


class _Periodic:
    """Decides every `every` steps, as soon as something was seen."""

    def __init__(self, every: int) -> None:
        self.every, self.seen = every, 0

    def due(self, step: int) -> bool:
        return step % self.every == 0 and self.seen > 0

    def measures(self, step: int) -> int | None:
        return None


class Bandit(_Periodic):
    """ODM: every step is a draw; the shares follow every `every` steps."""

    def __init__(self, tasks: int, *, every: int, scale: float = 10.0) -> None:
        super().__init__(every)
        self.bandit = OnlineBandit.start(tasks, scale=scale)

    def see(self, loss_K: Floats, drawn_K: Floats) -> None:
        self.seen += 1
        present = np.flatnonzero(np.isfinite(loss_K))
        self.bandit = self.bandit.update({int(k): float(loss_K[k]) for k in present}, drawn=drawn_K.tolist())

    def choose(self, step: int, chain: ReplannedPlan, bounds: Bounds, valid_K: Floats | None) -> Floats | None:
        return self.bandit.shares

    def state(self) -> dict[str, Any]:
        return {"seen": self.seen, "bandit": asdict(self.bandit)}

    def restore(self, state: Mapping[str, Any]) -> None:
        self.seen, self.bandit = state["seen"], OnlineBandit(**_tuples(state["bandit"]))


class GroupDRO(_Periodic):
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

    def choose(self, step: int, chain: ReplannedPlan, bounds: Bounds, valid_K: Floats | None) -> Floats | None:
        with np.errstate(invalid="ignore"):
            mean_K = self.sum_K / self.count_K  # 0/0: absent
        self.dro = self.dro.update((mean_K - self.reference_K).tolist(), bounds)
        self._clear()
        return np.array(self.dro.alpha)

    def state(self) -> dict[str, Any]:
        seen = {"seen": self.seen, "sum": self.sum_K.tolist(), "count": self.count_K.tolist()}
        return {**seen, "dro": asdict(self.dro)}

    def restore(self, state: Mapping[str, Any]) -> None:
        self.seen, self.dro = state["seen"], DoReMi(**_tuples(state["dro"]))
        self.sum_K, self.count_K = np.array(state["sum"]), np.array(state["count"], dtype=np.int64)


class LinearLaw:
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

    def see(self, loss_K: Floats, drawn_K: Floats) -> None:
        """Training losses don't count."""

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

    def choose(self, step: int, chain: ReplannedPlan, bounds: Bounds, valid_K: Floats | None) -> Floats | None:
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
        self.law = self.law.update(np.where(known, D, 0.0), self._open(bounds), normalise=True, H=H)
        return self._all(self.law.shares)

    def _all(self, open_shares: Floats) -> Floats:
        out_K = np.zeros(len(self.open_K))
        out_K[self.open_K] = open_shares
        return out_K

    def _open(self, bounds: Bounds) -> Bounds:
        """The bounds of the tasks that have a share."""
        names = tuple(name for name, is_open in zip(bounds.names or (), self.open_K, strict=True) if is_open)
        floors = {name: bounds.floors[name] for name in names}
        caps = {name: bounds.caps[name] for name in names}
        groups = tuple(
            type(group)(group.name, tuple(m for m in group.members if m in names), group.low, group.high)
            for group in bounds.groups
        )
        return Bounds(floors, caps, groups, names=names)

    def state(self) -> dict[str, Any]:
        falls, held = ([[j, values] for j, values in of.items()] for of in (self.falls, self.held))
        return {"law": asdict(self.law), "before": self.before, "falls": falls, "held": held}

    def restore(self, state: Mapping[str, Any]) -> None:
        self.law, self.before = Aioli(**_tuples(state["law"])), list(state["before"])
        self.falls, self.held = ({int(j): values for j, values in state[key]} for key in ("falls", "held"))


def _tuples(state: Mapping[str, Any]) -> dict[str, Any]:
    return {key: tuple(value) if isinstance(value, list) else value for key, value in state.items()}
