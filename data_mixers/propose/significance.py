"""Is the proposed mixture better than the current one? Answered without the winner's curse.

The optimum of a fitted surface looks better than it is: it was chosen for its errors too. So the trials are split in
two, 20 times, by mixture: one half's surrogate chooses, the other half's says what the choice gains, both ways, pooled.
The judge is the GP of each target (hyper-parameters from all trials, posterior from the half), of the noise-free score,
its sd scaled by the calibration of the fit. Drawing gains at many splits counts how unsure both halves are.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy.stats import norm

from data_mixers.fitting.enough_trials import TOO_FEW
from data_mixers.fitting.surrogate_fits import SurrogateFits
from data_mixers.fitting.target_fit import TargetFit
from data_mixers.mixture.mixture import Floats
from data_mixers.propose.optimizer import kl_to
from data_mixers.surrogates.gaussian_process import GaussianProcess

SPLITS = 20
DRAWS = 2000
CERTAIN = 0.95
GAUSSIAN_90 = 1.6448536269514722
Processes = Sequence[GaussianProcess | None]  # [J]; None: the trials say nothing of the target
AFFORDABLE = 10_000  # trials; beyond it the exact number says nothing


@dataclass(frozen=True)
class Verdict:
    """`word`: better, worse, "not distinguishable from your current mixture", "no signal" or "too few trials to say".
    gain: (mean, lower, upper) in standardised units of the objective, positive = better; probability that it exceeds
    min_gain. The last two words come without numbers."""

    word: str
    gain: tuple[float, float, float] | None
    probability: float | None
    detectable: float | None
    more_trials: int | None
    text: str

    def as_dict(self) -> dict[str, Any]:
        """JSON-serialisable."""
        return vars(self) | {"gain": None if self.gain is None else list(self.gain)}


def unsaid_verdict(why: str) -> Verdict:
    """The verdict where nothing can be said, because of `why`."""
    return Verdict("no signal" if why.startswith("no signal") else TOO_FEW, None, None, None, None, why)


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
    used = [(w, f) for w, f in zip(weight_J, fits.targets.values(), strict=True) if w > 0 and f.sd > 0]
    weights, targets = np.array([w for w, _ in used]), [f for _, f in used]
    if (why := fits.unsaid_together(weight_J)) is not None:
        return unsaid_verdict(why)

    def objective(processes: Processes, rows: Floats) -> Floats:
        score_J = np.stack([_surface(p, f, rows) for p, f in zip(processes, targets, strict=True)])
        return score_J.max(axis=0) if worst else weights @ score_J

    def difference_sd(processes: Processes, a: Floats, b: Floats) -> float:
        variance_J = np.array([_difference_variance(p, f, a, b) for p, f in zip(processes, targets, strict=True)])
        return max(math.sqrt(variance_J.max() if worst else weights**2 @ variance_J), 1e-12)

    rows = np.vstack([candidates, current_K])
    penalty_m = kl * kl_to(prior_K, rows)
    rng = np.random.default_rng(seed)
    gains, deviations = [], []
    for _ in range(SPLITS):
        processes = [[_process(f, half) for f in targets] for half in _split_halves(fits, rng)]
        value = [objective(half, rows) for half in processes]
        for choosing, judging in ((0, 1), (1, 0)):
            best = int(np.argmin((value[choosing] + penalty_m)[:-1]))
            gains.append(float(value[judging][-1] - value[judging][best]))
            deviations.append(difference_sd(processes[judging], rows[best], current_K))
    gain, sd = np.array(gains), np.array(deviations)
    draws = (gain + sd * rng.standard_normal((DRAWS // len(gain), len(gain)))).ravel()

    whole = [f.model.carrier() if f.signal else None for f in targets]  # the GPs on all trials
    best, now = objective(whole, rows[[0, -1]])
    by_whole = float(norm.sf(min_gain, now - best, difference_sd(whole, rows[0], rows[-1])))
    above = min(float(np.mean(norm.sf(min_gain, gain, sd))), by_whole)
    below = float(np.mean(norm.cdf(0.0, gain, sd)))
    lower, upper = np.quantile(draws, [(1 - level) / 2, (1 + level) / 2]).tolist()
    detectable = GAUSSIAN_90 * float(draws.std())
    n = min(len(f.arrays.y) for f in targets)
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
    text = _verdict_text(word, average, (lower, upper), above, detectable, more, level)
    return Verdict(word, (average, lower, upper), above, detectable, more, text)


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


def _process(fitted: TargetFit, half: set[bytes]) -> GaussianProcess | None:
    """The GP of one target, its posterior from one half of the trials; None where they say nothing."""
    kept = np.array([_key(row) in half for row in fitted.arrays.X])
    if not fitted.signal or kept.sum() < 3 or np.ptp(fitted.arrays.y[kept]) == 0:
        return None
    carrier = fitted.model.carrier()
    process = carrier.clone()
    process._start, process.iterations = carrier, 0
    return process.fit(**carrier.data.at(kept)._asdict())


def _surface(process: GaussianProcess | None, fitted: TargetFit, rows: Floats) -> Floats:
    """Standardised mean [m], lower is better."""
    return np.zeros(len(rows)) if process is None else fitted.standardized(process.mean(rows))


def _difference_variance(process: GaussianProcess | None, fitted: TargetFit, a: Floats, b: Floats) -> float:
    if process is None:
        return 0.0
    scale = max(1.0, fitted.model.quantile(0.9) / GAUSSIAN_90)
    # With a link: of the logits, times the slope between the two means, so the sign is as sure as that of the logits.
    slope = fitted.score_slope(*process.mean(np.stack([a, b]))) if fitted.link is not None else 1.0
    return float(scale * slope / fitted.sd) ** 2 * process.difference_variance(a, b)
