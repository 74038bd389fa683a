"""What an online method is, and what the methods share: bounds, and their states in a checkpoint.

A state is a frozen dataclass of plain numbers (JSON through `dataclasses.asdict`) with `update(observations) -> state`
and `shares`; at a boundary the plan of the following steps is made from the new shares. Static mixtures are the
default: DoReMi and ODM scored below good static mixtures in RegMix's table (45.0 to 46.8 against 47.3).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from data_mixers.mixture.bounds import Bounds
from data_mixers.mixture.mixture import Floats
from data_mixers.plan.replanned import ReplannedPlan


class OnlineRule(ABC):
    """A way to choose shares [K]. `step` counts the steps done."""

    def see(self, loss_K: Floats, drawn_K: Floats) -> None:  # noqa: B027  (not every method looks)
        """A step's training losses, and each task's part of it by the share that it was drawn with."""

    @abstractmethod
    def due(self, step: int) -> bool:
        """Whether `choose` is to be called after this step."""

    def measures(self, step: int) -> int | None:
        """Which held-out rows `choose` wants the losses of after this step; None: none."""
        return None

    @abstractmethod
    def choose(self, step: int, chain: ReplannedPlan, bounds: Bounds, valid_K: Floats | None) -> Floats:
        """The shares that it wants from here on."""

    @abstractmethod
    def state(self) -> dict[str, Any]: ...

    @abstractmethod
    def restore(self, state: Mapping[str, Any]) -> None: ...


class PeriodicRule(OnlineRule):
    """Decides every `every` steps, as soon as something was seen."""

    def __init__(self, every: int) -> None:
        self.every, self.seen = every, 0

    def due(self, step: int) -> bool:
        return step % self.every == 0 and self.seen > 0


def bounded(shares: Sequence[float], bounds: Bounds | None) -> tuple[float, ...]:
    """The nearest allowed shares in KL."""
    return tuple(np.asarray(shares).tolist() if bounds is None else bounds.project(np.asarray(shares)).tolist())


def lists_to_tuples(state: Mapping[str, Any]) -> dict[str, Any]:
    """Fields of a state as they were before JSON."""
    return {key: tuple(value) if isinstance(value, list) else value for key, value in state.items()}
