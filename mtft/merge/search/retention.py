"""What the merged adapter kept of each expert, on the same held-out examples.

    retained loss      = (L_base - L_merged) / (L_base - L_single)         1 = as good as the expert, 0 = as the base
    retained accuracy  = (A_merged - A_base) / (A_single - A_base);  ratio = A_merged / A_single
    and so for every metric that all three were scored by

Not clipped: below 0 the merge is worse than the base. Where the expert is not better than the base by more than two
standard errors the share is undefined, and it is not averaged. Intervals: paired bootstrap over examples (all models
are resampled together, so the examples' own difficulty cancels). Loss alone flatters: a merge can close most of the
gap in loss and almost none in accuracy, so both are always reported.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Protocol

import numpy as np

from mtft.common.aggregates import Aggregate
from mtft.common.bootstrap import resampled_counts, same_order

METRICS = ("loss", "accuracy", "exact_match")  # of every task
_NAMES = {"accuracy": "token_accuracy"}  # where scores call it otherwise
NOT_LEARNT = "undefined: the expert did not learn"


class RetentionScores(Protocol):
    """One task's held-out scores, as mtft.evaluation.task_scores.TaskScores has them; N examples."""

    @property
    def ids(self) -> tuple[str, ...]: ...
    @property
    def answered(self) -> Mapping[str, Any]: ...
    def aggregate(self, metric: str) -> Aggregate: ...
    def statistics(self, metric: str) -> np.ndarray: ...


@dataclass
class Retention:
    """tasks: task -> metric -> {base, single, merged, retained, ...}; summary: metric -> {mean, min, ...}.

    control: task -> difference of the loss, for tasks that no expert learnt. others: name -> the same `tasks` table for
    another adapter (uniform merge, joint training) in the place of the merged one. auxiliary: tasks that are not in the
    summary.
    """

    tasks: dict[str, dict[str, dict]]
    summary: dict[str, dict]
    control: dict[str, dict] = field(default_factory=dict)
    others: dict[str, dict[str, dict[str, dict]]] = field(default_factory=dict)
    auxiliary: list[str] = field(default_factory=list)

    def as_dict(
        self, *, method: str, rank: int, energy: float | None = None, diagnostics: Mapping | None = None
    ) -> dict[str, object]:
        """What the report page reads (merge/retention.json); diagnostics: as diagnose() returns them."""
        page: dict[str, object] = {"method": method, "rank": rank, "energy": energy, **asdict(self)}
        if diagnostics:
            names = diagnostics["names"]
            page["cosines"] = {"names": names, "values": diagnostics["cosines"]}
            page["interference"] = dict(zip(names, diagnostics["interference"], strict=True))
            page["norms"] = dict(zip(names, diagnostics["norms"], strict=True))
            page["overlap"] = {side: diagnostics[f"overlap_{side}"] for side in ("left", "right")}
        return page


def retention(
    base: Mapping[str, RetentionScores],
    single: Mapping[str, RetentionScores],
    merged: Mapping[str, RetentionScores],
    *,
    others: Mapping[str, Mapping[str, RetentionScores]] | None = None,
    draws: int = 1000,
    seed: int = 0,
    auxiliary: Sequence[str] = (),
) -> Retention:
    """Compare base, single-task experts and the merged adapter, task by task.

    Tasks of `single` must be in `base` and `merged`, scored on the same examples (ValueError if not). Tasks of `merged`
    without an expert are controls. `others`: further adapters to put beside the merged one. `auxiliary`: tasks that
    stand in the table, and not in the summary.
    """
    missing = [task for task in single if task not in base or task not in merged]
    if missing or not single:
        raise ValueError(f"tasks without scores of base and merged: {missing}" if missing else "no single-task scores")
    tasks, drawn = _table(base, single, merged, draws, seed)
    counted = {task: row for task, row in tasks.items() if task not in auxiliary}
    measured = dict.fromkeys([*METRICS, *(metric for row in counted.values() for metric in row)])
    summary = {metric: _summary(counted, drawn, metric) for metric in measured}
    control = {
        task: _control(base[task], merged[task], draws, seed) for task in merged if task not in single and task in base
    }
    beside = {}
    for name, scores in (others or {}).items():
        beside[name], _ = _table(base, {task: single[task] for task in single if task in scores}, scores, draws, seed)
    return Retention(tasks, summary, control, beside, [task for task in tasks if task in auxiliary])


