"""fit: trials -> one model per target, chosen and weighted by grouped cross-validation, with calibrated intervals.

One model per target, always: aggregating the targets first loses (RegMix, mean of 13 losses at 60M: 96.8 per target,
93.5 on the mean). What is reported of a model comes from trials it has not seen.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import ArrayLike
from threadpoolctl import threadpool_limits

from data_mixers.common.errors import MixError, check_seed
from data_mixers.fitting.enough_trials import TOO_FEW, too_few_trials, trials_with
from data_mixers.mixture.mixture import Floats, Mixture
from data_mixers.surrogates.base import MINIMUM_TRIALS, Prediction
from data_mixers.surrogates.registry import candidates_of
from data_mixers.surrogates.stack import Stack, repeat_variance, spearman
from data_mixers.sweep.early_termination import completed
from data_mixers.sweep.ledger import Arrays, TrialLedger
from data_mixers.sweep.trial import Goal, TrialRecord

SMALL = 1e-60
NO_SIGNAL = f"no signal: no surrogate predicts a trial better than the mean of the others; {TOO_FEW}, or too noisy"


@dataclass
class TargetFit:
    """The model of one target and what is known of its quality."""

    target: str
    goal: Goal
    model: Stack
    arrays: Arrays
    level: float
    nulls: int  # trials left out because their score is not finite
    trials: int  # with a finite score
    exponent: int = 0  # scores beyond all measure are fitted divided by this power of two; `arrays` holds those

    def raw(self, fitted: Any) -> Any:
        """Numbers in units of the fit (an array, or one) as the scores have them."""
        return fitted if self.exponent == 0 else np.ldexp(fitted, self.exponent)

    @property
    def signal(self) -> bool:
        """Whether the trials say anything about this target."""
        return self.model.constant is None and self.model.signal

    @property
    def too_few(self) -> str | None:
        """Why there are too few trials to predict this target; None: there are enough."""
        return too_few_trials(self.trials, self.arrays.X.shape[1])

    @property
    def unsaid(self) -> str | None:
        """Why no prediction, interval or gain of this target is shown: too few trials, or a model that is constant."""
        if self.too_few is not None:
            return self.too_few
        if self.model.constant is not None:
            return f"no signal: every trial has the score {self.raw(self.model.constant):.6g}"
        return None if self.model.signal else NO_SIGNAL

    @property
    def sd(self) -> float:
        """Spread of the score over the trials."""
        return float(self.arrays.y.std())

    @property
    def sign(self) -> float:
        """1 where low is good, else -1."""
        return 1.0 if self.goal == "min" else -1.0

    @property
    def unit(self) -> float:
        """What scores are divided by in an objective: their sd; 1 for a constant score."""
        return self.sd if self.sd > 0 else 1.0

    def standardized(self, score_m: Floats) -> Floats:
        """Scores [m] centred on the trials, in units of their sd, turned so that low is good."""
        return self.sign * (score_m - self.arrays.y.mean()) / self.unit

    @property
    def noise_sd(self) -> float | None:
        """sd of the score between runs of the same mixture: from repeats, else from the GP; None: constant score."""
        repeats = repeat_variance(self.arrays.y, self.arrays.groups, self.arrays.progress)
        if repeats is not None:
            return math.sqrt(repeats)
        return None if self.model.constant is not None else math.sqrt(self.model.carrier().noise_variance)

    @property
    def r2(self) -> float:
        """Share of the variance that the model explains on trials left out."""
        if self.model.constant is not None:
            return 0.0
        y = self.arrays.y
        return float(1 - np.mean((y - self.model.held_mean) ** 2) / y.var())

    @property
    def rho(self) -> float:
        """Spearman x 100 on trials left out."""
        return 0.0 if self.model.constant is not None else spearman(self.model.held_mean, self.arrays.y)

    @property
    def coverage(self) -> float:
        """Share of left-out trials inside their interval, the interval's width taken from the other folds only."""
        model = self.model
        return 1.0 if model.constant is not None else model.coverage_of(model.ratios, self.level)

    @property
    def nlpd(self) -> float:
        """Mean negative log density of the left-out scores under the Gaussian mean +- sigma (uncalibrated)."""
        model = self.model
        if model.constant is not None:
            return -math.inf
        sigma = np.maximum(model.held_sigma, 1e-300)
        return float(np.mean(0.5 * np.log(2 * np.pi) + np.log(sigma) + 0.5 * model.ratios**2))

    def report(self) -> dict[str, Any]:
        """JSON-serialisable; `trials`: measured against predicted by models that had not seen the trial. With `unsaid`
        not null: the counts, and the spread that was measured; no quality, candidate or prediction."""
        counts = {
            "target": self.target,
            "goal": self.goal,
            "n": len(self.arrays.y),
            "mixtures": len(np.unique(self.arrays.groups)),
            "left_out_nulls": self.nulls,
            "signal": self.signal and self.unsaid is None,
            "unsaid": self.unsaid,
            "level": self.level,
            "sd": float(self.raw(self.sd)),
        }
        if self.unsaid is not None:
            return counts | {"candidates": [], "trials": []}
        half, held = self.raw(self.model.quantile(self.level) * self.model.held_sigma), self.raw(self.model.held_mean)
        noise_sd = self.noise_sd
        return counts | {
            "rho": self.rho,
            "r2": self.r2,
            "coverage": self.coverage,
            "nlpd": self.nlpd,
            "noise_sd": None if noise_sd is None else float(self.raw(noise_sd)),
            "candidates": [asdict(score) for score in self.model.scores],
            "trials": [
                {"measured": float(y), "predicted": float(mean), "lower": float(mean - h), "upper": float(mean + h)}
                for y, mean, h in zip(self.raw(self.arrays.y), held, half, strict=True)
            ],
        }

    def text(self) -> str:
        """The report for a terminal."""
        lines = [
            f"{self.target} ({'lower' if self.goal == 'min' else 'higher'} is better), {len(self.arrays.y)} trials"
            + (f" ({self.nulls} without a finite score left out)" if self.nulls else "")
        ]
        if self.too_few is not None:
            return "\n".join([*lines, f"  {self.too_few}"])
        lines += [f"  {'surrogate':<18}{'CV rho':>8}{'CV R2':>8}{'cover':>7}{'weight':>8}"]
        lines += [f"  {s.name:<18}{s.rho:8.2f}{s.r2:8.3f}{s.coverage:7.2f}{s.weight:8.2f}" for s in self.model.scores]
        if len(self.model.scores) > 1:
            lines.append(f"  {'auto':<18}{self.rho:8.2f}{self.r2:8.3f}{self.coverage:7.2f}")
        if self.unsaid is not None:
            lines.append(f"  {self.unsaid}")
        else:
            lines.append(
                f"  the model explains {100 * max(0.0, self.r2):.0f} % of the variance of trials left out; "
                f"{100 * self.level:.0f} % intervals cover {100 * self.coverage:.0f} %; "
                f"noise sd {self.raw(self.noise_sd):.4g} (trials: {self.raw(self.sd):.4g})"
            )
        return "\n".join(lines)


