"""The cocktail grid (arXiv 2410.01109): does other data help a task, and which?

Each single task, each pair, all, all minus one; each again with general instruction data. K = 4: 4 + 6 + 1 + 4 = 15
mixtures, 30 with general data. Reported: synergy_ij = score_i(pair ij) - score_i(i alone), with paired bootstrap
intervals over seeds; the gain of `all`; what each task loses when another is left out. It is a legal ledger for `fit`.
(The paper's exact shares of general data are not given; 0.2 is ours.)
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from data_mixers.common.errors import MixError
from data_mixers.mixture.mixture import Floats, Mixture
from data_mixers.sweep.ledger import TrialLedger
from data_mixers.sweep.trial import Goal, Trial


def cocktail(
    tasks: Sequence[str],
    general: str | None = None,
    *,
    general_share: float = 0.2,
    pairs: bool = True,
    budget: Literal["per_task", "total"] = "per_task",
    rows: int | None = None,
    seeds: int = 3,
    **common: Any,
) -> list[Trial]:
    """Trials of the grid, `seeds` of each.

    budget "per_task": every task has the same `rows` in each mixture, so a larger mixture runs longer (is the other
    data helpful?); "total": every run has `rows` (is it better than more of its own?).
    The run length is noted in Trial.tokens in units of `rows`; common: further fields of Trial."""
    if len(set(tasks)) != len(tasks) or len(tasks) < 2 or general in tasks:
        raise MixError(
            f"tasks {', '.join(tasks)}, general {general}", do="at least two different tasks, general apart from them"
        )
    if budget not in ("per_task", "total") or not 0 < general_share < 1:
        raise MixError(
            f"budget {budget!r}, general_share {general_share}", do='"per_task" or "total"; 0 < general_share < 1'
        )
    sets = [(task,) for task in tasks]
    sets += list(itertools.combinations(tasks, 2)) if pairs else []
    sets += [tuple(tasks), *(tuple(other for other in tasks if other != task) for task in tasks)]
    sets = list(dict.fromkeys(sets))  # three tasks: all minus one is a pair
    names = (*tasks, general) if general else tuple(tasks)
    trials = []
    for chosen, with_general in itertools.product(sets, (False, True) if general else (False,)):
        share = (1 - general_share * with_general) / len(chosen)
        shares = {name: share if name in chosen else 0.0 for name in names}
        if general and with_general:
            shares[general] = general_share
        length = None if rows is None else int(rows if budget == "total" else round(rows / share))
        for seed in range(seeds):
            trials.append(Trial(Mixture.of(shares), seed=seed, tokens=length, **common))
    return trials


@dataclass(frozen=True)
class Synergy:
    """mean [K, K], lower, upper of score_i(pair ij) - score_i(i alone), turned so that positive = j helps i; gain_all
    and leave_one_out [K, K] (loss of i when j is left out of all) likewise; NaN on diagonals."""

    tasks: tuple[str, ...]
    mean: Floats
    lower: Floats
    upper: Floats
    gain_all: Floats
    leave_one_out: Floats


def synergy(
    ledger: TrialLedger,
    tasks: Sequence[str],
    target: str = "{task}/loss",
    *,
    goal: Goal = "min",
    level: float = 0.9,
    draws: int = 2000,
    seed: int = 0,
) -> Synergy:
    """Read the grid's answers from a ledger (runs without general data). `target`: name of a task's score."""
    sign = -1.0 if goal == "min" else 1.0
    scores: dict[tuple[frozenset[str], str], dict[int, float]] = {}
    for record in ledger.records:
        chosen = frozenset(name for name, share in record.mixture.items() if share > 0)
        if chosen <= set(tasks):
            for task in tasks:
                value = record.scores.get(target.format(task=task))
                if value is not None:
                    scores.setdefault((chosen, task), {})[record.seed] = sign * value
    K, rng = len(tasks), np.random.default_rng(seed)
    mean, lower, upper = (np.full((K, K), np.nan) for _ in range(3))
    gain_all, leave = np.full(K, np.nan), np.full((K, K), np.nan)
    everyone = frozenset(tasks)
    for i, task in enumerate(tasks):
        gain_all[i] = _paired(scores, (everyone, task), (frozenset([task]), task)).mean()
        for j, other in enumerate(tasks):
            if i == j:
                continue
            gaps = _paired(scores, (frozenset([task, other]), task), (frozenset([task]), task))
            resampled = rng.choice(gaps, (draws, len(gaps))).mean(axis=1)
            mean[i, j] = gaps.mean()
            lower[i, j], upper[i, j] = np.quantile(resampled, [(1 - level) / 2, (1 + level) / 2])
            leave[i, j] = _paired(scores, (everyone, task), (everyone - {other}, task)).mean()
    return Synergy(tuple(tasks), mean, lower, upper, gain_all, leave)


def _paired(
    scores: Mapping[Any, Mapping[int, float]], a: tuple[frozenset[str], str], b: tuple[frozenset[str], str]
) -> Floats:
    """Differences a - b over the seeds that both have; MixError where a run of the grid is missing."""
    for key in (a, b):
        if key not in scores:
            raise MixError(
                f"no trial of {' + '.join(sorted(key[0]))} with a score of {key[1]}", do="run the whole grid"
            )
    both = sorted(set(scores[a]) & set(scores[b]))
    if not both:
        raise MixError(f"{' + '.join(sorted(a[0]))} and {' + '.join(sorted(b[0]))} have no seed in common")
    return np.array([scores[a][seed] - scores[b][seed] for seed in both])
