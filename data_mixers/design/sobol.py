"""Low-discrepancy mixtures inside bounds: scrambled Sobol points through the inverse of Dirichlet's gammas.

    p = l + (1 - sum l) d,   d = g / sum g,   g_k = F^-1(u_k; strength q_k),   q = tempered prior

u are scrambled Sobol points of K + 1 dimensions (Owen 1995; Joe & Kuo 2008): K of them gamma quantiles, the last one
the strength, log-uniform, so that corners and middles are both visited. Floors are kept by the affine map; what breaks
a cap, an epoch cap or a group is projected in KL onto the bounds. Without limits, with a uniform prior and strength K,
this is the uniform distribution on the simplex.
"""

from __future__ import annotations

import numpy as np

from data_mixers.mixture.bounds import Bounds
from data_mixers.mixture.mixture import Floats, Mixture

STRENGTHS = (0.3, 10.0)  # total of the Dirichlet's parameters: corners ... middles


def sobol_mixtures(
    bounds: Bounds, n: int, *, prior: Mixture, seed: int, strengths: tuple[float, float] = STRENGTHS
) -> Floats:
    """[n, K] mixtures inside the bounds (which know their tasks), the same for the same seed."""
    from scipy.special import gammaincinv
    from scipy.stats import qmc

    from data_mixers.mixture.projection import project

    low_K, high_K, K = bounds.lower(), bounds.upper(), len(bounds.lower())
    points = qmc.Sobol(K + 1, scramble=True, rng=np.random.default_rng(seed)).random_base2(max(0, (n - 1).bit_length()))
    u = np.clip(points[:n], 1e-12, 1 - 1e-12)
    tempered_K = np.sqrt(np.maximum(prior.over(bounds._named()).shares, 1e-6))
    low, high = np.log(strengths)
    strength = np.exp(low + (high - low) * u[:, -1:])
    gamma = gammaincinv(np.maximum(strength * tempered_K / tempered_K.sum(), 1e-3), u[:, :K]) + 1e-300
    rows = low_K + max(0.0, 1 - low_K.sum()) * gamma / gamma.sum(axis=1, keepdims=True)
    return project(rows, low_K, high_K, bounds._intervals(), "kl")
