"""The optimum of RegMix's notebook (arXiv 2407.01492), which the proposals are compared with."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from data_mixers.mixture.mixture import Floats


def regmix_optimum(model: Any, prior: ArrayLike, *, draws: int = 100_000, top: int = 128, seed: int = 42) -> Floats:
    """The notebook's optimum [K]: mean of the `top` lowest predictions among `draws` Dirichlet(prior) mixtures. For
    parity: it moves with the number of draws, and knows no bounds (project it: Bounds.project)."""
    prior_K = np.asarray(prior, dtype=np.float64)
    samples = np.random.RandomState(seed).dirichlet(prior_K, draws)
    predictions = np.concatenate([model.mean(samples[at : at + 10_000]) for at in range(0, draws, 10_000)])
    return samples[np.argsort(predictions)[:top]].mean(axis=0)
