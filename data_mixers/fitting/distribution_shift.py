"""Are the mixtures asked about drawn as the trials were? A two-sample test by energy distance.

    E(T, Z) = 2 E|t - z| - E|t - t'| - E|z - z'|,      t, z: square roots of the shares (Hellinger distance)

E >= 0, and 0 only for equal distributions; its size under "drawn alike" comes from dealing all mixtures anew to the two
sides (Székely & Rizzo 2013, Journal of Statistical Planning and Inference 143). Trials come from a design; mixtures
that people would play in the real run look different from it: so one can see which of the two a file holds.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike
from scipy.spatial.distance import cdist

from data_mixers.mixture.mixture import Floats

MOST = 256  # mixtures a side; beyond, a sample: the test is sharp enough long before
DEALS = 1999


def same_distribution(trials: ArrayLike, asked: ArrayLike, *, seed: int = 0) -> float:
    """p-value of "mixtures `asked` [q, K] and `trials` [n, K] come from one distribution"; at least 1 / 2000."""
    rng = np.random.default_rng(seed)
    T, Z = (_at_most(np.atleast_2d(np.asarray(rows, dtype=np.float64)), rng) for rows in (trials, asked))
    both = np.sqrt(np.maximum(np.vstack([T, Z]), 0.0))
    distance = np.asarray(cdist(both, both), dtype=np.float64)
    on_first = np.zeros((DEALS + 1, len(both)))
    on_first[0, : len(T)] = 1
    for deal in on_first[1:]:
        deal[rng.permutation(len(both))[: len(T)]] = 1
    energy = _energy(distance, on_first, len(T), len(Z))
    return float(np.mean(energy >= energy[0] - 1e-12))


def _energy(distance: Floats, on_first: Floats, n: int, q: int) -> Floats:
    """[d]: energy distance of each deal; on_first [d, n + q] is 1 on the first side."""
    reached = on_first @ distance
    within = np.sum(reached * on_first, axis=1)
    between = reached.sum(axis=1) - within
    rest = distance.sum() - within - 2 * between
    return 2 * between / (n * q) - within / n**2 - rest / q**2


def _at_most(rows: Floats, rng: np.random.Generator) -> Floats:
    return rows if len(rows) <= MOST else rows[np.sort(rng.choice(len(rows), MOST, replace=False))]
