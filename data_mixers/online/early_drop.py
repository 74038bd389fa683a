"""mSFT: small sets overfit while large ones still learn; drop each task when it has had its best.

Train on the active tasks for a budget, with the validation loss of every task at each checkpoint. The task whose best
checkpoint is earliest, and already past, is dropped; weights go back to that checkpoint, and the others go on. Repeat
until no task overfits (arXiv 2603.21606). Ties: the larger rise since the best. At least 3 evaluations per task.

Without going back it is "early drop": cheaper, the dropped task keeps the harm done since its best.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

from data_mixers.common.errors import MixError
from data_mixers.mixture.mixture import Mixture

MINIMUM_EVALUATIONS = 3


@dataclass(frozen=True)
class Decision:
    """What to do at the end of a budget: `drop` (None = go on or stop), the step to `rollback` to (None: stay)."""

    drop: str | None
    rollback: int | None


@dataclass(frozen=True)
class EarlyDrop:
    """State: shares of the active tasks, and their validation losses since the last drop, by step.

    patience: evaluations after the best that must all be worse by `minimum_rise` (relative). go_back: mSFT; else early
    drop.
    """

    mixture: Mixture
    active: tuple[str, ...]
    history: tuple[tuple[int, Mapping[str, float]], ...] = ()
    dropped: tuple[tuple[str, int], ...] = ()  # task, step of its best
    patience: int = 1
    minimum_rise: float = 0.0
    go_back: bool = True

    @classmethod
    def start(
        cls, mixture: Mixture, *, patience: int = 1, minimum_rise: float = 0.0, go_back: bool = True
    ) -> EarlyDrop:
        """All tasks with a share are active."""
        active = tuple(name for name, share in mixture.as_dict().items() if share > 0)
        return cls(mixture, active, patience=patience, minimum_rise=minimum_rise, go_back=go_back)

    @property
    def shares(self) -> Mixture:
        """The shares to train on: the active tasks', in their old proportions."""
        kept = {name: share if name in self.active else 0.0 for name, share in self.mixture.as_dict().items()}
        total = sum(kept.values())
        return Mixture.of({name: share / total for name, share in kept.items()})

    def observe(self, step: int, losses: Mapping[str, float]) -> EarlyDrop:
        """Add the validation losses at a checkpoint."""
        missing = [name for name in self.active if name not in losses]
        if missing:
            raise MixError(
                f"no validation loss of {', '.join(missing)}", do="early drop needs held-out rows for every task"
            )
        return replace(self, history=(*self.history, (step, dict(losses))))

    def decide(self) -> Decision:
        """The overfitting task with the earliest best; none where fewer than 3 evaluations are there."""
        if len(self.history) < MINIMUM_EVALUATIONS:
            return Decision(None, None)
        found = []
        for name in self.active:
            losses = [scores[name] for _, scores in self.history]
            best = min(range(len(losses)), key=losses.__getitem__)
            after = losses[best + 1 :]
            floor = losses[best] * (1 + self.minimum_rise)
            if len(after) >= self.patience and all(loss > floor for loss in after):
                found.append((self.history[best][0], -(losses[-1] - losses[best]), name))
        if not found:
            return Decision(None, None)
        step, _, name = min(found)
        return Decision(name, step if self.go_back else None)

    def update(self) -> tuple[EarlyDrop, Decision]:
        """Apply `decide`: the new state and what was decided. The last task is never dropped: then training is over."""
        decision = self.decide()
        drop = decision.drop
        if drop is None or len(self.active) == 1:
            return self, Decision(None, None)
        best = min(self.history, key=lambda point: point[1][drop])[0]
        active = tuple(name for name in self.active if name != drop)
        kept = tuple(point for point in self.history if point[0] <= best)[-1:] if self.go_back else ()
        return replace(self, active=active, history=kept, dropped=(*self.dropped, (drop, best))), decision
