"""Is the proposed mixture better than the current one? Answered without the winner's curse.

The optimum of a fitted surface looks better than it is: it was chosen for its errors too. So the trials are split in
two, 20 times, by mixture: one half's surrogate chooses, the other half's says what the choice gains, both ways, pooled.
The judge is the GP of each target (hyper-parameters from all trials, posterior from the half), of the noise-free score,
its sd scaled by the calibration of the fit. Drawing gains at many splits counts how unsure both halves are.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy.stats import norm

from data_mixers.fitting.surrogate_fits import SurrogateFits, TargetFit
from data_mixers.mixture.mixture import Floats
from data_mixers.propose.optimizer import kl_to
from data_mixers.surrogates.gaussian_process import GaussianProcess

SPLITS = 20
DRAWS = 2000
CERTAIN = 0.95
GAUSSIAN_90 = 1.6448536269514722
AFFORDABLE = 10_000  # trials; beyond it the exact number says nothing


@dataclass(frozen=True)
class Verdict:
    """`word`: better, worse, "not distinguishable from your current mixture" or "no signal". gain: (mean, lower,
    upper) in standardised units of the objective, positive = better; probability that it exceeds min_gain."""

    word: str
    gain: tuple[float, float, float]
    probability: float
    detectable: float
    more_trials: int | None
    text: str

    def as_dict(self) -> dict[str, Any]:
        """JSON-serialisable."""
        return {
            "word": self.word,
            "gain": list(self.gain),
            "probability": self.probability,
            "detectable": None if math.isnan(self.detectable) else self.detectable,
            "more_trials": self.more_trials,
            "text": self.text,
        }


def judge(
    fits: SurrogateFits,
    weight_J: Floats,
    candidates: Floats,
    current_K: Floats,
    *,
    kl: float,
    prior_K: Floats,
    min_gain: float,
    level: float,
    worst: bool = False,
    seed: int = 0,
) -> Verdict:
    """Verdict over the allowed `candidates` [m, K], the first of which is the proposal, against `current_K`, for the
    weighted mean of the targets (or the worst of them: its gain is then as uncertain as the most uncertain target's).

    Two questions, and "better" needs a yes to both: would mixtures that one half of the trials chooses be better by the
    other half (cross-fitting), and is the proposal itself better by the GPs on all trials? The second one catches an
    optimum far from all trials, where the surrogate that leads there is alone with its opinion.
    """
    usable = [(w, f) for w, f in zip(weight_J, fits.targets.values(), strict=True) if w > 0 and f.sd > 0]
    if not any(f.signal for _, f in usable):
        return Verdict(
            "no signal",
            (0.0, 0.0, 0.0),
            0.0,
            math.nan,
            None,
            "no signal: no surrogate predicts a trial better than the mean of the others; "
            "the trials are too few, too short or too noisy to tell mixtures apart",
        )
    weights = np.array([w for w, _ in usable])
    rows = np.vstack([candidates, current_K])
    penalty_m = kl * kl_to(prior_K, rows)
    rng = np.random.default_rng(seed)
    means, deviations = [], []
    for _ in range(SPLITS):
        halves = _split_halves(fits, rng)
        surfaces = [[_surface(f, half, rows) for _, f in usable] for half in halves]
        for choosing, judging in ((0, 1), (1, 0)):
            chosen_by = np.stack([mean_m for mean_m, _ in surfaces[choosing]])
            best = int(np.argmin(((chosen_by.max(axis=0) if worst else weights @ chosen_by) + penalty_m)[:-1]))
            judged = np.stack([mean_m for mean_m, _ in surfaces[judging]])
            value_m = judged.max(axis=0) if worst else weights @ judged
            mean = float(value_m[-1] - value_m[best])
            variances = np.array(
                [
                    _difference_variance(process, f, rows[best], current_K)
                    for (_, f), (_, process) in zip(usable, surfaces[judging], strict=True)
                ]
            )
            variance = float(variances.max() if worst else weights**2 @ variances)
            means.append(mean)
            deviations.append(math.sqrt(variance))
    gain, sd = np.array(means), np.maximum(np.array(deviations), 1e-12)
    draws = (gain + sd * rng.standard_normal((DRAWS // len(gain), len(gain)))).ravel()
    above = min(
        float(np.mean(norm.sf(min_gain, gain, sd))), _proposal_probability(usable, weights, rows, min_gain, worst)
    )
    below = float(np.mean(norm.cdf(0.0, gain, sd)))
    lower, upper = np.quantile(draws, [(1 - level) / 2, (1 + level) / 2])
    spread = float(draws.std())
    detectable = GAUSSIAN_90 * spread
    n = min(len(f.arrays.y) for _, f in usable)
    average = float(gain.mean())
    more = None
    if above >= CERTAIN:
        word = "better"
    elif below >= CERTAIN:
        word = "worse"
    else:
        word = "not distinguishable from your current mixture"
        if average > min_gain:  # the spread falls with the root of the number of trials
            more = max(1, math.ceil(n * (detectable / (average - min_gain)) ** 2) - n)
    text = _verdict_text(word, average, (float(lower), float(upper)), above, detectable, more, level)
    return Verdict(word, (average, float(lower), float(upper)), above, detectable, more, text)


def _proposal_probability(
    usable: list[tuple[float, TargetFit]], weights: Floats, rows: Floats, min_gain: float, worst: bool
) -> float:
    """Probability that the proposal (first row) beats the current mixture (last row) by the GPs on all trials."""
    surfaces, variances = [], []
    for _, fitted in usable:
        if not fitted.signal:
            surfaces.append(np.zeros(2))
            variances.append(0.0)
            continue
        process, sign = fitted.model.carrier(), 1.0 if fitted.goal == "min" else -1.0
        surfaces.append(sign * (process.mean(rows[[0, -1]]) - fitted.arrays.y.mean()) / fitted.sd)
        variances.append(_difference_variance(process, fitted, rows[0], rows[-1]))
    best, now = np.max(surfaces, axis=0) if worst else weights @ np.array(surfaces)
    variance = max(variances) if worst else float(weights**2 @ np.array(variances))
    return float(norm.sf(min_gain, now - best, max(math.sqrt(variance), 1e-12)))


def _verdict_text(
    word: str,
    gain: float,
    interval: tuple[float, float],
    above: float,
    detectable: float,
    more: int | None,
    level: float,
) -> str:
    text = (
        f"{word}: cross-fitted gain {gain:.3f} "
        f"({100 * level:.0f} % interval {interval[0]:.3f} to {interval[1]:.3f}, in sd of the "
        f"scores over the trials), probability of a gain {100 * above:.0f} %"
    )
    if word.startswith("not"):
        text += f"; these trials could have shown a difference of {detectable:.3f}"
        if more is None:
            text += "; no gain is expected here"
        elif more > AFFORDABLE:
            text += f"; more than {AFFORDABLE:,} more trials would be needed to show so small a gain"
        else:
            text += f"; about {more} more trials would show the gain expected here"
    return text


def _split_halves(fits: SurrogateFits, rng: np.random.Generator) -> tuple[set[bytes], set[bytes]]:
    """Two sets of mixtures (as bytes of their rows): the same split for all targets."""
    keys = sorted({_key(row) for f in fits.targets.values() for row in f.arrays.X})
    order = rng.permutation(len(keys))
    cut = len(keys) // 2
    return {keys[i] for i in order[:cut]}, {keys[i] for i in order[cut:]}


def _key(row: Floats) -> bytes:
    return np.round(row, 9).tobytes()


def _surface(fitted: TargetFit, half: set[bytes], rows: Floats) -> tuple[Floats, GaussianProcess | None]:
    """(standardised mean [m], lower is better; the GP) of one target from one half of the trials."""
    sign = 1.0 if fitted.goal == "min" else -1.0
    kept = np.array([_key(row) in half for row in fitted.arrays.X])
    if not fitted.signal or kept.sum() < 3 or np.ptp(fitted.arrays.y[kept]) == 0:
        return np.zeros(len(rows)), None
    carrier = fitted.model.carrier()
    process = carrier.clone()
    process._start, process.iterations = carrier.theta, 0
    data = carrier.data
    tau = None if data["tau"] is None else data["tau"][kept]
    process.fit(
        data["X"][kept], data["y"][kept], groups=data["groups"][kept], progress=tau, weights=data["weights"][kept]
    )
    return sign * (process.mean(rows) - fitted.arrays.y.mean()) / fitted.sd, process


def _difference_variance(process: GaussianProcess | None, fitted: TargetFit, a: Floats, b: Floats) -> float:
    if process is None:
        return 0.0
    scale = max(1.0, fitted.model.quantile(0.9) / GAUSSIAN_90)
    return (scale / fitted.sd) ** 2 * process.difference_variance(a, b)
