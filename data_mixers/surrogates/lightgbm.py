"""Gradient-boosted trees with RegMix's settings (arXiv 2407.01492): the honest variant, and the notebook's for parity.

    LGBMRegressor(gbdt, regression, metric l1 + l2, 1000 trees, learning rate 0.01, seed 42), the rest as by default

`LightGBM` sees no evaluation data. `RegMix` stops early on evaluation data as the notebook does: after 3 rounds in
which either metric stalls (with l2 alone it would stop later). It is scored on the data it stops on, and warns.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass, field
from typing import Any, ClassVar

import numpy as np
from numpy.typing import ArrayLike

from data_mixers.common.errors import MixError, optional_package
from data_mixers.surrogates.base import Floats, PointSurrogate, shares

SETTINGS = {
    "boosting_type": "gbdt",
    "objective": "regression",
    "metric": ["l1", "l2"],
    "seed": 42,
    "verbosity": -1,
    "num_threads": 1,  # same sums in the same order on any machine
}


def _lightgbm() -> Any:
    return optional_package("lightgbm", "LightGBM", where="surrogate: lightgbm", install="lightgbm")


@dataclass
class LightGBM(PointSurrogate):
    """1000 trees (or `trees`), no evaluation data. Below 40 trials smaller leaves, else it predicts a constant."""

    name: ClassVar[str] = "lightgbm"
    renormalize: ClassVar[bool] = False  # as published; shares of rounded tables add up to 0.997 ... 1.003
    trees: int = 1000
    learning_rate: float = 0.01

    _booster: Any = field(init=False, repr=False, default=None)

    def _fit(self, X: Floats, y: Floats, tau: Floats | None, weights: Floats) -> None:
        small = {"min_child_samples": max(2, len(y) // 50)} if len(y) < 40 else {}
        self._train(_features(X, tau), y, small, sample_weight=None if np.ptp(weights) == 0 else weights)

    def _train(self, X: Floats, y: Floats, options: dict[str, Any], **fit_options: Any) -> None:
        model = _lightgbm().LGBMRegressor(
            **SETTINGS, num_iterations=self.trees, learning_rate=self.learning_rate, **options
        )
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="Found `num_iterations`|The argument 'eval_set'")
            self._booster = model.fit(X, y, **fit_options).booster_

    def _mean(self, X: Floats, tau: Floats | None) -> Floats:
        return self._booster.predict(_features(X, tau), num_threads=1)


def _features(X: Floats, tau: Floats | None) -> Floats:
    return X if tau is None else np.column_stack([X, tau])


@dataclass
class RegMix(LightGBM):
    """The notebook, for parity only: raw shares; `evaluation` = (X, y) to stop on. Without it: error."""

    name: ClassVar[str] = "regmix"
    evaluation: tuple[ArrayLike, ArrayLike] | None = None

    def _fit(self, X: Floats, y: Floats, tau: Floats | None, weights: Floats) -> None:
        if self.evaluation is None:
            raise MixError(
                "surrogate regmix stops early on evaluation data, and none is given",
                where="surrogate: regmix",
                do="use lightgbm (the same trees, no evaluation data), or give evaluation mixtures and scores",
            )
        warnings.warn(
            "regmix early-stops on the data it is scored on: use it for parity with the paper only", stacklevel=4
        )
        evaluation = (shares(self.evaluation[0], renormalize=False), np.asarray(self.evaluation[1], dtype=np.float64))
        stopping = [_lightgbm().early_stopping(3, verbose=False)]
        self._train(X, y, {}, eval_set=[evaluation], eval_metric="l2", callbacks=stopping)

    @property
    def trees_used(self) -> int:
        """Where early stopping ended (613 on Pile-CC)."""
        return int(self._booster.best_iteration)
