"""PlanChain: a plan whose mixture is changed while it is played, still a pure function of (changes, index).

What is known before the run belongs into a MixtureSchedule: its plan looks ahead, and keeps every task within one row
of its share at every step. A chain is for what nobody knows before (online.py decides at step s): the remaining steps
are planned anew, with the visits made so far as their start and with what the old plan still owed each task, so no
row comes twice before its epoch ends, rounding errors do not add up over the changes, and epoch caps count over the
whole run. What is to come is checked against the caps as it stands: as if the newest mixture stayed to the end. Resume
needs the changes and one integer.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import Any

from .errors import MixError
from .mixture import Mixture
from .plan import MixturePlan, Rows
from .quota import Ints
from .schedule import MixtureSchedule


class PlanChain:
    """Starts as MixturePlan(mixture, sizes, steps=..., batch=..., seed=..., **options); `replan` changes the rest."""

    def __init__(
        self,
        mixture: Mixture | MixtureSchedule,
        sizes: Mapping[str, int],
        *,
        steps: int,
        batch: int,
        seed: int,
        **options: Any,
    ) -> None:
        self.steps, self._arguments = steps, {"batch": batch, "seed": seed, **options}
        self._sizes = sizes
        self.changes: list[tuple[int, MixturePlan]] = [(0, MixturePlan(mixture, sizes, steps=steps, **self._arguments))]

    def replan(self, at: int, mixture: Mixture | MixtureSchedule) -> None:
        """From step `at` (after the last change, before the end) on: another mixture, or a schedule of the rest."""
        last, plan = self.changes[-1]
        if not last < at < self.steps:
            raise MixError(f"a change at step {at}", do=f"after step {last} and before step {self.steps}")
        names = self.changes[0][1].names
        if isinstance(mixture, Mixture):
            mixture = mixture.over(names)
        elif mixture.names != names:
            mixture = MixtureSchedule(tuple((stop, shares.over(names)) for stop, shares in mixture.stops))
        start_K = plan.start_K + plan.counts(at - last)
        rest = MixturePlan(
            mixture,
            self._sizes,
            steps=self.steps - at,
            start=start_K.tolist(),
            carry=None if plan.unit == "tokens" else plan.owed(at - last).tolist(),
            **self._arguments,
        )
        self.changes.append((at, rest))

    def _at(self, s: int) -> tuple[MixturePlan, int]:
        if not 0 <= s < self.steps:
            raise IndexError(f"step {s} of {self.steps}")
        first, plan = next((first, plan) for first, plan in reversed(self.changes) if first <= s)
        return plan, s - first

    def step(self, s: int, rank: int = 0, world: int = 1) -> Rows:
        """As MixturePlan.step."""
        plan, inside = self._at(s)
        return plan.step(inside, rank, world)

    def counts(self, s: int) -> Ints:
        """Rows of each task [K] before step s."""
        plan, inside = self._at(s) if s < self.steps else (self.changes[-1][1], self.changes[-1][1].steps)
        return plan.start_K + plan.counts(inside)

    @property
    def fingerprint(self) -> str:
        """SHA-256 over the changes' first steps and plans."""
        text = "".join(f"{first}:{plan.fingerprint};" for first, plan in self.changes)
        return hashlib.sha256(text.encode()).hexdigest()

    def state(self, step: int) -> dict[str, Any]:
        """JSON-serialisable: the changes so far, and the step."""
        changes = [
            [first, [[at, mixture.as_dict()] for at, mixture in plan.schedule.stops]]
            if plan.schedule is not None
            else [first, plan.mixture.as_dict()]
            for first, plan in self.changes
        ]
        return {"step": int(step), "changes": changes, "fingerprint": self.fingerprint}

    @classmethod
    def resume(cls, state: Mapping[str, Any], sizes: Mapping[str, int], **arguments: Any) -> tuple[PlanChain, int]:
        """(the chain, the step to go on with); MixError where the other arguments give another order."""

        def read(shares: Any) -> Mixture | MixtureSchedule:
            if isinstance(shares, Mapping):
                return Mixture.of(shares)
            return MixtureSchedule(tuple((at, Mixture.of(mixture)) for at, mixture in shares))

        (_, first), *changes = state["changes"]
        chain = cls(read(first), sizes, **arguments)
        for at, shares in changes:
            chain.replan(int(at), read(shares))
        if chain.fingerprint != state["fingerprint"]:
            raise MixError(
                "the checkpoint was made with another plan",
                do="use the same tasks, sizes, steps, batch and seed; or start over",
            )
        return chain, int(state["step"])
