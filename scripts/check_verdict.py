"""Is the verdict as sure as it says? Truth is simulated, so that wrong verdicts can be counted.

    python scripts/check_verdict.py --cases 40 --figure docs/figures/verdict.svg        # about 3 CPU minutes

Each case: K tasks, a random smooth truth (a bowl in the roots of the shares), n trials of a Dirichlet design with
noise, and a current mixture from which the best one gains a given number of noise sd. `auto` is fitted and a mixture
proposed. Counted: how often the verdict is "better"; how often it is so although the proposed mixture is truly not
better (wrong); how often the mixture that is kept is truly worse than the current one by more than half a noise sd
(harm); how often the true gain lies inside the stated 90 % interval. First row: scores shuffled among the trials, so
that nothing can be known. "better" is said at a probability of 95 %: wrong ones may be 5 % of all cases at most.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
import warnings
from pathlib import Path

for variable in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"):
    os.environ.setdefault(variable, "1")

import numpy as np  # noqa: E402

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from data_mixers.fitting.surrogate_fits import fit_surrogates  # noqa: E402
from data_mixers.mixture.mixture import Mixture  # noqa: E402
from data_mixers.propose.proposal import propose_mixture  # noqa: E402
from data_mixers.sweep.trial import TrialRecord  # noqa: E402

NOISE = 0.03


def bowl(rows: np.ndarray, best_K: np.ndarray) -> np.ndarray:
    """Squared Hellinger-like distance to the best mixture: the true score, lower is better."""
    return np.sum((np.sqrt(rows) - np.sqrt(best_K)) ** 2, axis=-1)


def current_with(gain: float, best_K: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """A mixture whose true score is `gain` above the best one's: on the way from the best to a random one."""
    while True:
        other = rng.dirichlet(np.ones(len(best_K)))
        if bowl(other, best_K) >= gain:
            break
    low, high = 0.0, 1.0
    for _ in range(60):
        middle = 0.5 * (low + high)
        low, high = (middle, high) if bowl(best_K + middle * (other - best_K), best_K) < gain else (low, middle)
    return best_K + high * (other - best_K)


def one_case(seed: int, gain: float | None, trials: int, tasks: int, surrogate: str) -> dict[str, float]:
    """gain None: scores shuffled."""
    rng = np.random.default_rng(seed)
    best_K = rng.dirichlet(2 * np.ones(tasks))
    rows = rng.dirichlet(np.ones(tasks), trials)
    scores = bowl(rows, best_K) + NOISE * rng.standard_normal(trials)
    if gain is None:
        scores = rng.permutation(scores)
    current_K = current_with((3.0 if gain is None else gain) * NOISE, best_K, rng)
    names = tuple(f"t{k}" for k in range(tasks))
    records = [
        TrialRecord(
            trial=str(i), status="done", mixture=dict(zip(names, row, strict=True)), scores={"loss": float(score)}
        )
        for i, (row, score) in enumerate(zip(rows, scores, strict=True))
    ]
    fits = fit_surrogates(records, surrogate=surrogate, seed=seed)
    even = Mixture(names, np.full(tasks, 1 / tasks))
    found = propose_mixture(fits, prior=even, current=Mixture(names, current_K), kl=0.0, seed=seed)
    true = 0.0 if gain is None else float(bowl(current_K, best_K) - bowl(found.mixture.shares, best_K))
    kept = 0.0 if gain is None else float(bowl(current_K, best_K) - bowl(found.kept.shares, best_K))
    sd = fits["loss"].sd
    return {
        "better": found.verdict == "better",
        "wrong": found.verdict == "better" and true <= 0,
        "harm": kept < -0.5 * NOISE,
        "inside": found.gain is not None and found.gain[1] * sd <= true <= found.gain[2] * sd,
        "gain": true / NOISE,
    }


def draw(table: dict[float, dict[str, float]], cases: int, path: Path) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6.4, 3.4), layout="constrained")
    axes = figure.subplots()
    gains = sorted(table)
    share = np.array([table[gain]["better"] for gain in gains])
    half = 1.645 * np.sqrt(np.maximum(share * (1 - share), 0.25 / cases) / cases)
    axes.errorbar(gains, 100 * share, yerr=100 * half, marker="o", capsize=3, label='verdict "better"')
    axes.plot(gains, [100 * table[gain]["wrong"] for gain in gains], marker="s", label="of these wrong")
    axes.axhline(5, color="grey", linewidth=0.8, linestyle="--", label="5 %, as stated")
    axes.set(
        xlabel="true gain of the best mixture over the current one (noise sd)", ylabel="% of cases", ylim=(-3, 103)
    )
    axes.legend(frameon=False)
    figure.savefig(path, metadata={"Date": None})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", type=int, default=40, help="for each gain")
    parser.add_argument("--gains", type=float, nargs="+", default=[0.0, 0.5, 1, 2, 3, 5], help="in noise sd")
    parser.add_argument("--trials", type=int, default=32)
    parser.add_argument("--tasks", type=int, default=4)
    parser.add_argument("--surrogate", default="auto")
    parser.add_argument("--figure", type=Path)
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    started, table = time.process_time(), {}
    print(
        f"{'true gain':>10}{'better %':>10}{'wrong %':>9}{'harm %':>8}{'gain in interval %':>20}{'proposed gains':>16}"
    )
    for gain in (None, *options.gains):
        rows = [
            one_case(1000 * (2 + int(10 * (gain or 0))) + case, gain, options.trials, options.tasks, options.surrogate)
            for case in range(options.cases)
        ]
        mean = {key: float(np.mean([row[key] for row in rows])) for key in rows[0]}
        if gain is None:
            mean["wrong"] = mean["better"]
        else:
            table[gain] = mean
        name = "shuffled" if gain is None else f"{gain:g}"
        print(
            f"{name:>10}{100 * mean['better']:10.1f}{100 * mean['wrong']:9.1f}{100 * mean['harm']:8.1f}"
            f"{100 * mean['inside']:20.1f}{mean['gain']:16.2f}   wrong <= 5 %: "
            f"{'PASS' if mean['wrong'] <= 0.05 else 'MISS'}",
            flush=True,
        )
    if options.figure is not None:
        draw(table, options.cases, options.figure)
    print(f"{options.cases} cases each, {time.process_time() - started:.0f} CPU seconds")


if __name__ == "__main__":
    main()