@dataclass
class SurrogateFits:
    """One TargetFit per target over the same tasks."""

    names: tuple[str, ...]
    targets: dict[str, TargetFit]

    def __getitem__(self, target: str) -> TargetFit:
        return self.targets[target]

    @property
    def unsaid(self) -> str | None:
        """Why nothing is shown of any target: the first one's reason; None: some can be predicted."""
        reasons = [fitted.unsaid for fitted in self.targets.values()]
        return reasons[0] if all(reasons) else None

    def unsaid_together(self, weight_J: Floats) -> str | None:
        """Why nothing is said of a mixture's worth in all targets with a weight above 0: too few trials of one of them,
        or no signal in any."""
        counting = [fitted for weight, fitted in zip(weight_J, self.targets.values(), strict=True) if weight > 0]
        few = next((fitted.too_few for fitted in counting if fitted.too_few is not None), None)
        reasons = [fitted.unsaid for fitted in counting]
        return few or (reasons[0] if all(reasons) else None)

    def predict(self, X: ArrayLike | Mixture, *, level: float = 0.9) -> dict[str, Prediction]:
        """{target: Prediction} for rows X [m, K] in the order of `names` (or one Mixture)."""
        rows = X.over(self.names).shares if isinstance(X, Mixture) else X
        return {
            name: Prediction(*map(fitted.raw, fitted.model.predict(rows, level=level)))
            for name, fitted in self.targets.items()
        }

    def report(self) -> dict[str, Any]:
        """{"names": [...], "targets": {target: report}}: JSON-serialisable."""
        return {"names": list(self.names), "targets": {name: fitted.report() for name, fitted in self.targets.items()}}

    def text(self) -> str:
        """All reports for a terminal."""
        return "\n\n".join(fitted.text() for fitted in self.targets.values())


