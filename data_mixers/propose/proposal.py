"""propose: the best allowed mixture by the fitted surrogates, what it is worth, and whether to believe it.

    min_p  mean_j w_j g_j(p) + kl KL(p || prior)     over Bounds,     g_j = the target's prediction, standardised by its
                                                                      sd over the trials and turned so that low is good

Caps belong in the solve, not in the design (Olmix, arXiv 2602.12237, from which kl = 0.05; there the targets are losses
in bits per byte, here they are standardised, so 0.05 is a weaker pull). The surrogate's own optimum is never presented
as a result: the gain comes from cross-fitting (significance.py).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from threadpoolctl import threadpool_limits

from data_mixers.common.errors import MixError, check_seed
from data_mixers.design.designs import candidate_mixtures
from data_mixers.fitting.surrogate_fits import SurrogateFits
from data_mixers.mixture.bounds import Bounds
from data_mixers.mixture.mixture import Floats, Mixture, check_known
from data_mixers.propose.optimizer import kl_to, minimize, minimize_convex
from data_mixers.propose.significance import judge, unsaid_verdict
from data_mixers.surrogates.parametric_laws import ExpLaw

Objective = Literal["mean", "worst"] | Mapping[str, float]


@dataclass(frozen=True)
class Proposal:
    """The optimum (`mixture`), and `kept`: the mixture to play (the current one unless the verdict is better).

    moved: what the mixture that was played breaks of the bounds; `current` is then the nearest one inside them.

    Where nothing can be said (verdict "no signal" or "too few trials to say") `mixture` is the current one too, and
    there is no gain and no prediction; a target of which nothing can be said has none in any case.
    """

    mixture: Mixture
    current: Mixture
    prior: Mixture
    predicted: dict[str, tuple[float, float, float]]  # target -> mean, lower, upper at `mixture`
    predicted_current: dict[str, tuple[float, float, float]]
    gain: tuple[float, float, float] | None
    verdict: str
    probability: float | None
    text: str
    epochs: dict[str, float] | None
    kl_to_prior: float
    l1_spread: float | None  # mean L1 distance between optima of resampled trials and `mixture`: how firm it is
    binding: list[str]
    objective: float | None
    details: dict[str, Any]
    moved: str | None = None

    @classmethod
    def undecided(cls, why: str, *, current: Mixture, prior: Mixture, bounds: Bounds) -> Proposal:
        """The current mixture, without any number, because of `why` (too_few_trials, TargetFit.unsaid)."""
        verdict = unsaid_verdict(why)
        current, moved = _inside(current, bounds)
        return cls(
            mixture=current,
            current=current,
            prior=prior,
            predicted={},
            predicted_current={},
            gain=None,
            verdict=verdict.word,
            probability=None,
            text=_with_move(verdict.text, moved),
            epochs=_epochs(bounds, current),
            kl_to_prior=float(kl_to(prior.shares, current.shares[None])[0]),
            l1_spread=None,
            binding=[],
            objective=None,
            details=verdict.as_dict(),
            moved=moved,
        )

    @property
    def said(self) -> bool:
        """Whether the trials say anything: else `mixture` is no proposal."""
        return self.gain is not None

    @property
    def kept(self) -> Mixture:
        """What to play: `mixture` if it is better, else the current mixture."""
        return self.mixture if self.verdict == "better" else self.current

    @property
    def kept_as(self) -> str:
        """What `kept` is, in words."""
        if self.verdict == "better":
            return "the proposed mixture"
        return "the current mixture, kept" if self.moved is None else "the current mixture, moved inside the bounds"

    def to_yaml(self, path: str | Path) -> None:
        """Write `kept` with the verdict as a comment."""
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        self.kept.to_yaml(
            path,
            comment="\n".join(
                ["mixture proposed from trials" if self.verdict == "better" else self.kept_as, self.text]
            ),
        )

    def table(self) -> str:
        """For a terminal: shares and predicted targets, current beside proposed, and the verdict."""
        epochs = self.epochs or {}
        proposed = {name: f"{share:10.4f}" if self.said else "" for name, share in self.mixture.as_dict().items()}
        head = f"{'task':<24}{'current':>9}" + (f"{'proposed':>10}" if self.said else "")
        lines = [head + (f"{'epochs':>9}" if epochs else "")]
        for name, share in proposed.items():
            tail = f"{epochs[name]:9.2f}" if epochs else ""
            lines.append(f"{name:<24}{self.current[name]:9.4f}{share}{tail}")
        if self.binding:
            lines.append(f"held back by: {', '.join(self.binding)}")
        if self.predicted:
            lines += ["", f"{'target':<24}{'current':>28}{'proposed':>32}"]
        for name, pair in self.predicted.items():
            cells = [f"{m:.4g} ({low:.4g} to {high:.4g})" for m, low, high in (self.predicted_current[name], pair)]
            lines.append(f"{name:<24}{cells[0]:>28}{cells[1]:>32}")
        return "\n".join([*lines, "", self.text])

    def as_dict(self) -> dict[str, Any]:
        """JSON-serialisable."""
        mixtures = {name: getattr(self, name).as_dict() for name in ("mixture", "current", "prior", "kept")}
        lists = {
            "predicted": {name: list(values) for name, values in self.predicted.items()},
            "predicted_current": {name: list(values) for name, values in self.predicted_current.items()},
            "gain": None if self.gain is None else list(self.gain),
        }
        return mixtures | lists | {key: value for key, value in vars(self).items() if key not in mixtures | lists}


def target_weights(fits: SurrogateFits, objective: Objective) -> Floats:
    """Weights [J] of the targets, sum 1 ("worst": equal, the maximum is taken elsewhere)."""
    names = tuple(fits.targets)
    if isinstance(objective, str):
        if objective not in ("mean", "worst"):
            raise MixError(f"objective {objective!r}", where="objective", do="mean, worst, or {target: weight}")
        return np.full(len(names), 1 / len(names))
    check_known(objective, names, where="objective", kind="target")
    weight_J = np.array([float(objective.get(name, 0.0)) for name in names])
    if not np.all(np.isfinite(weight_J)) or np.any(weight_J < 0) or weight_J.sum() <= 0:
        raise MixError(f"objective {dict(objective)}", where="objective", do="weights >= 0, not all 0")
    return weight_J / weight_J.sum()


def standardized(fits: SurrogateFits, rows: Floats) -> Floats:
    """g [J, m]: predictions centred and divided by the spread over the trials, turned so that lower is better."""
    return np.stack([fitted.standardized(fitted.model.mean(rows)) for fitted in fits.targets.values()])


@threadpool_limits.wrap(limits=1, user_api="blas")  # as in fit
def propose_mixture(
    fits: SurrogateFits,
    objective: Objective = "mean",
    bounds: Bounds | None = None,
    *,
    prior: Mixture,
    current: Mixture | None = None,
    kl: float = 0.05,
    level: float = 0.9,
    min_gain: float = 0.0,
    seed: int = 0,
) -> Proposal:
    """The mixture that minimises the objective over the bounds, its predictions, and the verdict against `current`
    (default: the prior; where it breaks the bounds, the nearest mixture inside them is what there is to beat and to
    keep). min_gain: the gain (in standardised units) below which a change is not worth it."""
    check_seed(seed)
    for name, number in (("kl", kl), ("min_gain", min_gain)):
        if not 0 <= number < math.inf:
            raise MixError(f"{name} is {number}", where=name, do="a number >= 0")
    names = fits.names
    prior, current = prior.over(names, where="prior"), (current or prior).over(names, where="current")
    bounds = (bounds or Bounds()).over(names)
    bounds.check_feasible()
    weight_J = target_weights(fits, objective)
    worst = objective == "worst"
    if (why := fits.unsaid_together(weight_J)) is not None:
        return Proposal.undecided(why, current=current, prior=prior, bounds=bounds)
    current, moved = _inside(current, bounds)

    def value(rows: Floats) -> Floats:
        g = standardized(fits, rows)
        return g.max(axis=0) if worst else weight_J @ g

    trials = np.unique(np.vstack([fitted.arrays.X for fitted in fits.targets.values()]), axis=0)
    trials = trials / trials.sum(axis=1, keepdims=True)
    pool = candidate_mixtures(bounds, 1000, prior=prior, seed=seed)
    allowed_trials = bounds.project(trials)
    starts = np.vstack([prior.shares, current.shares, allowed_trials, pool])
    best_K, objective_value = minimize(value, bounds, starts, kl=kl, prior_K=prior.shares)
    law = None if worst else _law_objective(fits, weight_J)
    if law is not None:
        exact_K, exact = minimize_convex(law, bounds, kl=kl, prior_K=prior.shares)
        if exact <= objective_value + 1e-9:
            best_K, objective_value = exact_K, exact

    candidates = np.vstack([best_K, allowed_trials, pool])
    verdict = judge(
        fits,
        weight_J,
        candidates,
        current.shares,
        kl=kl,
        prior_K=prior.shares,
        min_gain=min_gain,
        level=level,
        worst=worst,
        seed=seed,
    )
    mixture = Mixture(names, best_K)
    return Proposal(
        mixture=mixture,
        current=current,
        prior=prior,
        predicted=_predicted(fits, mixture, level),
        predicted_current=_predicted(fits, current, level),
        gain=verdict.gain,
        verdict=verdict.word,
        probability=verdict.probability,
        text=_with_move(verdict.text, moved),
        epochs=_epochs(bounds, mixture),
        kl_to_prior=float(kl_to(prior.shares, mixture.shares[None])[0]),
        l1_spread=_spread(fits, weight_J, candidates, mixture, kl=kl, prior_K=prior.shares, seed=seed),
        binding=_binding(bounds, mixture.shares),
        objective=objective_value,
        details=verdict.as_dict() | {"kl": kl, "level": level, "min_gain": min_gain, "weights": weight_J.tolist()},
        moved=moved,
    )


def _inside(current: Mixture, bounds: Bounds) -> tuple[Mixture, str | None]:
    """The mixture, or the nearest one inside the bounds and what it breaks of them. Infeasible if there is none."""
    bounds.check_feasible()
    broken = bounds.violations(current)
    if not broken:
        return current, None
    more = f"; and {len(broken) - 3} more" if len(broken) > 3 else ""
    return Mixture(current.names, bounds.project(current)), "; ".join(broken[:3]) + more


def _with_move(text: str, moved: str | None) -> str:
    if moved is None:
        return text
    return f"{text}\nyour current mixture breaks the bounds ({moved}); the nearest one inside them stands for it"


def _law_objective(fits: SurrogateFits, weight_J: Floats):
    """f and gradient where every target is a single exponential law of a loss (convex); else None."""
    terms = []
    for weight, fitted in zip(weight_J, fits.targets.values(), strict=True):
        models = list(fitted.model.models.values())
        if weight == 0 or fitted.model.constant is not None:
            continue
        if len(models) != 1 or not isinstance(models[0], ExpLaw) or fitted.goal == "max" or fitted.link is not None:
            return None
        terms.append((weight / fitted.unit, models[0], float(fitted.arrays.y.mean())))

    def value(p: Floats) -> tuple[float, Floats]:
        total, gradient = 0.0, np.zeros_like(p)
        for scale, law, centre in terms:
            mean, slope = law.value_and_gradient(p)
            total, gradient = total + scale * (mean - centre), gradient + scale * slope
        return total, gradient

    return value if terms else None


def _predicted(fits: SurrogateFits, mixture: Mixture, level: float) -> dict[str, tuple[float, float, float]]:
    return {
        name: (float(mean[0]), float(lower[0]), float(upper[0]))
        for name, (mean, lower, upper) in fits.predict(mixture, level=level).items()
        if fits[name].unsaid is None
    }


def _epochs(bounds: Bounds, mixture: Mixture) -> dict[str, float] | None:
    if bounds.sizes is None or bounds.total is None:
        return None
    return dict(zip(mixture.names, mixture.epochs(bounds.sizes, bounds.total).tolist(), strict=True))


def _binding(bounds: Bounds, p_K: Floats) -> list[str]:
    """Limits that hold the optimum back."""
    out = []
    for name, p, low, high in zip(bounds._named(), p_K, bounds.lower(), bounds.upper(), strict=True):
        if high < 1 and p > high - 1e-6:
            out.append(f"cap of {name} ({high:.4g})")
        if low > 0 and p < low + 1e-6:
            out.append(f"floor of {name} ({low:.4g})")
    for group, mask in zip(bounds.groups, bounds.member_masks(), strict=True):
        total = p_K[mask].sum()
        if total > group.high - 1e-6 and group.high < 1:
            out.append(f"group {group.name} at most {group.high:.4g}")
        if total < group.low + 1e-6 and group.low > 0:
            out.append(f"group {group.name} at least {group.low:.4g}")
    return out


def _spread(
    fits: SurrogateFits, weight_J: Floats, candidates: Floats, best: Mixture, *, kl: float, prior_K: Floats, seed: int
) -> float:
    """Mean L1 distance from `best` of the best candidate under 50 joint draws of the surfaces."""
    rows = candidates[:300]
    total = np.tile(kl * kl_to(prior_K, rows), (50, 1))
    for number, (weight, fitted) in enumerate(zip(weight_J, fits.targets.values(), strict=True)):
        if weight > 0 and fitted.signal:
            total = total + weight * fitted.standardized(fitted.model.sample(rows, 50, seed + number))
    return float(np.mean(np.abs(rows[np.argmin(total, axis=1)] - best.shares).sum(axis=1)))
