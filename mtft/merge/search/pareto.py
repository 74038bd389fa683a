"""What a search has found, as plain JSON: every merge with its losses, and which of them are on the Pareto front."""

from __future__ import annotations

from collections.abc import Sequence

from mtft.merge.search.weight_search import SearchResult, SearchTrial, pareto


def pareto_facts(names: Sequence[str], found: SearchResult) -> dict[str, object]:
    """What front.json holds (mtft.report.sections.pareto draws it)."""
    best = pareto(found.trials)

    def row(trial: SearchTrial) -> dict[str, object]:
        return {"weights": list(trial.weights), "losses": trial.losses, "front": trial in best}

    chosen = next(trial for trial in found.trials if trial.weights == found.weights)
    return {
        "adapters": list(names),
        "tasks": list(found.uniform.losses),
        "trials": [row(trial) for trial in found.trials],
        "uniform": row(found.uniform),
        "chosen": row(chosen),
        "verdict": found.verdict,
    }