@threadpool_limits.wrap(limits=1, user_api="blas")  # matrices this small: more threads spin, up to 20 x the CPU time
def fit_surrogates(
    trials: TrialLedger | Sequence[TrialRecord],
    targets: Sequence[str] | Literal["all"] = "all",
    surrogate: str = "auto",
    *,
    goal: Mapping[str, Goal] | Goal | None = None,
    cv: int = 5,
    limit: int | None = None,
    seed: int = 0,
    level: float = 0.9,
    progress: Literal["last", "all"] = "last",
    mixed_config: bool = False,
) -> SurrogateFits:
    """One model per target.

    surrogate: "auto" (stack of all) or a name of SURROGATES. cv: folds, grouped by mixture. limit: use the first n
    trials. level: of the intervals. progress: "last" fits each trial's last checkpoint, "all" fits every checkpoint
    with progress as a feature. goal: min or max (per target), where the ledger does not say.
    """
    check_seed(seed)
    ledger = trials if isinstance(trials, TrialLedger) else TrialLedger(None, trials)
    if limit is not None and limit < MINIMUM_TRIALS:
        raise MixError(f"limit is {limit}", where="limit", do=f"the number of trials to use, at least {MINIMUM_TRIALS}")
    if limit is not None:
        ledger = ledger.limited(limit)
    names, wanted = ledger.names, ledger.targets if targets == "all" else tuple(targets)
    if cv < 2:
        raise MixError(f"cv is {cv}", where="cv", do="at least 2 folds")
    fits = {}
    for target in wanted:
        arrays = ledger.to_arrays(target, mixed_config=mixed_config)
        if progress == "last":
            arrays = _last_points(ledger, target, arrays)
        aim: Goal = goal if isinstance(goal, str) else (goal or {}).get(target, ledger.goal(target))
        tau = arrays.progress if progress == "all" and np.ptp(arrays.progress) > 0 else None
        if np.ptp(arrays.y) == 0:
            warnings.warn(
                f"{target}: every trial has the score {arrays.y[0]:.6g}; it is predicted as such", stacklevel=2
            )
        exponent = _exponent(arrays.y)
        arrays = arrays._replace(y=np.ldexp(arrays.y, -exponent)) if exponent else arrays
        model = Stack(candidates=candidates_of(surrogate, goal=aim), folds=cv, seed=seed)
        model.fit(arrays.X, arrays.y, groups=arrays.groups, progress=tau, weights=None)
        count = trials_with(ledger.records, target)
        fits[target] = TargetFit(target, aim, model, arrays, level, ledger.nulls(target), count, exponent)
    return SurrogateFits(names, fits)


def _exponent(y: Floats) -> int:
    """The power of two to divide scores by so that their squares are numbers; 0 for scores as people have them."""
    largest = float(np.abs(y).max())
    return 0 if largest == 0 or SMALL < largest < 1 / SMALL else math.frexp(largest)[1]


def _last_points(ledger: TrialLedger, target: str, arrays: Arrays) -> Arrays:
    """Only each trial's last checkpoint; the end of a trial that was given up is predicted (`completed`)."""
    trial_of = [record.trial for record in ledger.records if record.scores.get(target) is not None]
    last: dict[str, int] = {}
    course: dict[str, dict[float, float]] = {}
    for row, trial in enumerate(trial_of):
        course.setdefault(trial, {})[float(arrays.progress[row])] = float(arrays.y[row])
        if trial not in last or arrays.progress[row] >= arrays.progress[last[trial]]:
            last[trial] = row
    ends = completed({trial: (arrays.progress[row], arrays.y[row]) for trial, row in last.items()}, course)
    keep = np.array(sorted(last.values()), dtype=np.int64)
    found = Arrays._make(column[keep] for column in arrays)
    return found._replace(y=np.array([ends[trial_of[row]] for row in keep]))
