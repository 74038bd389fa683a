"""The cocktail grid (arXiv 2410.01109): does other data help a task, and which?

Each single task, each pair, all, all minus one, in equal shares; K = 4: 4 + 6 + 1 + 4 = 15 mixtures. Its trials are a
legal ledger for any fit. What it says beside that, with score turned so that higher is better:

    synergy_ij = score_i(pair ij) - score_i(i alone)           gain_i = score_i(all) - score_i(i alone)
    leave_ij   = score_i(all) - score_i(all without j)         each the mean over the seeds that both runs have
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from data_mixers.common.errors import MixError
from data_mixers.mixture.mixture import Floats
from data_mixers.sweep.ledger import TrialLedger

DRAWS, LEVEL = 2000, 0.9  # of the bootstrap
Scores = Mapping[tuple[frozenset[str], str], Mapping[int, float]]  # (tasks trained on, task scored) -> {seed: score}


def cocktail_grid(tasks: int) -> Floats:
    """[n, K] mixtures: singles, pairs, all, all minus one."""
    if tasks < 2:
        raise MixError(f"a cocktail of {tasks} task", do="at least two tasks")
    everyone = range(tasks)
    subsets = [(k,) for k in everyone] + list(itertools.combinations(everyone, 2)) + [tuple(everyone)]
    subsets += [tuple(other for other in everyone if other != k) for k in everyone]
    subsets = list(dict.fromkeys(subsets))  # three tasks: all minus one is a pair
    return np.array([[1 / len(subset) if k in subset else 0.0 for k in everyone] for subset in subsets])


@dataclass(frozen=True)
class Synergy:
    """mean [K, K], lower, upper of synergy_ij; gain_all [K]; leave_one_out [K, K]. NaN on diagonals, and where the
    ledger lacks a run of the grid."""

    tasks: tuple[str, ...]
    mean: Floats
    lower: Floats
    upper: Floats
    gain_all: Floats
    leave_one_out: Floats

    def text(self) -> str:
        """A table for a terminal."""
        width = max(24, *(len(name) + 2 for name in self.tasks))
        lines = ["gain of each task (row) from training with another (column), all others (all); > 0: it helps"]
        lines.append(f"{'task':<{width}}{'all':>10}" + "".join(f"{name:>{width}}" for name in self.tasks))
        for i, task in enumerate(self.tasks):
            cells = [
                "-" if np.isnan(mean) else f"{mean:.4g} ({low:.2g} to {high:.2g})"
                for mean, low, high in zip(self.mean[i], self.lower[i], self.upper[i], strict=True)
            ]
            gain = "-" if np.isnan(self.gain_all[i]) else f"{self.gain_all[i]:.4g}"
            lines.append(f"{task:<{width}}{gain:>10}" + "".join(f"{cell:>{width}}" for cell in cells))
        return "\n".join(lines)


def synergy(ledger: TrialLedger, tasks: Sequence[str], *, seed: int = 0) -> Synergy:
    """The grid's answers from a ledger of losses (`TASK/loss`), with paired 90 % bootstrap intervals over seeds."""
    scores: dict[tuple[frozenset[str], str], dict[int, float]] = {}
    for record in ledger.records:
        trained_on = frozenset(name for name, share in record.mixture.items() if share > 0)
        for task in tasks:
            value = record.scores.get(f"{task}/loss")
            if value is not None and record.progress == 1 and _equal_shares(record.mixture):
                scores.setdefault((trained_on, task), {})[record.seed] = -value
    K, rng = len(tasks), np.random.default_rng(seed)
    mean, lower, upper, leave = (np.full((K, K), np.nan) for _ in range(4))
    gain_all = np.full(K, np.nan)
    everyone = frozenset(tasks)
    for i, task in enumerate(tasks):
        alone = frozenset([task])
        gain_all[i] = _mean(_paired(scores, task, everyone, alone))
        for j, other in enumerate(tasks):
            if i == j:
                continue
            leave[i, j] = _mean(_paired(scores, task, everyone, everyone - {other}))
            gaps = _paired(scores, task, frozenset([task, other]), alone)
            if len(gaps):
                resampled = rng.choice(gaps, (DRAWS, len(gaps))).mean(axis=1)
                mean[i, j] = gaps.mean()
                lower[i, j], upper[i, j] = np.quantile(resampled, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return Synergy(tuple(tasks), mean, lower, upper, gain_all, leave)


def _equal_shares(mixture: Mapping[str, float]) -> bool:
    shares = [share for share in mixture.values() if share > 0]
    return max(shares) - min(shares) < 1e-9


def _paired(scores: Scores, task: str, a: frozenset[str], b: frozenset[str]) -> Floats:
    """Differences of the task's score, trained on `a` minus on `b`, over the seeds that both have."""
    of_a, of_b = scores.get((a, task), {}), scores.get((b, task), {})
    return np.array([of_a[seed] - of_b[seed] for seed in sorted(set(of_a) & set(of_b))])


def _mean(values: Floats) -> float:
    return float(values.mean()) if len(values) else float("nan")
