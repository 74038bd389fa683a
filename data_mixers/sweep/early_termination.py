"""Giving up trials that cannot become good: early stopping of a sweep's runs, the same whatever the order or restarts.

The first trials of a sweep (`reference` of them, in its shuffled order) run to the end and are scored on the way. For
each such check the final objective is regressed on the objective so far, over the reference trials:

    g_i(tau) = mean over targets of (score - reference mean at tau) / reference sd at tau,  turned so that low is good
    G_i ~ a + b g_i(tau),   a later trial ends where a + b g - t s sqrt(1 + 1/n + (g - mean)^2 / Sgg) > median of G

so a trial is stopped where even the optimistic 95 % bound of its end is worse than the better half of the reference. At
a check that says little about the end, s is large and nothing is stopped. (The median stopping rule of Google Vizier,
Golovin et al., KDD 2017, with a prediction in place of the running average.) The rule depends on the reference trials
only: a sweep killed and restarted, or run by more workers, stops the same trials.

A stopped trial stays in the fit: its last score is predicted, per target, from its score at the check by the trials
that have both (`completed`).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from data_mixers.mixture.mixture import Floats

MINIMUM = 6  # reference trials with all scores; fewer say too little for a rule
CERTAINTY = 0.95
ENOUGH = 5  # finished trials with a score at a check, to predict the last score of a stopped one
Points = Sequence[tuple[float, Mapping[str, float | None]]]


@dataclass(frozen=True)
class EarlyTermination:
    """Give up hopeless trials after `reference` full ones."""

    reference: int = 8


@dataclass(frozen=True)
class Check:
    """What the reference trials say at one share of a run."""

    progress: float
    mean: Mapping[str, float]  # target -> reference mean and sd at this progress
    sd: Mapping[str, float]
    line: tuple[float, float, float, float, float, int]  # a, b, s, mean of g, Sgg, n

    def bound(self, g: float) -> float:
        """Optimistic bound of the final objective of a trial whose objective is g now."""
        from scipy.stats import t as student

        a, b, s, centre, square, n = self.line
        spread = s * math.sqrt(1 + 1 / n + (g - centre) ** 2 / square)
        return a + b * g - float(student.ppf(CERTAINTY, n - 2)) * spread


@dataclass(frozen=True)
class StopRule:
    """`hopeless(progress, scores)`: whether to give a trial up. Picklable: it goes to the workers."""

    sign: Mapping[str, float]  # target -> 1 (low is good) or -1
    checks: tuple[Check, ...]
    median: float

    def hopeless(self, progress: float, scores: Mapping[str, float | None]) -> bool:
        """True where the trial can be given up; never where a score is missing. A diverged trial (NaN) always can."""
        check = next((check for check in self.checks if abs(check.progress - progress) < 1e-6), None)
        known = {target: score for target in self.sign if (score := scores.get(target)) is not None}
        if check is None or len(known) < len(self.sign):
            return False
        if not all(math.isfinite(score) for score in known.values()):
            return True
        return check.bound(_objective(known, self.sign, check.mean, check.sd)) > self.median


def learn_stop_rule(trials: Sequence[Points], goal: Mapping[str, str]) -> StopRule | None:
    """The rule from full trials [(progress, scores), ...]; None where there are too few, or no check on the way.

    goal: {target: min | max} of the targets that make the objective.
    """
    sign = {target: -1.0 if aim == "max" else 1.0 for target, aim in goal.items()}
    whole = [dict(points) for points in trials if points]
    if not whole or not sign:
        return None
    end = max(max(points) for points in whole)
    known = [{at: full for at, scores in points.items() if (full := _complete(scores, sign))} for points in whole]
    known = [points for points in known if end in points]
    if len(known) < MINIMUM:
        return None
    _, _, final = _standard([points[end] for points in known], sign)
    checks = []
    for progress in sorted({progress for points in known for progress in points if progress < end}):
        both = [row for row, points in enumerate(known) if progress in points]
        if len(both) < MINIMUM:
            continue
        mean, sd, now = _standard([known[row][progress] for row in both], sign)
        square = float(np.sum((now - now.mean()) ** 2))
        if square <= 0:
            continue
        b = float((now - now.mean()) @ (final[both] - final[both].mean())) / square
        a = float(final[both].mean() - b * now.mean())
        s = math.sqrt(float(np.sum((final[both] - a - b * now) ** 2)) / (len(both) - 2))
        if b > 0:
            checks.append(Check(progress, mean, sd, (a, b, s, float(now.mean()), square, len(both))))
    return StopRule(sign, tuple(checks), float(np.median(final))) if checks else None


def _complete(scores: Mapping[str, float | None], sign: Mapping[str, float]) -> dict[str, float]:
    """The scores of the objective's targets; none where one is missing or not finite."""
    known = {target: score for target in sign if (score := scores.get(target)) is not None and math.isfinite(score)}
    return known if len(known) == len(sign) else {}


def _standard(
    scores: Sequence[Mapping[str, float]], sign: Mapping[str, float]
) -> tuple[dict[str, float], dict[str, float], Floats]:
    """Mean and sd of each target over the trials, and the objective [n] of each trial."""
    mean = {target: float(np.mean([row[target] for row in scores])) for target in sign}
    sd = {target: float(np.std([row[target] for row in scores])) or 1.0 for target in sign}
    return mean, sd, np.array([_objective(row, sign, mean, sd) for row in scores])


def _objective(
    scores: Mapping[str, float], sign: Mapping[str, float], mean: Mapping[str, float], sd: Mapping[str, float]
) -> float:
    return float(np.mean([sign[target] * (scores[target] - mean[target]) / sd[target] for target in sign]))


def completed(last: Mapping[str, tuple[float, float]], course: Mapping[str, Mapping[float, float]]) -> dict[str, float]:
    """{trial: its score at the end}, predicted where the trial was given up.

    last: {trial: (progress, score) of its last check}; course: {trial: {progress: score}}. The prediction is the
    regression of the last score on the score at the check over the trials that have both (at least 5); a trial at
    whose progress too few others were scored keeps the score it has.
    """
    end = max(progress for progress, _ in last.values())
    out = {}
    for trial, (progress, score) in last.items():
        pairs = [
            (points[progress], points[end])
            for points in course.values()
            if progress < end and progress in points and end in points
        ]
        if len(pairs) < ENOUGH:
            out[trial] = score
            continue
        now, final = np.array(pairs).T
        square = float(np.sum((now - now.mean()) ** 2))
        slope = 0.0 if square == 0 else float((now - now.mean()) @ (final - final.mean())) / square
        out[trial] = float(final.mean() + slope * (score - now.mean()))
    return out
