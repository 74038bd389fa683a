"""What the online methods share: when they decide, bounds, and their states in a checkpoint.

A state is a frozen dataclass of plain numbers (JSON through `dataclasses.asdict`) with `update(observations) -> state`
and `shares`; at a boundary the plan of the following steps is made from the new shares. Static mixtures are the
default: DoReMi and ODM scored below good static mixtures in RegMix's table (45.0 to 46.8 against 47.3).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from data_mixers.mixture.bounds import Bounds


class PeriodicRule:
    """Decides every `every` steps, as soon as something was seen."""

    def __init__(self, every: int) -> None:
        self.every, self.seen = every, 0

    def due(self, step: int) -> bool:
        return step % self.every == 0 and self.seen > 0

    def measures(self, step: int) -> int | None:
        return None


def bounded(shares: Sequence[float], bounds: Bounds | None) -> tuple[float, ...]:
    """The nearest allowed shares in KL."""
    return tuple(np.asarray(shares).tolist() if bounds is None else bounds.project(np.asarray(shares)).tolist())


def lists_to_tuples(state: Mapping[str, Any]) -> dict[str, Any]:
    """Fields of a state as they were before JSON."""
    return {key: tuple(value) if isinstance(value, list) else value for key, value in state.items()}
