"""The model of one target, what is known of its quality, and its predictions in the units of the scores."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from data_mixers.fitting.enough_trials import TOO_FEW, too_few_trials
from data_mixers.fitting.logit_link import LogitLink, ScoreBounds
from data_mixers.mixture.mixture import Floats
from data_mixers.surrogates.base import Prediction
from data_mixers.surrogates.stack import Stack, repeat_variance, spearman
from data_mixers.sweep.ledger import Arrays
from data_mixers.sweep.trial import Goal

NO_SIGNAL = f"no signal: no surrogate predicts a trial better than the mean of the others; {TOO_FEW}, or too noisy"


@dataclass
class TargetFit:
    """The model of one target and what is known of its quality.

    The model is fitted on `arrays.y`: the `scores`, or their logits where there is a `link`. Either way they are
    divided by 2^exponent first, which is 1 but for scores beyond all measure. sd, unit, r2, rho, noise_sd and
    standardized are of the scores (divided so), not of their logits.
    """

    target: str
    goal: Goal
    model: Stack
    arrays: Arrays
    level: float
    nulls: int  # trials left out because their score is not finite
    trials: int  # with a finite score
    scores: Floats  # [n], divided by 2^exponent
    exponent: int = 0  # scores beyond all measure are fitted divided by this power of two
    link: LogitLink | None = None
    bounds: ScoreBounds = (None, None)  # of the scores as they are
    tried: Mapping[str, float] = field(default_factory=dict)  # {link: R2 on trials left out}, where there was a choice

    def raw(self, fitted: Any) -> Any:
        """What the model says (an array, or one number) as the scores have it."""
        return self.raw_size(self._score(fitted))

    def raw_size(self, size: Any) -> Any:
        """A difference or an sd of scores, divided by 2^exponent, as the scores have it."""
        return size if self.exponent == 0 else np.ldexp(size, self.exponent)

    def raw_prediction(self, fitted: Prediction) -> Prediction:
        """Mean and interval of the model in units of the scores, inside their bounds. With a link the mean is the
        median of the score: medians and quantiles commute with a monotone map, means don't."""
        mean, lower, upper = fitted
        if self.link is None:
            ends = [self.raw(mean), self.raw(lower), self.raw(upper)]
        else:
            link = self.link
            ends = [self.raw(mean), self.raw_size(link.lower_end(lower)), self.raw_size(link.upper_end(upper))]
        return (
            Prediction(*ends) if self.bounds == (None, None) else Prediction(*(np.clip(x, *self.bounds) for x in ends))
        )

    def fitted_units(self, scores: Floats) -> Floats:
        """Scores as they are [...] in what the model is fitted on."""
        scaled = scores if self.exponent == 0 else np.ldexp(scores, -self.exponent)
        return scaled if self.link is None else self.link.forward(scaled)

    def _score(self, fitted: Any) -> Any:
        return fitted if self.link is None else self.link.inverse(fitted)

    def score_slope(self, a: ArrayLike, b: ArrayLike) -> Any:
        """Difference of the scores over the difference of the model's numbers a and b."""
        return 1.0 if self.link is None else self.link.slope(np.asarray(a), np.asarray(b))

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
        return float(self.scores.std())

    @property
    def sign(self) -> float:
        """1 where low is good, else -1."""
        return 1.0 if self.goal == "min" else -1.0

    @property
    def unit(self) -> float:
        """What scores are divided by in an objective: their sd; 1 for a constant score."""
        return self.sd if self.sd > 0 else 1.0

    def standardized(self, fitted: Floats) -> Floats:
        """What the model says [...] as a score centred on the trials, in units of their sd, turned so that low is
        good."""
        return self.sign * (self._score(fitted) - self.scores.mean()) / self.unit

    @property
    def noise_sd(self) -> float | None:
        """sd of the score between runs of the same mixture: from repeats, else from the GP (with a link: times its
        mean slope over the trials); None: constant score."""
        repeats = repeat_variance(self.scores, self.arrays.groups, self.arrays.progress)
        if repeats is not None:
            return math.sqrt(repeats)
        if self.model.constant is not None:
            return None
        slope = 1.0 if self.link is None else float(np.sqrt(np.mean(self.link.slope(self.arrays.y) ** 2)))
        return slope * math.sqrt(self.model.carrier().noise_variance)

    @property
    def r2(self) -> float:
        """Share of the variance that the model explains on trials left out."""
        if self.model.constant is not None:
            return 0.0
        y = self.scores
        return float(1 - np.mean((y - self._score(self.model.held_mean)) ** 2) / y.var())

    @property
    def rho(self) -> float:
        """Spearman x 100 on trials left out."""
        return 0.0 if self.model.constant is not None else spearman(self.model.held_mean, self.scores)

    @property
    def coverage(self) -> float:
        """Share of left-out trials inside their interval, the interval's width taken from the other folds only."""
        model = self.model
        return 1.0 if model.constant is not None else model.coverage_of(model.ratios, self.level)

    @property
    def nlpd(self) -> float:
        """Mean negative log density of the left-out scores under the Gaussian mean +- sigma (uncalibrated), which with
        a link is one of logits."""
        model = self.model
        if model.constant is not None:
            return -math.inf
        sigma = np.maximum(model.held_sigma, 1e-300)
        if self.link is not None:
            sigma = sigma * self.link.slope(self.arrays.y)
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
            "sd": float(self.raw_size(self.sd)),
            "link": "none" if self.link is None else "logit",
            "tried": dict(self.tried),
        }
        if self.unsaid is not None:
            return counts | {"candidates": [], "trials": []}
        held, half = self.model.held_mean, self.model.quantile(self.level) * self.model.held_sigma
        shown = self.raw_prediction(Prediction(held, held - half, held + half))
        noise_sd = self.noise_sd
        return counts | {
            "rho": self.rho,
            "r2": self.r2,
            "coverage": self.coverage,
            "nlpd": self.nlpd,
            "noise_sd": None if noise_sd is None else float(self.raw_size(noise_sd)),
            "candidates": [asdict(score) for score in self.model.scores],
            "trials": [
                {"measured": float(y), "predicted": float(mean), "lower": float(lower), "upper": float(upper)}
                for y, mean, lower, upper in zip(self.raw_size(self.scores), *shown, strict=True)
            ],
        }

    def text(self) -> str:
        """The report for a terminal."""
        lines = [
            f"{self.target} ({'lower' if self.goal == 'min' else 'higher'} is better), {len(self.arrays.y)} trials"
            + (f" ({self.nulls} without a finite score left out)" if self.nulls else "")
            + ("" if self.link is None else ", fitted by its logit")
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
                f"noise sd {self.raw_size(self.noise_sd):.4g} (trials: {self.raw_size(self.sd):.4g})"
            )
        return "\n".join(lines)
