"""Is what a search has found better than equal weights, or has it only fitted the rows that it looked at?

Candidates stand in a line from simple to free: all weights 1, the best common weight, a weight each. Each must beat
the one that stands by more than two standard errors of the difference (paired bootstrap over examples), else it stays.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import numpy as np

from mtft.common.bootstrap import resampled_counts
from mtft.merge.search.search_trials import SearchTrial, loss_of

Objective = Callable[[Mapping[str, float]], float]


def judge_search(
    candidates: Sequence[SearchTrial], evaluate: Callable[[Sequence[float]], Mapping], objective: Objective
) -> tuple[SearchTrial, float, float | None, str]:
    """(the one that stands at the end, its gain over the first, the error of that gain, the verdict in words).

    objective: losses of the tasks -> what is minimised. Without per-example scores any gain counts.
    """
    scores = {weights: dict(evaluate(weights)) for weights in dict.fromkeys(trial.weights for trial in candidates)}

    def gain(a: SearchTrial, b: SearchTrial) -> tuple[float, float | None]:
        """How much lower b's objective is, and the standard error of that."""
        at_a, at_b = ({task: loss_of(x) for task, x in scores[t.weights].items()} for t in (a, b))
        return objective(at_a) - objective(at_b), _paired_error(objective, scores[a.weights], scores[b.weights])

    standing, verdicts = candidates[0], []
    for trial in candidates[1:]:
        if trial.weights == standing.weights:
            continue
        better, error = gain(standing, trial)
        amount = f"{better:.3g}" + (" (no error known)" if error is None else f" +- {error:.2g}")
        if better > 2 * (error or 0) and better > 0:
            verdicts.append(f"{_name(trial)} beats {_name(standing)} by {amount}")
            standing = trial
        else:
            verdicts.append(f"{_name(trial)} is no better than {_name(standing)}: {amount}; staying there")
    total, error = gain(candidates[0], standing)
    return standing, total, error, "; ".join(verdicts) or f"nothing beats {_name(standing)}"


def _name(trial: SearchTrial) -> str:
    values = set(trial.weights)
    if values == {1.0}:
        return "the uniform merge"
    return f"the common weight {values.pop():.3g}" if len(values) == 1 else "a weight each"


def _paired_error(objective: Objective, first: Mapping, second: Mapping, draws: int = 1000) -> float | None:
    """Standard error of the objective's difference, resampling both models' examples together."""
    if any(isinstance(value, int | float | np.floating) for value in (*first.values(), *second.values())):
        return None
    rng = np.random.default_rng(0)
    drawn: list[dict[str, np.ndarray]] = [{}, {}]
    for task, a in first.items():
        b = second[task]
        if tuple(a.ids) != tuple(b.ids):
            raise ValueError(f"{task}: the two merges were not scored on the same examples")
        counts = resampled_counts(len(a.ids), draws, rng)
        for losses, x in zip(drawn, (a, b)):
            losses[task] = (counts @ x.nll_N) / np.maximum(counts @ x.tokens_N, 1)
    at_a, at_b = ([objective({task: x[i] for task, x in losses.items()}) for i in range(draws)] for losses in drawn)
    return float(np.std(np.subtract(at_a, at_b)))
