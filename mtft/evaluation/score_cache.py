"""Held-out scores of everything the pipeline compares, kept on disk so that no model is scored twice."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from mtft.common.errors import UserError
from mtft.evaluation.metrics import make_metrics
from mtft.evaluation.task_scores import TaskScores
from mtft.recipe.schema.recipe import Recipe
from mtft.recipe.targets import FORWARD, metrics_of

Scores = dict[str, TaskScores]


def load_or_score(folder: Path, tasks: tuple[str, ...], score: Callable[[], Scores]) -> Scores:
    """The scores in `folder` (one file a task), or those of `score()`, which are then kept there."""
    paths = {task: folder / f"{task}.jsonl" for task in tasks}
    if all(path.is_file() for path in paths.values()):
        return {task: TaskScores.load(path) for task, path in paths.items()}
    scores = score()
    for task, task_scores in scores.items():
        task_scores.save(paths[task])
    return scores


def measured_state(recipe: Recipe) -> dict[str, Any]:
    """What decides which scores there are, for the key of a cache; empty where the forward pass gives them all."""
    asked = {
        task.name: {"metrics": task.model_dump(mode="json")["metrics"], "generate": task.generate.model_dump()}
        for task in recipe.tasks
        if not {*metrics_of(task)} <= {*FORWARD}
    }
    code = {
        f"{task.name}/{key}": metric.digest
        for task in recipe.tasks
        for key, metric in make_metrics(task).items()
        if metric.digest is not None
    }
    return {"asked": asked, "code": code} if asked else {}


def check_same_examples(stages: dict[str, Scores], root: Path) -> None:
    """UserError where two stages' scores of a task are of other examples: nothing can be compared then."""
    for task in dict.fromkeys(task for scores in stages.values() for task in scores):
        seen = {stage: frozenset(scores[task].ids) for stage, scores in stages.items() if task in scores}
        first, *others = seen.items()
        for stage, ids in others:
            if ids != first[1]:
                raise UserError(
                    f"the scores of {task} are of other examples: {len(first[1])} of {first[0]}, {len(ids)} of {stage}",
                    where=str(root),
                    do="--fresh runs the stages again whose inputs have changed; else delete the folder of that stage",
                )


def table(stages: dict[str, Scores]) -> dict[str, dict[str, dict[str, float]]]:
    """{stage: {task: {metric: value}}}, as results.json holds it."""
    return {
        stage: {task: task_scores.summary() for task, task_scores in scores.items()} for stage, scores in stages.items()
    }
