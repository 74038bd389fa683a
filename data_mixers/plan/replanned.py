"""ReplannedPlan: a plan whose mixture is changed while it is played, still a pure function of (changes, index).

What is known before the run belongs into a MixtureSchedule: its plan looks ahead, and keeps every task within one row
of its share at every step. A ReplannedPlan is for what nobody knows before (online/controller.py decides at step s):
the remaining steps are planned anew, with the visits made so far as their start and with what the old plan still owed
each task, so no row comes twice before its epoch ends, rounding errors do not add up over the changes, and epoch caps
count over the whole run. What is to come is checked against the caps as it stands: as if the newest mixture stayed to
the end. Resume needs the changes and one integer.
"""

from __future__ import annotations

import hashlib
import json
from bisect import bisect_right
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np

from data_mixers.common.errors import MixError
from data_mixers.mixture.mixture import Floats, Mixture
from data_mixers.plan.mixture_plan import MixturePlan
from data_mixers.plan.plan_spec import Rows
from data_mixers.plan.quota import Ints
from data_mixers.plan.realized import realized_table
from data_mixers.plan.schedule import MixtureSchedule

CACHED_PLANS = 2  # of the last changes; an older one is made again when it is asked for
MARGIN = 1e-8  # by which `room` stays below what is left: shares are exact to 1e-9


class PlanChange(NamedTuple):
    """From step `first` on: `shares`, and where its plan starts: visits made, amounts (in the unit) played and owed
    (None: unknown) of each task [K]."""

    first: int
    shares: Mixture | MixtureSchedule
    start: tuple[int, ...]
    played: tuple[int, ...]
    carry: tuple[float, ...] | None


