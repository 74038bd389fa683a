"""fit: trials -> one model per target, chosen and weighted by grouped cross-validation, with calibrated intervals.

One model per target, always: aggregating the targets first loses (RegMix, mean of 13 losses at 60M: 96.8 per target,
93.5 on the mean). What is reported of a model comes from trials it has not seen.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
from numpy.typing import ArrayLike
from threadpoolctl import threadpool_limits

from data_mixers.common.errors import MixError, check_seed
from data_mixers.fitting.enough_trials import trials_with
from data_mixers.fitting.logit_link import LogitLink, ScoreBounds
from data_mixers.fitting.target_fit import TargetFit
from data_mixers.mixture.mixture import Floats, Mixture
from data_mixers.surrogates.base import MINIMUM_TRIALS, Prediction
from data_mixers.surrogates.registry import candidates_of
from data_mixers.surrogates.stack import Stack
from data_mixers.sweep.early_termination import completed
from data_mixers.sweep.ledger import Arrays, TrialLedger
from data_mixers.sweep.trial import Goal, TrialRecord

Link = Literal["auto", "none", "logit"]
SMALL = 1e-60


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
            name: fitted.raw_prediction(fitted.model.predict(rows, level=level))
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
    bounds: Mapping[str, ScoreBounds] | None = None,
    link: Link = "auto",
) -> SurrogateFits:
    """One model per target.

    surrogate: "auto" (stack of all) or a name of SURROGATES. cv: folds, grouped by mixture. limit: use the first n
    trials. level: of the intervals. progress: "last" fits each trial's last checkpoint, "all" fits every checkpoint
    with progress as a feature. goal: min or max (per target), where the ledger does not say.

    bounds: {target: (lowest, highest) score there can be}, None for no bound on that side; predictions stay inside.
    link: fit a target with both bounds as it is ("none"), by its logit ("logit"; see logit_link.py), or by whichever
    of the two predicts trials left out better ("auto"). Targets without both bounds are fitted as they are.
    """
    check_seed(seed)
    ledger = trials if isinstance(trials, TrialLedger) else TrialLedger(None, trials)
    if limit is not None and limit < MINIMUM_TRIALS:
        raise MixError(f"limit is {limit}", where="limit", do=f"the number of trials to use, at least {MINIMUM_TRIALS}")
    if limit is not None:
        ledger = ledger.limited(limit)
    names, wanted = ledger.names, ledger.targets if targets == "all" else tuple(targets)
    if link == "logit" and not any(None not in (bounds or {}).get(name, (None, None)) for name in wanted):
        raise MixError("link logit, but no target has two bounds", where="link", do="give bounds (low, high)")
    if cv < 2:
        raise MixError(f"cv is {cv}", where="cv", do="at least 2 folds")
    fits = {}
    for target in wanted:
        arrays = ledger.to_arrays(target, mixed_config=mixed_config)
        limits = _checked_bounds(target, arrays.y, (bounds or {}).get(target, (None, None)))
        if progress == "last":
            arrays = _last_points(ledger, target, arrays)
            if limits != (None, None):  # the end of a trial that was given up is a regression's
                arrays = arrays._replace(y=np.clip(arrays.y, *limits))
        aim: Goal = goal if isinstance(goal, str) else (goal or {}).get(target, ledger.goal(target))
        tau = arrays.progress if progress == "all" and np.ptp(arrays.progress) > 0 else None
        if np.ptp(arrays.y) == 0:
            warnings.warn(
                f"{target}: every trial has the score {arrays.y[0]:.6g}; it is predicted as such", stacklevel=2
            )
        exponent = _exponent(arrays.y)
        arrays = arrays._replace(y=np.ldexp(arrays.y, -exponent)) if exponent else arrays
        count = trials_with(ledger.records, target)
        tried: dict[str, TargetFit] = {}
        for way, found in _links(arrays.y, limits, link, exponent).items():
            model = Stack(candidates=candidates_of(surrogate, goal=aim), folds=cv, seed=seed)
            fitted = arrays if found is None else arrays._replace(y=found.forward(arrays.y))
            model.fit(fitted.X, fitted.y, groups=fitted.groups, progress=tau, weights=None)
            tried[way] = TargetFit(
                target, aim, model, fitted, level, ledger.nulls(target), count, arrays.y, exponent, found, limits
            )
        best = max(tried.values(), key=lambda fit: fit.r2)
        fits[target] = replace(best, tried={way: fit.r2 for way, fit in tried.items()} if len(tried) > 1 else {})
    return SurrogateFits(names, fits)


def _checked_bounds(target: str, y: Floats, limits: ScoreBounds) -> ScoreBounds:
    """The bounds; MixError where they are none. Warns and drops them where a score lies outside."""
    low, high = limits
    if low is not None and high is not None and not low < high:
        raise MixError(f"bounds of {target}: {low} to {high}", where="bounds", do="the lower one first")
    if (low is not None and y.min() < low) or (high is not None and y.max() > high):
        warnings.warn(
            f"{target}: bounds {low} to {high}, but scores from {y.min():.6g} to {y.max():.6g}; it is fitted without "
            "bounds",
            stacklevel=3,
        )
        return None, None
    return limits


def _links(y: Floats, limits: ScoreBounds, link: Link, exponent: int) -> dict[str, LogitLink | None]:
    """The ways to fit scores y [n], already divided by 2^exponent."""
    low, high = limits
    if link == "none" or low is None or high is None or np.ptp(y) == 0:
        return {"none": None}
    low, high = np.ldexp([low, high], -exponent).tolist()
    found = LogitLink.of(y, low, high)
    return {"logit": found} if link == "logit" else {"none": None, "logit": found}


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