def _table(base, single, merged, draws: int, seed: int) -> tuple[dict, dict]:
    """task -> metric -> its row, and task -> metric -> its shares: [draws + 1], empty where undefined."""
    tasks: dict[str, dict[str, dict]] = {}
    drawn: dict[str, dict[str, np.ndarray]] = {}
    for task, expert in single.items():
        models = [(scores, _order(base[task], scores, task)) for scores in (base[task], expert, merged[task])]
        weights = _resamples(len(base[task].ids), draws, seed)
        compared = {}
        for metric in (*METRICS, *_answered_by_all([scores for scores, _ in models])):
            of_base, of_expert, of_merged = (_metric(*model, metric, weights) for model in models)
            lower_is_better = not base[task].aggregate(_NAMES.get(metric, metric)).higher_is_better
            compared[metric] = _compare(of_base, of_expert, of_merged, metric, 1 if lower_is_better else -1)
        tasks[task] = {metric: row for metric, (row, _) in compared.items()}
        drawn[task] = {metric: shares for metric, (_, shares) in compared.items()}
    return tasks, drawn


def _order(first: RetentionScores, other: RetentionScores, task: str) -> np.ndarray:
    """The rows of `other` in the order of the first; ValueError unless both hold the same examples once."""
    order = same_order(first.ids, other.ids)
    if order is None:
        raise ValueError(f"{task}: base, single and merged were not scored on the same examples")
    return order


def _resamples(examples: int, draws: int, seed: int) -> np.ndarray:
    """[draws + 1, examples] counts; row 0 is the sample itself."""
    return np.vstack([np.ones((1, examples)), resampled_counts(examples, draws, np.random.default_rng(seed))])


def _metric(scores: RetentionScores, order: np.ndarray, metric: str, weights: np.ndarray) -> np.ndarray:
    """[draws + 1]: the score of each resample. weights [draws + 1, N]: how often it has each example."""
    name = _NAMES.get(metric, metric)
    stats_NS = np.asarray(scores.statistics(name), np.float64)[order]
    return scores.aggregate(name).weighted(stats_NS, weights)


def _answered_by_all(scores: Sequence[RetentionScores]) -> list[str]:
    """Metrics of answers that each of the models was scored by."""
    return [metric for metric in scores[0].answered if all(metric in of.answered for of in scores)]


def _compare(
    at_base: np.ndarray, at_single: np.ndarray, at_merged: np.ndarray, metric: str, sign: int
) -> tuple[dict[str, Any], np.ndarray]:
    gap, closed = at_base - at_single, at_base - at_merged  # both change sign for accuracies: the ratio does not
    row: dict[str, Any] = {"base": float(at_base[0]), "single": float(at_single[0]), "merged": float(at_merged[0])}
    if not sign * gap[0] > 2 * gap[1:].std():
        return row | {"retained": _share(np.empty(0))}, np.empty(0)
    # A resample in which the expert gained nothing has no share; with the gap beyond two standard errors that is rare.
    shares = closed / np.where(sign * gap > 0, gap, np.nan)
    row["retained"] = _share(shares)
    if metric != "loss" and at_single[0]:
        row["ratio"] = float(at_merged[0] / at_single[0])
    return row, shares


def _share(shares: np.ndarray) -> dict[str, object]:
    """The share of the expert's gain (of the sample itself, the first) with its interval, or why there is none."""
    if not len(shares):
        return {"value": None, "lower": None, "upper": None, "why": NOT_LEARNT}
    return {"value": float(shares[0]), **_interval(shares[1:]), "why": None}


def _interval(values: np.ndarray) -> dict[str, float]:
    low, high = np.nanquantile(values, [0.025, 0.975])
    return {"lower": float(low), "upper": float(high)}


def _summary(tasks: dict, drawn: dict, metric: str) -> dict:
    """Mean over the tasks whose expert learnt, with its interval, and the worst of them."""
    value_of = {task: row[metric]["retained"]["value"] for task, row in tasks.items() if metric in row}
    learnt = [task for task in value_of if value_of[task] is not None]
    worst = min(learnt, key=value_of.__getitem__, default=None)
    return {
        "mean": _share(np.mean([drawn[task][metric] for task in learnt], axis=0) if learnt else np.empty(0)),
        "min": None if worst is None else value_of[worst],
        "worst": worst,
        "undefined": [task for task in value_of if task not in learnt],
    }


def _control(base: RetentionScores, merged: RetentionScores, draws: int, seed: int) -> dict[str, float]:
    """L_merged - L_base with its interval: what the merge did to a task that nobody trained."""
    weights = _resamples(len(base.ids), draws, seed)
    at_merged, at_base = (_metric(x, _order(base, x, "control"), "loss", weights) for x in (merged, base))
    difference = at_merged - at_base
    return {"difference": float(difference[0]), **_interval(difference[1:])}
