"""When a mixture that changes online does change, and to what: between a trainer, which tells losses, and a plan.

    after step s = 1, 2, ...:   decider.observe(s, losses, parts)
                                number = decider.measures(s)         # not None: held-out losses are wanted now
                                decision = decider.propose(s, held_out_losses)
                                decider.play(decision)               # from step index s (the next one) on

Nothing is drawn or timed here: the same losses give the same decisions, on any machine and after any restart. What a
method wants is rounded to 0.0001 first, so that the last bits of a sum over ranks don't count, then moved to the
nearest shares (in KL) that floors, caps, groups and the epochs that are left allow. The methods are in
bandit.py, group_dro.py and linear_law.py.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from data_mixers.mixture.bounds import Bounds, Infeasible
from data_mixers.mixture.mixture import Floats, Mixture
from data_mixers.online.rule import OnlineRule
from data_mixers.plan.replanned import ReplannedPlan

DIGITS = 4  # of the shares that a method wants
Losses = Sequence[float] | Floats  # [K], NaN = absent


class Decision(NamedTuple):
    """From step index `first` on. shares: what is played (None: goes on as before); wanted: what the method asked for;
    notes: what stood in its way, for people."""

    first: int
    shares: tuple[float, ...] | None
    wanted: tuple[float, ...]
    notes: tuple[str, ...]


class MixtureController:
    """Changes `chain` as `method` says, within `bounds` (no epoch caps: the chain knows them).

    warmup: steps at the start that no method sees. A task whose share is 0 at the start stays out. Infeasible where
    nothing is within the bounds.
    """

    def __init__(self, chain: ReplannedPlan, bounds: Bounds, method: OnlineRule, *, warmup: int = 0) -> None:
        self.chain, self.method, self.warmup = chain, method, warmup
        shares = chain.changes[0].shares
        if not isinstance(shares, Mixture):
            raise ValueError("a chain that begins with a schedule is not changed online")
        self._bounds = with_caps(bounds.over(chain.names), np.where(shares.shares > 0, 1.0, 0.0))
        self._bounds.check_feasible()
        # What is played, which differs from what is asked where epoch caps bind.
        self.playing = np.array([row["realised"] for row in chain.table()])

    def observe(self, step: int, loss_K: Losses, part_K: Losses) -> None:
        """The losses of step `step` (1, 2, ...), and each task's part of it (in the unit of the shares), over all
        ranks. A step that was skipped is not told."""
        if step <= self.warmup:
            return
        part_K = np.asarray(part_K, dtype=np.float64)
        drawn_K = np.divide(part_K, self.playing, out=np.zeros(len(part_K)), where=self.playing > 0)
        self.method.see(np.asarray(loss_K, dtype=np.float64), drawn_K)

    def due(self, step: int) -> bool:
        """Whether something may be decided after this step."""
        return self.warmup <= step < self.chain.steps and self.method.due(step)

    def measures(self, step: int) -> int | None:
        """Which rows to measure held-out losses on after this step; None: none."""
        return self.method.measures(step) if self.due(step) else None

    def propose(self, step: int, valid_K: Losses | None = None) -> Decision | None:
        """What to play from step index `step` on; None: nothing is decided after this step."""
        if not self.due(step):
            return None
        bounds, notes = self.bounds(step)
        valid = None if valid_K is None else np.asarray(valid_K, dtype=np.float64)
        wanted = _rounded(self.method.choose(step, self.chain, bounds, valid))
        shares = bounds.project(wanted)
        played = None if np.abs(shares - self.playing).max() < 0.5 * 10**-DIGITS else tuple(shares.tolist())
        if played is None and not notes:
            return None
        return Decision(step, played, tuple(wanted.tolist()), tuple(notes))

    def play(self, decision: Decision | None) -> None:
        """Changes the chain."""
        if decision is not None and decision.shares is not None:
            mixture = Mixture(self.chain.names, np.array(decision.shares))
            self.chain.replan(decision.first, mixture)
            self.playing = mixture.shares

    def bounds(self, step: int) -> tuple[Bounds, list[str]]:
        """What the shares from here on may be, and what had to give way: epoch caps are hard, floors are not.

        Where nothing is left, the shares of now: their plan was made to the end, within the epoch caps.
        """
        room_K, low_K = self.chain.room(step), self._bounds.lower()
        names = self.chain.names
        notes = [
            f"{names[k]} gets {room_K[k]:.4f}, less than its floor of {low_K[k]:.4f}: its max_epochs leave no more"
            for k in np.flatnonzero(low_K > room_K)
        ]
        bounds = with_caps(self._bounds, room_K)
        try:
            bounds.check_feasible()
        except Infeasible as error:
            now = dict(zip(names, self.playing.tolist(), strict=True))
            return Bounds(now, now, names=names), [*notes, f"the shares stay as they are: {error.what}"]
        return bounds, notes

    # ---- resume

    def state(self, step: int) -> dict[str, Any]:
        """JSON-serialisable; after step `step`, what was decided there included."""
        return {"chain": self.chain.state(step), "method": self.method.state(), "playing": self.playing.tolist()}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Goes on from `state`; MixError where it belongs to another plan."""
        self.chain.restore(state["chain"])
        self.method.restore(state["method"])
        self.playing = np.array(state["playing"])


def with_caps(bounds: Bounds, cap_K: Floats) -> Bounds:
    """The same bounds with no cap above cap_K; floors above it come down to it."""
    names = bounds.names or ()
    upper_K = np.minimum(bounds.upper(), cap_K)
    floors = dict(zip(names, np.minimum(bounds.lower(), upper_K).tolist(), strict=True))
    return Bounds(floors, dict(zip(names, upper_K.tolist(), strict=True)), bounds.groups, names=names)


def _rounded(shares: Floats) -> Floats:
    """To DIGITS digits; what is above 0 stays so."""
    rounded = np.where(shares > 0, np.maximum(np.round(shares, DIGITS), 10**-DIGITS), 0.0)
    return rounded / rounded.sum()
