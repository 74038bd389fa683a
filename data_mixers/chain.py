"""PlanChain: a plan whose mixture changes at given steps, still a pure function of (segments, index).

At a boundary the remaining steps are planned anew from the new shares, with the visits made so far as their start: no
row comes twice before its epoch ends, and epoch caps count over the whole run. A curriculum is a chain written before
the run; an online mixer (online.py) adds a segment whenever it decides. Resume needs the segments and one integer.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from typing import Any

from .errors import MixError
from .mixture import Mixture
from .plan import MixturePlan, Rows
from .quota import Ints


class PlanChain:
    """Segments [(first step, mixture), ...] over `steps` steps; the other arguments are MixturePlan's."""

    def __init__(
        self,
        segments: Sequence[tuple[int, Mixture]],
        sizes: Mapping[str, int],
        *,
        steps: int,
        batch: int,
        seed: int,
        **options: Any,
    ) -> None:
        if not segments or segments[0][0] != 0:
            raise MixError("the first segment must start at step 0")
        self.steps, self._sizes, self._batch, self._seed, self._options = steps, sizes, batch, seed, options
        self.segments: list[tuple[int, Mixture]] = []
        self._plans: list[MixturePlan] = []
        for first, mixture in segments:
            self.replan(first, mixture)

    def replan(self, at: int, mixture: Mixture) -> None:
        """From step `at` (after the last boundary, before the end) on: another mixture of the same tasks."""
        start = None
        if self.segments:
            last = self.segments[-1][0]
            if not last < at < self.steps:
                raise MixError(f"a segment at step {at}", do=f"after step {last} and before step {self.steps}")
            mixture = mixture.over(self.segments[0][1].names)
            start = (self._plans[-1].start_K + self._plans[-1].counts(at - last)).tolist()
        self._plans.append(
            MixturePlan(
                mixture,
                self._sizes,
                steps=self.steps - at,
                batch=self._batch,
                seed=self._seed,
                start=start,
                **self._options,
            )
        )
        self.segments.append((at, mixture))

    def _at(self, s: int) -> tuple[MixturePlan, int]:
        if not 0 <= s < self.steps:
            raise IndexError(f"step {s} of {self.steps}")
        position = max(i for i, (first, _) in enumerate(self.segments) if first <= s)
        return self._plans[position], s - self.segments[position][0]

    def step(self, s: int, rank: int = 0, world: int = 1) -> Rows:
        """As MixturePlan.step."""
        plan, inside = self._at(s)
        return plan.step(inside, rank, world)

    def counts(self, s: int) -> Ints:
        """Rows of each task [K] before step s."""
        if s == self.steps:
            plan = self._plans[-1]
            return plan.start_K + plan.counts(plan.steps)
        plan, inside = self._at(s)
        return plan.start_K + plan.counts(inside)

    @property
    def fingerprint(self) -> str:
        """SHA-256 over the segments' first steps and plans."""
        text = "".join(
            f"{first}:{plan.fingerprint};" for (first, _), plan in zip(self.segments, self._plans, strict=True)
        )
        return hashlib.sha256(text.encode()).hexdigest()

    def state(self, step: int) -> dict[str, Any]:
        """JSON-serialisable: the segments so far, and the step."""
        segments = [[first, mixture.as_dict()] for first, mixture in self.segments]
        return {"step": int(step), "segments": segments, "fingerprint": self.fingerprint}

    @classmethod
    def resume(cls, state: Mapping[str, Any], sizes: Mapping[str, int], **arguments: Any) -> tuple[PlanChain, int]:
        """(the chain, the step to go on with); MixError where the other arguments give another order."""
        chain = cls([(int(first), Mixture.of(shares)) for first, shares in state["segments"]], sizes, **arguments)
        if chain.fingerprint != state["fingerprint"]:
            raise MixError(
                "the checkpoint was made with another plan",
                do="use the same tasks, sizes, steps, batch and seed; or start over",
            )
        return chain, int(state["step"])
