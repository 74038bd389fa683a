"""A score with bounds, fitted where it has none: predictions and intervals then stay inside.

    z = logit s,   s = (y - low) / (high - low),       y = low + (high - low) / (1 + e^-z)

A share of rows (accuracy, exact match, BLEU / 100) moves fast in the middle and hardly near its ends; in z what a task
adds is closer to the same everywhere. A score at a bound has no logit: it is taken half as far from the bound as the
nearest score that is not there (log 2 beyond that score in z), so it stays the best or the worst trial and never an
outlier. With N rows and the next score one row away that is half a row, the empirical logit (Haldane 1956, Anscombe
1956); a fixed epsilon would be far off where N is unknown, as it is in a ledger.

Medians and quantiles commute with the map, means don't: a mean in z is the median of y. A difference of y between two
mixtures is that of z times the slope of the chord between them (`slope`): "better" is exactly as sure in y as in z.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from scipy.special import expit, logit

from data_mixers.mixture.mixture import Floats

ScoreBounds = tuple[float | None, float | None]  # lowest and highest score there can be; None: no bound on that side
WIDEST = 0.25  # of the range: how far a score at a bound is taken from it at the most (all scores are at the bounds)


@dataclass(frozen=True)
class LogitLink:
    """`pull`: how far from (low, high) a score at that bound is taken, as a share of the range. `touched`: whether a
    trial has a score there; an interval that reaches so far then reaches the bound."""

    low: float
    high: float
    pull: tuple[float, float] = (WIDEST, WIDEST)
    touched: tuple[bool, bool] = (False, False)

    @classmethod
    def of(cls, y: Floats, low: float, high: float) -> LogitLink:
        """The link for scores y [n] inside low ... high."""
        shares = (y - low) / (high - low)
        inside = shares[(shares > 0) & (shares < 1)]
        gaps = (inside.min(), 1 - inside.max()) if len(inside) else (1.0, 1.0)
        pull = (min(WIDEST, 0.5 * float(gaps[0])), min(WIDEST, 0.5 * float(gaps[1])))
        return cls(low, high, pull, (bool(np.any(shares <= 0)), bool(np.any(shares >= 1))))

    def forward(self, y: Floats) -> Floats:
        """z [n] of scores y [n]."""
        return logit(np.clip((y - self.low) / (self.high - self.low), self.pull[0], 1 - self.pull[1]))

    def inverse(self, z: Floats) -> Floats:
        """Scores [m] of z [m]."""
        return self.low + (self.high - self.low) * expit(z)

    def lower_end(self, z: Floats) -> Floats:
        """`inverse` of lower ends of intervals [m]: the bound where the end reaches scores that were seen there."""
        return np.where(self.touched[0] & (expit(z) <= self.pull[0] * (1 + 1e-9)), self.low, self.inverse(z))

    def upper_end(self, z: Floats) -> Floats:
        """`inverse` of upper ends of intervals [m], likewise."""
        return np.where(self.touched[1] & (expit(-z) <= self.pull[1] * (1 + 1e-9)), self.high, self.inverse(z))

    def slope(self, a: Floats, b: Floats | None = None) -> Floats:
        """dy/dz [m] at z = a, or between a and b: (y(a) - y(b)) / (a - b)."""
        other = a if b is None else b
        # sigma(a) - sigma(b) = tanh((a - b)/2) (1 - tanh(a/2) tanh(b/2)) / 2: no cancellation where a is near b
        half = np.asarray(0.5 * (np.asarray(a) - other), dtype=np.float64)
        ratio = np.where(np.abs(half) < 1e-6, 1 - half**2 / 3, np.tanh(half) / np.where(half == 0, 1.0, half))
        middle = 1 - np.tanh(0.5 * np.asarray(a)) * np.tanh(0.5 * np.asarray(other))
        return 0.25 * (self.high - self.low) * ratio * middle
