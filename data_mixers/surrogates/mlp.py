"""DaMo's network (arXiv 2510.19336), for parity: scikit-learn's MLP on share x progress, no scaling.

    MLPRegressor(hidden_layer_sizes=(100, 100), max_iter=1500, tol=1e-6, random_state=1),  x = p tau (tau = (t + 1) / 4)

Published with all targets at once; here one target a model, as everywhere (`fit_many` does it their way).
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass, field
from typing import Any, ClassVar

import numpy as np

from data_mixers.common.errors import optional_package
from data_mixers.surrogates.base import Floats, PointSurrogate, amounts


@dataclass
class MLP(PointSurrogate):
    """The network sees raw shares times progress."""

    name: ClassVar[str] = "mlp"
    renormalize: ClassVar[bool] = False

    _network: Any = field(init=False, repr=False, default=None)

    def _fit(self, X: Floats, y: Floats, tau: Floats | None, weights: Floats) -> None:
        self._network = fit_many(amounts(X, tau), y)

    def _mean(self, X: Floats, tau: Floats | None) -> Floats:
        return self._network.predict(amounts(X, tau))


def fit_many(x: Floats, Y: Floats) -> Any:
    """DaMo's regressor on x [n, K] = share x progress and scores Y [n] or [n, J]."""
    sklearn = optional_package("sklearn.neural_network", "scikit-learn", where="surrogate: mlp", install="scikit-learn")
    network = sklearn.MLPRegressor(hidden_layer_sizes=(100, 100), max_iter=1500, tol=1e-6, random_state=1)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it often stops at max_iter, as published
        return network.fit(x, np.asarray(Y))
