"""Held-out scores of everything the pipeline compares, kept on disk so that no model is scored twice."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from mtft.evaluation.task_scores import TaskScores

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


def table(stages: dict[str, Scores]) -> dict[str, dict[str, dict[str, float]]]:
    """{stage: {task: {metric: value}}}, as results.json holds it."""
    return {
        stage: {task: task_scores.summary() for task, task_scores in scores.items()} for stage, scores in stages.items()
    }