class ReplannedPlan:
    """Starts as MixturePlan(mixture, sizes, steps=..., batch=..., seed=..., **options); `replan` changes the rest."""

    def __init__(
        self,
        mixture: Mixture | MixtureSchedule,
        sizes: Mapping[str, int] | Sequence[int],
        *,
        steps: int,
        batch: int,
        seed: int,
        **options: Any,
    ) -> None:
        self.steps, self.batch, self.names = steps, batch, mixture.names
        self._arguments = {"batch": batch, "seed": seed, **options}
        self._sizes = sizes
        self._plans: OrderedDict[int, MixturePlan] = OrderedDict()
        nothing = (0,) * len(self.names)
        self.changes = [PlanChange(0, mixture, nothing, nothing, None)]
        first = self._plan(0)
        self.unit, self.style, self.size_K = first.unit, first.style, first.size_K

    def replan(self, at: int, mixture: Mixture | MixtureSchedule) -> None:
        """From step `at` (after the last change, before the end) on: another mixture, or a schedule of the rest.

        MixError where it asks for more epochs than are left (on_cap "error"); the plan then stays as it was.
        """
        last, plan = self.changes[-1].first, self._plan(-1)
        if not last < at < self.steps:
            raise MixError(f"a change at step {at}", do=f"after step {last} and before step {self.steps}")
        if isinstance(mixture, Mixture):
            mixture = mixture.over(self.names)
        elif mixture.names != self.names:
            mixture = MixtureSchedule(tuple((stop, shares.over(self.names)) for stop, shares in mixture.stops))
        start_K = plan.start_K + plan.counts(at - last)
        played_K = np.array(self.changes[-1].played) + plan.amounts(at - last)
        by_tokens = isinstance(mixture, Mixture) and plan.schedule is None and plan.style == "mixed"
        known = plan.unit == "examples" or by_tokens  # whether there is an account of what is owed, and a use for it
        carry = tuple(plan.owed(at - last).tolist()) if known else None
        change = PlanChange(at, mixture, tuple(start_K.tolist()), tuple(played_K.tolist()), carry)
        new_plan = self._make(change)  # before anything is noted: it may refuse
        self.changes.append(change)
        self._cache(len(self.changes) - 1, new_plan)

    def room(self, at: int) -> Floats:
        """The largest share [K] that each task can have from step `at` on under its epoch cap (1: no cap binds).

        Shares within it are never refused by `replan(at, ...)`. Not for unit "tokens" with caps: ValueError.
        """
        change, plan = self.changes[-1], self._plan(-1)
        if np.isinf(plan.max_visits_K).all():
            return np.ones(len(self.names))
        if plan.unit == "tokens":
            raise ValueError("a plan by tokens keeps no account of the rows that are left")
        seat = plan.batch if plan.style == "alternating" else 1
        inside = at - change.first
        left_K = np.floor((plan.max_visits_K - plan.start_K - plan.counts(inside)) / seat)
        free_K = left_K - np.maximum(plan.owed(inside), 0) / seat
        total = (self.steps - at) * (self.batch // seat)
        return np.clip(free_K / total * (1 - MARGIN), 0.0, 1.0)

    def _make(self, change: PlanChange) -> MixturePlan:
        steps = self.steps - change.first
        return MixturePlan(
            change.shares, self._sizes, steps=steps, start=change.start, carry=change.carry, **self._arguments
        )

    def _plan(self, number: int) -> MixturePlan:
        """The plan of one of the changes."""
        number %= len(self.changes)
        if number not in self._plans:
            self._cache(number, self._make(self.changes[number]))
        return self._plans[number]

    def _cache(self, number: int, plan: MixturePlan) -> None:
        self._plans[number] = plan
        while len(self._plans) > CACHED_PLANS:
            self._plans.popitem(last=False)

    def _at(self, s: int) -> tuple[PlanChange, MixturePlan, int]:
        """The change in whose part step s is, its plan, and which step of that plan it is."""
        if not 0 <= s <= self.steps:
            raise IndexError(f"step {s} of {self.steps}")
        number = bisect_right(self.changes, s, key=lambda change: change.first) - 1
        change = self.changes[number]
        return change, self._plan(number), s - change.first

    def step(self, s: int, rank: int = 0, world: int = 1) -> Rows:
        """As MixturePlan.step."""
        if s == self.steps:
            raise IndexError(f"step {s} of {self.steps}")
        _, plan, inside = self._at(s)
        return plan.step(inside, rank, world)

    def counts(self, s: int) -> Ints:
        """Rows of each task [K] before step s."""
        _, plan, inside = self._at(s)
        return plan.start_K + plan.counts(inside)

    # ---- what it amounts to

    @property
    def schedule(self) -> MixtureSchedule | None:
        """As MixturePlan.schedule, as long as nothing has changed."""
        shares = self.changes[0].shares
        return shares if isinstance(shares, MixtureSchedule) and len(self.changes) == 1 else None

    @property
    def mixture(self) -> Mixture:
        """The shares that were asked for, on average over the steps."""
        if len(self.changes) == 1:
            return self._plan(0).mixture
        total_K = np.zeros(len(self.names))
        ends = [change.first for change in self.changes[1:]] + [self.steps]
        for (first, shares, *_), end in zip(self.changes, ends, strict=True):
            mean = shares.mean(end - first) if isinstance(shares, MixtureSchedule) else shares
            total_K += mean.shares * ((end - first) / self.steps)
        return Mixture(self.names, total_K)

    def amounts(self, s: int) -> Ints:
        """As MixturePlan.amounts, for s = 0, a change, or a step after the last one."""
        change, plan, inside = self._at(s)
        return np.array(change.played, dtype=np.int64) + plan.amounts(inside)

    def table(self) -> list[dict[str, Any]]:
        """As MixturePlan.table: asked on average over the steps, and what comes of it as things stand."""
        return realized_table(self)

    # ---- resume

    @cached_property
    def _beginning(self) -> str:
        return self._plan(0).fingerprint

    @property
    def fingerprint(self) -> str:
        """SHA-256 over the first plan's and all changes."""
        return self._fingerprint([_written(change) for change in self.changes])

    def _fingerprint(self, changes: list[list[Any]]) -> str:
        return hashlib.sha256((self._beginning + json.dumps(changes)).encode()).hexdigest()

    def state(self, step: int) -> dict[str, Any]:
        """JSON-serialisable: the changes so far, and the step."""
        changes = [_written(change) for change in self.changes]
        return {"step": int(step), "changes": changes, "fingerprint": self._fingerprint(changes)}

    def restore(self, state: Mapping[str, Any]) -> int:
        """Takes up the changes of `state`; returns the step to go on with. For a plan that was begun as that one was.

        MixError where this plan's arguments give another order; it then stays as it was.
        """
        changes = [_read(change) for change in state["changes"]]
        same_names = all(change.shares.names == self.names for change in changes)
        if not same_names or self._fingerprint([_written(change) for change in changes]) != state["fingerprint"]:
            raise MixError(
                "the checkpoint was made with another plan",
                do="use the same tasks, sizes, steps, batch and seed; or start over",
            )
        self.changes = changes
        self._plans.clear()
        return int(state["step"])


def _written(change: PlanChange) -> list[Any]:
    shares = change.shares
    if isinstance(shares, MixtureSchedule):
        written = [[at, mixture.as_dict()] for at, mixture in shares.stops]
    else:
        written = shares.as_dict()
    carry = None if change.carry is None else list(change.carry)
    return [change.first, written, list(change.start), list(change.played), carry]


def _read(written: Sequence[Any]) -> PlanChange:
    first, shares, start, played, carry = written
    if isinstance(shares, Mapping):
        mixture = Mixture.of(shares)
    else:
        mixture = MixtureSchedule(tuple((at, Mixture.of(stop)) for at, stop in shares))
    return PlanChange(int(first), mixture, tuple(start), tuple(played), None if carry is None else tuple(carry))
