"""Search the weights of a merge on a few held-out batches, and say whether the search was worth it.

    objective(w) = mean over tasks of q_t + worst * max q_t,   q_t = (L_t(w) - L_single) / (L_base - L_single)

(0 = every task as good as its own expert, 1 = as the base; without base and single losses: the mean loss. With
`prefer` the mean is weighted.) First a grid over one common scale, then COBYQA (scipy) or CMA-ES (package `cma`) on the
K weights. LoraHub (Huang et al., arXiv 2307.13269) is the same on weights in [-1.5, 1.5] from 0 with 0.05 * mean |w|
added; the sum merged is exact here, where LoraHub adds A and B apart. `front` spreads its trials over all trade-offs
instead of seeking one: any preference vector then picks its weights from the ledger, with no training and no new trial
(the use that IBCL makes of convex combinations, Lu et al., arXiv 2305.14782). significance.py then decides whether the
winner is better than equal weights, on data that the search has not seen if `check` is given.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from mtft.common.errors import MergeError
from mtft.merge.search.search_trials import Evaluate, SearchLedger, SearchTrial
from mtft.merge.search.significance import judge_search

SCALES = (0.3, 0.5, 0.7, 1.0, 1.3)
WAYS = ("grid", "cobyqa", "cma", "lorahub", "front")


@dataclass(frozen=True)
class SearchResult:
    """weights: what to merge with, after the verdict; best: the best trial; trials: all, in order.

    improvement, error: of the weights over all weights 1 (error None: no per-example scores).
    """

    weights: tuple[float, ...]
    best: SearchTrial
    uniform: SearchTrial
    improvement: float
    error: float | None
    verdict: str
    trials: list[SearchTrial]


def run_weight_search(
    names: Sequence[str],
    evaluate: Evaluate,
    by: str = "grid",
    *,
    base: Mapping[str, float] | None = None,
    single: Mapping[str, float] | None = None,
    check: Evaluate | None = None,
    worst: float = 0.0,
    prefer: Mapping[str, float] | None = None,
    budget: int = 40,
    ledger: str | Path | None = None,
    seed: int = 0,
    auxiliary: Sequence[str] = (),
) -> SearchResult:
    """Find weights for the adapters `names`.

    base, single: losses of the base model and of each task's expert; tasks on which the expert is no better are left
    out. prefer: how much a task counts (those not named: 0; None: all the same). check: scores other data for the
    verdict. ledger: JSONL file, one line a trial; trials in it are not repeated. auxiliary: tasks that count only where
    `prefer` names them.
    Raises MergeError for an unknown way, a ledger of another search, or losses that are not finite.
    """
    if by not in WAYS:
        raise MergeError(f"unknown search {by!r}", where="by", do=f"one of {', '.join(WAYS)}")
    K = len(names)
    _check_preference(prefer)
    path, penalty = Path(ledger) if ledger else None, 0.05 if by == "lorahub" else 0.0
    search = SearchLedger(list(names), evaluate, base, single, worst, penalty, prefer, path, auxiliary)
    uniform = search.trial([1.0] * K)
    for scale in SCALES:
        search.trial([scale] * K)
    if by in ("cobyqa", "lorahub"):
        _cobyqa(search, K, by, budget)
    elif by == "cma":
        _cma(search, K, budget, seed)
    elif by == "front":
        for weights in front_weights(K, budget - len(SCALES), search.best(common=True).weights[0], seed):
            search.trial(weights)
    best, common = search.best(), search.best(common=True)
    data = "on the data it was chosen on" if check is None else "on data the search has not seen"
    chosen, gain, error, text = judge_search([uniform, common, best], check or evaluate, search.objective)
    return SearchResult(chosen.weights, best, uniform, gain, error, f"{text} {data}", search.trials)


def front_weights(K: int, count: int, scale: float, seed: int = 0) -> list[tuple[float, ...]]:
    """Weights spread over the trade-offs between K adapters: each alone, then preferences p from the simplex.

    In turns a plain convex combination (w = p) and one as strong as the best uniform merge (w = K scale p, at most 1).
    The first n of a longer list are the list of n, so a larger budget repeats nothing.
    """
    from scipy.stats import qmc

    alone = [tuple(float(i == k) for i in range(K)) for k in range(K)]
    rest = max(0, count - K)
    points = -(-rest // 2)  # both kinds of each preference: every other point of a Sobol sequence lies to one side
    uniform = qmc.Sobol(K, rng=np.random.default_rng(seed)).random(1 << max(1, points - 1).bit_length())[:points]
    spread = -np.log1p(-np.clip(uniform, 0, 1 - 1e-9))  # exponentials over their sum: even over the simplex
    mixed = []
    for row in spread:
        p = row / row.sum()
        mixed += [p.round(12), np.minimum(1.0, p * K * scale).round(12)]
    return [*alone[: max(0, count)], *(tuple(map(float, w)) for w in mixed[:rest])]


def _check_preference(prefer: Mapping[str, float] | None) -> None:
    values = list((prefer or {"": 1.0}).values())
    if min(values) < 0 or not sum(values) > 0 or not all(map(math.isfinite, values)):
        raise MergeError(f"prefer is {dict(prefer or {})}", where="prefer", do="numbers >= 0, at least one above 0")


def _cobyqa(ledger: SearchLedger, K: int, by: str, budget: int) -> None:
    from scipy.optimize import Bounds, minimize

    low = -1.5 if by == "lorahub" else 0.0
    start = np.zeros(K) if by == "lorahub" else np.array(ledger.best().weights)
    options = {"maxfev": max(budget, K + 2), "initial_tr_radius": 0.2}
    function = lambda w: ledger.trial(np.clip(w, low, 1.5).round(12)).objective  # noqa: E731
    minimize(function, start, method="COBYQA", bounds=Bounds(low, 1.5), options=options)


def _cma(ledger: SearchLedger, K: int, budget: int, seed: int) -> None:
    try:
        import cma
    except ImportError:
        raise MergeError("the package cma is not installed", where="by", do="pip install cma, or by: cobyqa") from None
    settings = {"bounds": [0, 1.5], "maxfevals": budget, "seed": seed + 1, "verbose": -9}
    run = cma.CMAEvolutionStrategy(np.array(ledger.best().weights), 0.2, settings)
    while not run.stop():
        tries = run.ask()
        run.tell(tries, [ledger.trial(np.clip(w, 0, 1.5)).objective for w in tries])
