"""What each dataset is worth: the surrogates at share 0 of a task, its share given to the others in proportion, against
the mixture as it is.

    without_k = p with p_k = 0, divided by (1 - p_k)
    worth_k   = objective(without_k) - objective(p)       > 0: the dataset helps; in sd of the scores over the trials

The interval is that of joint draws of the surfaces at all K + 1 mixtures (Stack.sample: the posterior of the Gaussian
process and the disagreement of the candidates), scaled by the calibration as the verdict of a proposal is. Nothing was
chosen by the trials here, so there is no winner's curse to remove and no halving of them. "helps" and "hurts" are said
at a probability of 95 % each, as "better" is: of datasets that do nothing at most one in ten is called either.

A surrogate is not believed outside the trials. Where no trial has (nearly) none of the dataset, or the mixture without
it has more of another than any trial, the verdict is "can't be told", with the reason and without a number.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
from threadpoolctl import threadpool_limits

from data_mixers.common.errors import MixError, check_seed
from data_mixers.fitting.surrogate_fits import SurrogateFits
from data_mixers.fitting.target_fit import TargetFit
from data_mixers.mixture.mixture import Floats, Mixture
from data_mixers.propose.proposal import Objective, target_weights
from data_mixers.propose.significance import CERTAIN, DRAWS, GAUSSIAN_90

HELPS, HURTS, UNTOLD = "helps", "hurts", "can't be told"
NEAR_NONE = 0.25  # of the current share: a trial with as little of a dataset says what its absence does
LITTLE = 0.02  # a share that is near none whatever the current one is
BEYOND = 0.1  # of the largest share of a task in the trials: how far the mixture without a dataset may go above it


@dataclass(frozen=True)
class Effect:
    """With the dataset minus without it: of a score in its units, of the objective in sd (turned: positive = helps)."""

    mean: float
    lower: float
    upper: float
    probability: float  # that the dataset helps
    verdict: str

    def as_dict(self) -> dict[str, Any]:
        """JSON-serialisable."""
        return dict(vars(self))


@dataclass(frozen=True)
class DatasetWorth:
    """`objective` and `targets` are empty where nothing can be said, because of `why`."""

    dataset: str
    share: float
    verdict: str
    objective: Effect | None = None
    targets: dict[str, Effect] = field(default_factory=dict)
    why: str | None = None


@dataclass(frozen=True)
class Blame:
    """One DatasetWorth per task, those that hurt most first; unsaid: why nothing is said of any."""

    mixture: Mixture
    level: float
    datasets: list[DatasetWorth]
    unsaid: str | None = None

    @classmethod
    def undecided(cls, mixture: Mixture, why: str, level: float = 0.9) -> Blame:
        """No number of any dataset, because of `why` (too_few_trials, TargetFit.unsaid)."""
        worths = [DatasetWorth(name, share, UNTOLD, why=why) for name, share in mixture.as_dict().items()]
        return cls(mixture, level, worths, why)

    def as_dict(self) -> dict[str, Any]:
        """JSON-serialisable."""
        return {
            "mixture": self.mixture.as_dict(),
            "level": self.level,
            "unsaid": self.unsaid,
            "datasets": {
                worth.dataset: {
                    "share": worth.share,
                    "verdict": worth.verdict,
                    "why": worth.why,
                    "objective": None if worth.objective is None else worth.objective.as_dict(),
                    "targets": {name: effect.as_dict() for name, effect in worth.targets.items()},
                }
                for worth in self.datasets
            },
        }

    def text(self) -> str:
        """A table for a terminal: the objective, then every target for which a dataset helps or hurts."""
        if self.unsaid is not None:
            return self.unsaid
        head = f"worth ({100 * self.level:.0f} % interval)"
        lines = [f"{'dataset':<24}{'share':>8}{head:>28}{'helps':>8}  verdict"]
        for worth in self.datasets:
            start = f"{worth.dataset:<24}{worth.share:8.4f}"
            if worth.objective is None:
                lines.append(f"{start}{'-':>28}{'-':>8}  {worth.verdict}: {worth.why}")
                continue
            found = worth.objective
            cell = f"{found.mean:.3f} ({found.lower:.3f} to {found.upper:.3f})"
            lines.append(f"{start}{cell:>28}{100 * found.probability:6.0f} %  {found.verdict}")
        lines += ["", "worth: what the objective loses without the dataset, its share given to the others in "
                  "proportion, in sd of the scores over the trials"]  # fmt: skip
        told = [(worth.dataset, name, effect) for worth in self.datasets for name, effect in worth.targets.items()
                if effect.verdict != UNTOLD]  # fmt: skip
        if told:
            lines += ["", f"{'dataset':<24}{'target':<24}{'score with it - without':>36}  verdict"]
        for dataset, name, effect in told:
            cell = f"{effect.mean:.4g} ({effect.lower:.4g} to {effect.upper:.4g})"
            lines.append(f"{dataset:<24}{name:<24}{cell:>36}  {effect.verdict}")
        return "\n".join(lines)


@threadpool_limits.wrap(limits=1, user_api="blas")  # as in fit
def blame(
    fits: SurrogateFits, objective: Objective = "mean", *, current: Mixture, level: float = 0.9, seed: int = 0
) -> Blame:
    """What each dataset of the `current` mixture is worth, for the objective and for every target."""
    check_seed(seed)
    names = fits.names
    if len(names) < 2:
        raise MixError("one task", where="blame", do="at least two: without the only one nothing is left")
    current = current.over(names, where="current")
    weight_J, p_K = target_weights(fits, objective), current.shares
    if (why := fits.unsaid_together(weight_J)) is not None:
        return Blame.undecided(current, why, level)
    trials = np.unique(np.vstack([fitted.arrays.X for fitted in fits.targets.values()]), axis=0)
    trials = trials / trials.sum(axis=1, keepdims=True)
    rows = np.vstack([p_K, *(_without(p_K, k) for k in range(len(names)))])
    said = {name: fitted for name, fitted in fits.targets.items() if fitted.unsaid is None}
    draws = {name: _draws(fitted, rows, seed + number) for number, (name, fitted) in enumerate(said.items())}
    g_J = np.stack([said[name].standardized(draws[name]) if name in said else np.zeros((DRAWS, len(rows)))
                    for name in fits.targets])  # fmt: skip
    total = g_J.max(axis=0) if objective == "worst" else np.tensordot(weight_J, g_J, axes=1)
    worths = []
    for k, name in enumerate(names):
        why = _outside(names, p_K, rows[k + 1], trials, k)
        if why is not None:
            worths.append(DatasetWorth(name, float(p_K[k]), UNTOLD, why=why))
            continue
        whole = _effect(total[:, k + 1] - total[:, 0], 1.0, level)
        effects = {}
        for target, fitted in said.items():
            change = fitted.raw(draws[target][:, 0]) - fitted.raw(draws[target][:, k + 1])
            effects[target] = _effect(change, -fitted.sign, level)
        worths.append(DatasetWorth(name, float(p_K[k]), whole.verdict, whole, effects))
    order = sorted(worths, key=lambda worth: np.inf if worth.objective is None else worth.objective.mean)
    return Blame(current, level, order)


def _without(p_K: Floats, k: int) -> Floats:
    """p without task k, the others in proportion; where it is all there is, the others evenly."""
    rest = np.where(np.arange(len(p_K)) == k, 0.0, p_K)
    if rest.sum() <= 0:
        rest = np.where(np.arange(len(p_K)) == k, 0.0, 1.0)
    return rest / rest.sum()


def _draws(fitted: TargetFit, rows: Floats, seed: int) -> Floats:
    """[DRAWS, m] joint draws in units of the fit, their spread scaled up where trials left out were missed."""
    drawn = fitted.model.sample(rows, DRAWS, seed)
    mean, scale = fitted.model.mean(rows), max(1.0, fitted.model.quantile(0.9) / GAUSSIAN_90)
    return mean + scale * (drawn - mean)


def _effect(change_D: Floats, good: float, level: float) -> Effect:
    """`good` 1: a positive change is good; -1: a negative one."""
    helps = float(np.mean(good * change_D > 0))
    hurts = float(np.mean(good * change_D < 0))
    verdict = HELPS if helps >= CERTAIN else HURTS if hurts >= CERTAIN else UNTOLD
    lower, upper = np.quantile(change_D, [(1 - level) / 2, (1 + level) / 2]).tolist()
    return Effect(float(change_D.mean()), lower, upper, helps, verdict)


def _outside(names: tuple[str, ...], p_K: Floats, without_K: Floats, trials: Floats, k: int) -> str | None:
    """Why the trials say nothing of the mixture without task k; None: they do."""
    if p_K[k] <= 0:
        return "its share is 0 already"
    least = float(trials[:, k].min())
    if least > max(LITTLE, NEAR_NONE * p_K[k]):
        return f"no trial has less than {least:.3g} of it; let some trials do without it"
    most_K = trials.max(axis=0)
    beyond = np.flatnonzero(without_K > (1 + BEYOND) * most_K)
    if len(beyond):
        j = int(beyond[0])
        return f"without it {names[j]} has {without_K[j]:.3g}, more than in any trial ({most_K[j]:.3g})"
    return None
