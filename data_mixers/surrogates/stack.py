"""Stacking: several surrogates, weighted by what they predict on trials they have not seen ("auto").

Out-of-fold predictions of every candidate (5 folds grouped by mixture), then weights by non-negative least squares on
the centred predictions, normalised to 1 (Breiman 1996, van der Laan 2007):

    min_w>=0  |y - F w|^2 + n var(y) |w - w0|^2,      w0 ~ 1 / (squared CV error)^4 / (candidates of the family)

The pull to w0 keeps a candidate that was lucky on a few trials from taking all (on noisy tables it gains 0.3 to 0.7
points of rho over a tenth of it, on RegMix's it changes nothing); a family (the first word of a label) does not count
for more by having more members. A candidate that predicts no better than the mean of the trials is dropped, and one
that predicts the same score for all of them (its error is then the mean's, but for rounding); if none is left the model
is the mean: no signal. Processes with `noise` None share one prior of the noise, chosen by the same CV
(from repeats of a mixture where there are any).

    sigma^2(x) = sum_j w_j v_j(x) + sum_j w_j (f_j(x) - f(x))^2     v_j: a process's variance with noise; else CV error

Intervals are f +- q sigma with q from the out-of-fold ratios |error| / sigma (normalised CV conformal), where also the
weights come from the other folds. With a single candidate this is simply that model with a cross-validated interval; it
is what fitting/ uses for every choice.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import ClassVar

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.optimize import nnls
from scipy.stats import rankdata

from data_mixers.common.errors import MixError
from data_mixers.surrogates.base import (
    MINIMUM_TRIALS,
    Floats,
    PointSurrogate,
    Prediction,
    TrialData,
    conformal_quantile,
    grouped_folds,
    shares,
)
from data_mixers.surrogates.gaussian_process import GaussianProcess

PULL = 1.0  # of the stacking weights towards w0, in units of n var(y)
NOISE_PRIORS = (-5.0, -2.0, -0.5)  # centres of log s_n^2: losses are quiet, benchmark scores are not
PILOT = 512  # trials at the most that choose among these
FLAT = 1e-9  # of the scores' sd: predictions that differ by less are one number
SMALLEST = 0.02  # a weight below this is not worth the model


@dataclass(frozen=True)
class CandidateScore:
    """How one candidate did on the folds left out. rho: Spearman x 100; coverage: of its 90 % intervals."""

    name: str
    rho: float
    r2: float
    coverage: float
    weight: float


@dataclass
class Stack(PointSurrogate):
    """`candidates`: {label: unfitted surrogate}; all get a weight from `folds`-fold grouped CV with `seed`."""

    name: ClassVar[str] = "stack"
    renormalize: ClassVar[bool] = False  # each candidate takes the shares as its own rule says
    candidates: Mapping[str, PointSurrogate] = field(default_factory=dict)
    folds: int = 5
    seed: int = 0

    scores: list[CandidateScore] = field(init=False, repr=False, default_factory=list)
    models: dict[str, PointSurrogate] = field(init=False, repr=False, default_factory=dict)
    weights: dict[str, float] = field(init=False, repr=False, default_factory=dict)
    held_mean: Floats = field(init=False, repr=False, default_factory=lambda: np.zeros(0))
    held_sigma: Floats = field(init=False, repr=False, default_factory=lambda: np.zeros(0))
    fold_of: NDArray[np.int64] = field(init=False, repr=False, default_factory=lambda: np.zeros(0, dtype=np.int64))
    _error: dict[str, float] = field(init=False, repr=False, default_factory=dict)
    _carrier: GaussianProcess | None = field(init=False, repr=False, default=None)

    @property
    def signal(self) -> bool:
        """Whether any candidate predicts trials left out better than their mean does."""
        return bool(self.weights)

    def _fit(self, X: Floats, y: Floats, tau: Floats | None, weights: Floats) -> None:
        groups = self.data.groups
        if len(np.unique(groups)) < 2:
            raise MixError("all trials have the same mixture", do="vary the mixture: without it nothing can be learnt")
        n, folds = len(y), grouped_folds(groups, self.folds, self.seed)
        self.fold_of = np.zeros(n, dtype=np.int64)
        mean_n = np.empty(n)
        for number, held in enumerate(folds):
            self.fold_of[held] = number
            mean_n[held] = np.delete(y, held).mean()
        candidates = self._settle_noise(folds)
        fitted = {label: model.clone().fit(**self.data._asdict()) for label, model in candidates.items()}
        held_out = {label: self._hold_out(model, folds, self.data) for label, model in fitted.items()}
        baseline = float(np.mean((y - mean_n) ** 2))
        self._error = {label: float(np.mean((y - mean) ** 2)) for label, (mean, _) in held_out.items()}
        processes = {label: model for label, model in fitted.items() if isinstance(model, GaussianProcess)}
        self._carrier = processes[min(processes, key=self._error.__getitem__)] if processes else None
        tells = [label for label, model in fitted.items() if np.ptp(model.mean(X, tau)) > FLAT * np.std(y)]
        telling = {label: held_out[label] for label in tells}
        self.weights = _stacking_weights({label: mean for label, (mean, _) in telling.items()}, y, baseline)
        self.models = {label: fitted[label] for label in self.weights}
        self.scores = [
            CandidateScore(
                label,
                spearman(mean, y),
                1 - self._error[label] / baseline,
                self.coverage_of(np.abs(y - mean) / np.sqrt(np.maximum(variance, 1e-300))),
                self.weights.get(label, 0.0),
            )
            for label, (mean, variance) in held_out.items()
        ]
        if not self.weights:
            self.held_mean, self.held_sigma = mean_n, np.full(n, np.sqrt(baseline))
        else:
            self._predict_held(y, mean_n, telling)
        self._ratios = np.abs(y - self.held_mean) / np.maximum(self.held_sigma, 1e-300)

    def _predict_held(self, y: Floats, mean_n: Floats, held_out: Mapping[str, tuple[Floats, Floats]]) -> None:
        """The stack's prediction of each trial with models *and weights* that have not seen it: the weights of a fold
        come from the other folds' left-out predictions. Else the stack would look better than it is."""
        self.held_mean, self.held_sigma = mean_n.copy(), np.empty(len(y))
        for fold in np.unique(self.fold_of):
            here, others = self.fold_of == fold, self.fold_of != fold
            weights = _stacking_weights(
                {label: mean[others] for label, (mean, _) in held_out.items()},
                y[others],
                float(np.mean((y[others] - mean_n[others]) ** 2)),
            )
            if not weights:
                self.held_sigma[here] = np.sqrt(np.mean((y[others] - mean_n[others]) ** 2))
                continue
            parts = [(held_out[label][0][here], held_out[label][1][here]) for label in weights]
            self.held_mean[here], self.held_sigma[here] = _mixture_moments(weights, parts)

    def coverage_of(self, ratio_n: Floats, level: float = 0.9) -> float:
        """Share of trials inside an interval whose width comes from the other folds."""
        inside = np.zeros(len(ratio_n), dtype=bool)
        for fold in np.unique(self.fold_of):
            held = self.fold_of == fold
            inside[held] = ratio_n[held] <= conformal_quantile(ratio_n[~held], level)
        return float(inside.mean())

    def _settle_noise(self, folds: Sequence[NDArray[np.intp]]) -> dict[str, PointSurrogate]:
        """The candidates, GPs of undecided noise with the prior that suits these trials best."""
        data = self.data
        undecided = [label for label, model in self.candidates.items() if getattr(model, "noise", 0.0) is None]
        if not undecided:
            return dict(self.candidates)
        repeats = repeat_variance(data.y, data.groups, data.progress)
        if repeats is not None:
            noise = float(np.clip(np.log(max(repeats, 1e-300) / data.y.var()), -12.0, 1.0))
        else:
            if len(data.y) > PILOT:  # enough to tell priors apart
                data = data.at(np.sort(np.random.default_rng(self.seed).permutation(len(data.y))[:PILOT]))
                folds = grouped_folds(data.groups, self.folds, self.seed)
            errors = {}
            for centre in NOISE_PRIORS:
                pilot = replace(self.candidates[undecided[0]], noise=centre).fit(**data._asdict())
                errors[centre] = float(np.mean((data.y - self._hold_out(pilot, folds, data)[0]) ** 2))
            noise = min(errors, key=errors.__getitem__)
        return {**self.candidates, **{label: replace(self.candidates[label], noise=noise) for label in undecided}}

    def _hold_out(
        self, model: PointSurrogate, folds: Sequence[NDArray[np.intp]], data: TrialData
    ) -> tuple[Floats, Floats]:
        """Out-of-fold mean and variance [n] of one candidate."""
        mean_n, variance_n = np.empty(len(data.y)), np.empty(len(data.y))
        if max(len(held) for held in folds) > len(data.y) - MINIMUM_TRIALS:
            count = len(np.unique(data.groups))
            raise MixError(f"too few trials to say: {count} different mixtures", do="at least 5 for cross-validation")
        for held, part in model.without(folds, data):
            left_out = data.at(held)
            mean_n[held] = part.mean(left_out.X, left_out.progress)
            known = part.observation_variance(left_out.X, left_out.progress) if part.constant is None else None
            variance_n[held] = np.nan if known is None else known
        constant = float(np.mean((data.y - mean_n) ** 2))
        return mean_n, np.where(np.isnan(variance_n), constant, variance_n)

    def _mean(self, X: Floats, tau: Floats | None) -> Floats:
        if not self.models:
            return np.full(len(X), float(np.average(self.data.y, weights=self.data.weights)))
        parts = (weight * self.models[label].mean(X, tau) for label, weight in self.weights.items())
        return sum(parts, start=np.zeros(len(X)))

    def moments(self, X: ArrayLike, progress: ArrayLike | None = None) -> tuple[Floats, Floats]:
        """Mean and uncalibrated sd [m] of a new observation."""
        rows = shares(X, renormalize=False)
        tau = self._tau(progress, len(rows))
        if self.constant is not None:
            return np.full(len(rows), self.constant), np.zeros(len(rows))
        if not self.models:
            return self._mean(rows, tau), np.full(len(rows), float(self.held_sigma[0]))
        parts = []
        for label in self.weights:
            known = self.models[label].observation_variance(rows, tau)
            variance = np.full(len(rows), self._error[label]) if known is None else known
            parts.append((self.models[label].mean(rows, tau), variance))
        return _mixture_moments(self.weights, parts)

    def quantile(self, level: float = 0.9) -> float:
        """q of the calibrated interval mean +- q sigma."""
        return conformal_quantile(self._ratios, level) if self._ratios is not None else 0.0

    def predict(self, X: ArrayLike, *, progress: ArrayLike | None = None, level: float = 0.9) -> Prediction:
        """Mean and calibrated `level` interval of a new observation."""
        mean, sigma = self.moments(X, progress)
        half = self.quantile(level) * sigma
        return Prediction(mean, mean - half, mean + half)

    def carrier(self) -> GaussianProcess:
        """The GP whose posterior carries joint uncertainty: the candidate with the smallest error on trials left out,
        or one fitted for the purpose."""
        if self._carrier is None:
            self._carrier = GaussianProcess().fit(**self.data._asdict())
        return self._carrier

    def sample(self, X: ArrayLike, size: int, seed: int) -> Floats:
        """[size, m] joint draws of the noise-free score: the mean, the GP's posterior around it, and the disagreement
        of the candidates (one Gaussian step per candidate, sqrt(w_j) (f_j - f))."""
        rows = shares(X, renormalize=False)
        mean = self.mean(rows)
        if self.constant is not None:
            return np.tile(mean, (size, 1))
        carrier = self.carrier()
        draws = mean + (carrier.sample(rows, size, seed) - carrier.mean(rows))
        if len(self.models) > 1:
            steps = [np.sqrt(weight) * (self.models[label].mean(rows) - mean) for label, weight in self.weights.items()]
            draws += np.random.default_rng([seed, 1]).standard_normal((size, len(steps))) @ np.stack(steps)
        return draws


