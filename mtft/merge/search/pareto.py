"""What a search has found, as plain JSON: every merge with its losses, and which of them are on the Pareto front."""

from __future__ import annotations

from collections.abc import Sequence

from mtft.merge.search.search_trials import SearchTrial
from mtft.merge.search.weight_search import SearchResult


def pareto_facts(names: Sequence[str], result: SearchResult, auxiliary: Sequence[str] = ()) -> dict[str, object]:
    """What front.json holds (mtft.report.sections.pareto draws it): trade-offs between tasks that are not auxiliary."""
    tasks = [task for task in result.uniform.losses if task not in auxiliary]
    best = pareto_front(result.trials, tasks)

    def row(trial: SearchTrial) -> dict[str, object]:
        return {"weights": list(trial.weights), "losses": trial.losses, "front": trial in best}

    chosen = next(trial for trial in result.trials if trial.weights == result.weights)
    return {
        "adapters": list(names),
        "tasks": tasks,
        "trials": [row(trial) for trial in result.trials],
        "uniform": row(result.uniform),
        "chosen": row(chosen),
        "verdict": result.verdict,
    }


def pareto_front(trials: Sequence[SearchTrial], tasks: Sequence[str] | None = None) -> list[SearchTrial]:
    """The trials that no other beats in every task (of `tasks`, None: all): one adapter per trade-off."""

    def beaten(a: SearchTrial, b: SearchTrial) -> bool:
        gaps = [b.losses[task] - a.losses[task] for task in (a.losses if tasks is None else tasks)]
        return max(gaps) <= 0 and min(gaps) < 0

    return [trial for trial in trials if not any(beaten(trial, other) for other in trials)]
