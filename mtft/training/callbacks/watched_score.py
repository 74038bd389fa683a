"""The number that `train.watch` names, of one evaluation.

    mean, worst, TASK                held-out loss: mean or worst over the tasks, or one task's
    mean/KEY, worst/KEY, TASK/KEY    the same of a metric, over the tasks that have it

Lower is better in what comes out: a metric where higher is better changes its sign.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from mtft.evaluation.task_scores import TaskScores
from mtft.recipe.schema.recipe import Recipe


def watched_metrics(recipe: Recipe) -> tuple[str, ...]:
    """ "task/metric" of all that `train.watch` looks at."""
    of, _, metric = recipe.train.watch.rpartition("/")
    if not of:
        return ()
    judged = recipe.counted_tasks if of in ("mean", "worst") else (of,)
    return tuple(f"{task}/{metric}" for task in recipe.task_names if task in judged)


def watched_score(watch: str, scores: Mapping[str, TaskScores], counted: Sequence[str]) -> float:
    """counted: tasks that mean and worst are over. A task without the metric has no part in them; NaN if none is left
    that has held-out rows.
    """
    of, _, metric = watch.rpartition("/")
    if not of:
        of, metric = watch, "loss"
    tasks = [task for task in counted if task in scores] if of in ("mean", "worst") else [of]
    if not tasks:
        return math.nan
    values = []
    for task in tasks:
        if metric in scores[task].metrics:
            sign = -1.0 if scores[task].aggregate(metric).higher_is_better else 1.0
            values.append(sign * scores[task].score(metric))
    if not values:
        raise ValueError(f"no task of {', '.join(tasks)} has the metric {metric!r}")
    return max(values) if of == "worst" else sum(values) / len(values)