def _mixture_moments(weights: Mapping[str, float], parts: Sequence[tuple[Floats, Floats]]) -> tuple[Floats, Floats]:
    """Mean and sd [m] of a mixture of models, given the mean and variance of each."""
    share = np.array(list(weights.values()))
    means, variances = np.stack([mean for mean, _ in parts]), np.stack([variance for _, variance in parts])
    mean = share @ means
    return mean, np.sqrt(share @ (variances + (means - mean) ** 2))


def repeat_variance(y: Floats, groups: NDArray[np.int64], tau: Floats | None = None) -> float | None:
    """Variance of the score between runs of the same mixture (and progress), pooled; None without repeats."""
    total, degrees = 0.0, 0
    keys = np.column_stack([groups, np.zeros(len(y)) if tau is None else tau])
    for key in np.unique(keys, axis=0):
        same = y[np.all(keys == key, axis=1)]
        if len(same) > 1:
            total, degrees = total + float(np.sum((same - same.mean()) ** 2)), degrees + len(same) - 1
    return total / degrees if degrees else None


def _stacking_weights(held_out: Mapping[str, Floats], y: Floats, baseline: float) -> dict[str, float]:
    """Weights of the candidates from their left-out predictions [n]; empty where none beats the `baseline` error."""
    error = {label: float(np.mean((y - mean) ** 2)) for label, mean in held_out.items()}
    labels = [label for label in held_out if error[label] < baseline]
    if not labels:
        return {}
    columns = np.stack([held_out[label] - held_out[label].mean() for label in labels], axis=1)
    best = min(error[label] for label in labels)
    family = [label.split()[0] for label in labels]
    prior = np.array([best / max(error[label], 1e-300) for label in labels]) ** 4
    prior /= np.array([family.count(name) for name in family])
    prior /= prior.sum()
    pull = np.sqrt(PULL * len(y)) * y.std()
    solved, _ = nnls(np.vstack([columns, pull * np.eye(len(labels))]), np.r_[y - y.mean(), pull * prior])
    if solved.sum() <= 0:
        return {min(labels, key=lambda label: error[label]): 1.0}
    solved = solved / solved.sum()
    solved = np.where(solved < SMALLEST, 0.0, solved)
    return {label: float(w) for label, w in zip(labels, solved / solved.sum(), strict=True) if w > 0}


def spearman(a: Floats, b: Floats) -> float:
    """Rank correlation x 100; 0 where one of them is constant."""
    ranks_a, ranks_b = rankdata(a), rankdata(b)
    if np.ptp(ranks_a) == 0 or np.ptp(ranks_b) == 0:
        return 0.0
    return float(100 * np.corrcoef(ranks_a, ranks_b)[0, 1])
