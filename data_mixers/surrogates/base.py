"""What every surrogate is: a model of one score by mixture, with a mean, an interval, and joint draws.

Point models (all but the GP) get both from grouped cross-validation: the five models fitted without one fold each give
the spread of the function (delete-a-fold jackknife, variance (F - 1)/F sum_f (f_f - mean)^2), the errors on the folds
left out give the noise, and the interval is scaled so that it covers the errors left out (normalised CV conformal:
q = the ceil(level (n + 1))-th smallest of |error| / sigma; Barber et al. 2021).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, NamedTuple, Self

import numpy as np
from numpy.typing import ArrayLike, NDArray

from data_mixers.common.errors import MixError
from data_mixers.mixture.mixture import Floats
from data_mixers.sweep.ledger import group_rows

MINIMUM_TRIALS = 3


class TrialData(NamedTuple):
    """What a model is fitted on. groups [n]: equal = the same mixture; progress [n] in (0, 1]: None where the trials
    have one checkpoint each."""

    X: Floats
    y: Floats
    groups: NDArray[np.int64]
    progress: Floats | None
    weights: Floats

    def at(self, rows: NDArray[np.intp] | NDArray[np.bool_]) -> TrialData:
        """Some of the trials."""
        progress = None if self.progress is None else self.progress[rows]
        return TrialData(self.X[rows], self.y[rows], self.groups[rows], progress, self.weights[rows])


class Prediction(NamedTuple):
    """Mean and interval of a new, noisy observation; each [m]."""

    mean: Floats
    lower: Floats
    upper: Floats


def grouped_folds(groups: NDArray[np.int64], cv: int, seed: int) -> list[NDArray[np.intp]]:
    """Rows of each fold; rows of one group stay together; groups shuffled by seed. No more folds than groups."""
    unique = np.unique(groups)
    order = np.random.default_rng(seed).permutation(unique)
    parts = np.array_split(order, max(2, min(cv, len(unique))))
    return [np.flatnonzero(np.isin(groups, part)) for part in parts if len(part)]


def conformal_quantile(ratio_n: Floats, level: float) -> float:
    """The ceil(level (n + 1))-th smallest of n ratios |error| / sigma; the largest where n is too small."""
    ordered = np.sort(ratio_n)
    rank = int(np.ceil(level * (len(ordered) + 1) - 1e-9))
    return float(ordered[min(rank, len(ordered)) - 1])


def shares(X: ArrayLike, *, renormalize: bool) -> Floats:
    """X as float64 [n, K], checked; rows divided by their sum unless a published model took them raw."""
    rows = np.array(X, dtype=np.float64, ndmin=2)
    if not np.all(np.isfinite(rows)) or np.any(rows < 0):
        raise MixError("mixtures with a NaN or negative share", do="shares are numbers >= 0")
    if np.any(np.abs(rows.sum(axis=1) - 1) > 0.25):  # tables rounded to 0.1 (DaMo) add up to 0.8 ... 1.0
        raise MixError(f"a mixture adds up to {rows.sum(axis=1)[np.argmax(np.abs(rows.sum(axis=1) - 1))]:.4g}, not 1")
    return rows / rows.sum(axis=1, keepdims=True) if renormalize else rows


def amounts(X: Floats, tau: Floats | None) -> Floats:
    """What was seen of each task [n, K]: share x progress."""
    return X if tau is None else X * tau[:, None]


@dataclass
class PointSurrogate:
    """Base of the models that give a mean: subclasses implement `_fit` and `_mean`; features of progress are theirs.

    `_fit` gets progress as tau [n], None where the trials have one checkpoint each.
    """

    name: ClassVar[str]
    renormalize: ClassVar[bool] = True

    data: TrialData = field(init=False, repr=False, compare=False)  # of the fit
    constant: float | None = field(init=False, repr=False, default=None)  # the score, where all trials have the same
    _start: Any = field(init=False, repr=False, default=None)  # the model where this one's search starts
    _folds: list[PointSurrogate] = field(init=False, repr=False, default_factory=list)  # empty: not fitted yet
    _noise: float = field(init=False, repr=False, default=0.0)
    _ratios: Floats | None = field(init=False, repr=False, default=None)

    def clone(self) -> Self:
        """An unfitted copy with the same options."""
        return replace(self)

    def refit(self, data: TrialData) -> Self:
        """A new model of the same kind on part of the trials; models found by search start where this one ended."""
        model = self.clone()
        model._start = self
        return model.fit(**data._asdict())

    def without(self, folds: Sequence[NDArray[np.intp]], data: TrialData) -> Iterator[tuple[NDArray[np.intp], Self]]:
        """(rows left out, the model of the other rows of `data`) for each fold."""
        for held in folds:
            yield held, self.refit(data.at(np.setdiff1d(np.arange(len(data.y)), held)))

    def fit(
        self,
        X: ArrayLike,
        y: ArrayLike,
        *,
        groups: ArrayLike | None = None,
        progress: ArrayLike | None = None,
        weights: ArrayLike | None = None,
    ) -> Self:
        """Fit on trials; MixError for fewer than 3, a NaN, or shapes that do not match. Constant y predicts itself.
        Without `groups`, equal mixtures are one group: else CV would measure memory."""
        rows, y_n = shares(X, renormalize=self.renormalize), np.array(y, dtype=np.float64)
        if y_n.shape != (len(rows),):
            raise MixError(f"{len(rows)} mixtures and scores of shape {y_n.shape}")
        if len(y_n) < MINIMUM_TRIALS:
            do = f"at least {MINIMUM_TRIALS}; a useful fit needs about 3 (tasks + 1)"
            raise MixError(f"too few trials to say: {len(y_n)} trials", do=do)
        if not np.all(np.isfinite(y_n)):
            raise MixError("scores with NaN or infinity", do="leave diverged trials out")
        self.data = TrialData(
            rows,
            y_n,
            group_rows(rows) if groups is None else np.asarray(groups, dtype=np.int64),
            None if progress is None else np.array(progress, dtype=np.float64),
            np.ones(len(y_n)) if weights is None else np.asarray(weights, dtype=np.float64),
        )
        self._folds, self._ratios = [], None
        self.constant = float(y_n[0]) if np.ptp(y_n) == 0 else None
        if self.constant is None:
            self._fit(rows, y_n, self.data.progress, self.data.weights)
        return self

    def _fit(self, X: Floats, y: Floats, tau: Floats | None, weights: Floats) -> None:
        raise NotImplementedError

    def _mean(self, X: Floats, tau: Floats | None) -> Floats:
        raise NotImplementedError

    def observation_variance(self, X: Floats, tau: Floats | None) -> Floats | None:
        """Variance [m] of a new observation where the model knows it; None: only cross-validation says."""
        return None

    def mean(self, X: ArrayLike, progress: ArrayLike | None = None) -> Floats:
        """Predicted score [m]."""
        rows = shares(X, renormalize=self.renormalize)
        if not hasattr(self, "data"):
            raise ValueError(f"{type(self).__name__}: predict before fit")
        if rows.shape[1] != self.data.X.shape[1]:
            raise MixError(f"mixtures of {rows.shape[1]} tasks; the trials have {self.data.X.shape[1]}")
        if self.constant is not None:
            return np.full(len(rows), self.constant)
        return self._mean(rows, self._tau(progress, len(rows)))

    def _tau(self, progress: ArrayLike | None, m: int) -> Floats | None:
        """Progress [m] to predict at: as given, else the end of training; None where the model knows no progress."""
        if self.data.progress is None:
            return None
        end = self.data.progress.max() if progress is None else progress
        return np.broadcast_to(np.asarray(end, dtype=np.float64), (m,))

    @property
    def ratios(self) -> Floats:
        """|error| / sigma of trials left out [n]; cross-validated on first need."""
        return self._cross_validate() if self._ratios is None else self._ratios

    def _cross_validate(self) -> Floats:
        """The fold models, their errors, the noise and the ratios."""
        data, error_n = self.data, np.zeros(len(self.data.y))
        self._folds = []
        for held, model in self.without(grouped_folds(data.groups, 5, seed=0), data):
            left_out = data.at(held)
            error_n[held] = left_out.y - model.mean(left_out.X, left_out.progress)
            self._folds.append(model)
        self._noise = float(np.sqrt(np.mean(error_n**2)))
        self._ratios = np.abs(error_n) / np.maximum(self._sigma(data.X, data.progress), 1e-300)
        return self._ratios

    def _deviations(self, X: Floats, tau: Floats | None) -> Floats:
        """[F, m]: sqrt((F - 1) / F) (f_f - mean): the jackknife's directions."""
        if not self._folds:
            self._cross_validate()
        each = np.stack([model.mean(X, tau) for model in self._folds])
        return np.sqrt((len(each) - 1) / len(each)) * (each - each.mean(axis=0))

    def _sigma(self, X: Floats, tau: Floats | None) -> Floats:
        """sd [m] of a new observation, before calibration: the jackknife's spread, and the noise."""
        spread = np.sqrt(np.sum(self._deviations(X, tau) ** 2, axis=0))
        return np.sqrt(spread**2 + self._noise**2)

    def predict(self, X: ArrayLike, *, progress: ArrayLike | None = None, level: float = 0.9) -> Prediction:
        """Mean and a `level` interval of a new observation, scaled to cover trials left out."""
        mean = self.mean(X, progress)
        if self.constant is not None:
            return Prediction(mean, mean.copy(), mean.copy())
        sigma = self._sigma(shares(X, renormalize=False), self._tau(progress, len(mean)))
        half = conformal_quantile(self.ratios, level) * sigma
        return Prediction(mean, mean - half, mean + half)

    def sample(self, X: ArrayLike, size: int, seed: int) -> Floats:
        """[size, m] draws of the noise-free score: the mean plus Gaussian steps along the jackknife's directions."""
        mean = self.mean(X)
        if self.constant is not None:
            return np.tile(mean, (size, 1))
        directions = self._deviations(shares(X, renormalize=False), self._tau(None, len(mean)))
        return mean + np.random.default_rng(seed).standard_normal((size, len(directions))) @ directions
