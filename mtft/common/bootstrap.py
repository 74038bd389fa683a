"""The bootstrap over examples (Efron 1979), paired: all models see the same resamples of the same examples.

Examples are drawn, not tokens: tokens of one example are not independent. N examples; a seed gives the same draws.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
from numpy.typing import NDArray

CELLS = 4_000_000
"""Draws x examples resampled at once: bounds the memory at about 100 MB."""


def same_order(ids: Sequence[str], other: Sequence[str]) -> NDArray[np.int64] | None:
    """Rows of `other` in the order of `ids`; None unless both hold the same examples, each once."""
    place = {name: row for row, name in enumerate(other)}
    if len(place) != len(other) or set(place) != set(ids) or len(ids) != len(other):
        return None
    return np.array([place[name] for name in ids], dtype=np.int64)


def resampled_rows(examples: int, draws: int, seed: int, at_once: int | None = None) -> Iterator[NDArray[np.int64]]:
    """Rows [some draws, N] of each resample, `at_once` draws at a time."""
    generator = np.random.default_rng(seed)
    chunk = at_once or max(1, CELLS // examples)
    for start in range(0, draws, chunk):
        yield generator.integers(0, examples, size=(min(chunk, draws - start), examples))


def resampled_counts(examples: int, draws: int, generator: np.random.Generator) -> NDArray[np.int64]:
    """How often each example is in each resample [draws, N]."""
    return generator.multinomial(examples, np.full(examples, 1 / examples), size=draws)


def percentile_interval(values: NDArray[np.float64], level: float = 0.95) -> tuple[float, float]:
    """(lower, upper): the middle `level` of the values."""
    lower, upper = np.quantile(values, [(1 - level) / 2, (1 + level) / 2])
    return float(lower), float(upper)
