"""A mixture that changes while training: piecewise linear between mixtures at given progress (a curriculum).

    p_k(x) = linear between the stops around x,   x = (s + 1/2) / S in step s of S

Before the first stop and after the last one the mixture stands still; two stops at one progress make a jump. How a
schedule is played to within one row of every task at every step is in quota.py.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from data_mixers.common.errors import MixError
from data_mixers.mixture.mixture import Floats, Mixture


@dataclass(frozen=True)
class MixtureSchedule:
    """Stops (progress in [0, 1], mixture), progress not falling; all mixtures of the same tasks."""

    stops: tuple[tuple[float, Mixture], ...]

    def __post_init__(self) -> None:
        if not self.stops:
            raise MixError("a schedule without a stop", do="give at least one mixture")
        names = self.stops[0][1].names
        stops = tuple((float(at), mixture.over(names, where=f"the stop at {at:g}")) for at, mixture in self.stops)
        before = 0.0
        for at, _ in stops:
            if not before <= at <= 1:
                what = f"a stop at progress {at:g}" + (f" behind one at {before:g}" if before else "")
                raise MixError(what, do="progress runs from 0 to 1, and stops stand in its order")
            before = at
        object.__setattr__(self, "stops", stops)

    @classmethod
    def segments(cls, segments: Sequence[tuple[int, Mixture]], steps: int) -> MixtureSchedule:
        """Constant mixtures, each from its first step on; the first segment starts at step 0."""
        if not segments or segments[0][0] != 0:
            raise MixError("the first segment must start at step 0")
        firsts = [first for first, _ in segments]
        if firsts != sorted(set(firsts)) or firsts[-1] >= steps:
            raise MixError(f"segments start at steps {firsts} of {steps}", do="in rising order, before the last step")
        ends = [*firsts[1:], steps]
        return cls(tuple((at / steps, mixture) for (first, mixture), end in zip(segments, ends) for at in (first, end)))

    @property
    def names(self) -> tuple[str, ...]:
        return self.stops[0][1].names

    def at(self, progress: float) -> Mixture:
        """The mixture at a progress in [0, 1]."""
        return Mixture(self.names, self._interpolate(np.array([progress]))[0])

    def shares(self, steps: int) -> Floats:
        """Shares of each step [S, K]: those in the step's middle, which is their mean over the step."""
        return self._interpolate((np.arange(steps) + 0.5) / steps)

    def mean(self, steps: int | None = None) -> Mixture:
        """Shares over a whole run of `steps` steps of the same size (None: of infinitely many)."""
        if steps is not None:
            return Mixture(self.names, self.shares(steps).mean(axis=0))
        places = np.unique([0.0, *(at for at, _ in self.stops), 1.0])
        edge = np.nextafter(places, [1.0] * len(places)), np.nextafter(places, [0.0] * len(places))  # sides of a jump
        right_AK, left_AK = self._interpolate(edge[0][:-1]), self._interpolate(edge[1][1:])
        return Mixture(self.names, ((right_AK + left_AK) / 2 * np.diff(places)[:, None]).sum(axis=0))

    def _interpolate(self, progress_S: Floats) -> Floats:
        at = np.array([at for at, _ in self.stops])
        share_AK = np.stack([mixture.shares for _, mixture in self.stops])
        return np.stack([np.interp(progress_S, at, share_A) for share_A in share_AK.T], axis=1)
