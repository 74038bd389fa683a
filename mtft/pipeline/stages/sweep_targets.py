"""What a sweep optimises (sweep.objective), what is predicted beside it, and what is known of each score."""

from __future__ import annotations

from typing import Any

from mtft.common.aggregates import AGGREGATES, Aggregate
from mtft.common.fingerprint import content_hash
from mtft.evaluation.lm_eval_tasks import LmEvalTasks
from mtft.evaluation.metrics import make_metrics
from mtft.evaluation.task_scores import FORWARD
from mtft.recipe.schema.recipe import Recipe
from mtft.recipe.targets import LM_EVAL, objective_targets, split_target, targets_of


def sweep_goals(recipe: Recipe) -> dict[str, str]:
    """{target: min | max} of what the objective looks at; it is also what gives a trial up."""
    found = _aggregates(recipe, objective_targets(recipe))
    return {target: "max" if aggregate.higher_is_better else "min" for target, aggregate in found.items()}


def fitted_targets(recipe: Recipe) -> dict[str, Aggregate]:
    """Everything that is predicted. Where single scores are weighed, each task's loss stands beside them."""
    losses = [] if _is_word(recipe) else [f"{task.name}/loss" for task in recipe.tasks if task.eval_data is not None]
    return _aggregates(recipe, dict.fromkeys([*objective_targets(recipe), *losses]))


def sweep_objective(recipe: Recipe) -> Any:
    """sweep.objective as data_mixers has it: mean, worst, or weights of "task/metric"."""
    objective = None if recipe.sweep is None else recipe.sweep.objective
    if isinstance(objective, dict):
        return {target: weight for name, weight in objective.items() for target in targets_of(recipe, name)}
    return split_target(objective or "mean")[0]


def asked_in_trials(recipe: Recipe) -> str:
    """Fingerprint of what trials are asked for beside the forward pass, with the user's own code that scores it; empty
    where the objective needs none.
    """
    asked = []
    for task in recipe.tasks:
        for key, metric in make_metrics(task).items():
            if metric.NEEDS != "forward" and f"{task.name}/{key}" in objective_targets(recipe):
                # code is known by its content, wherever it lies
                what = f"{metric.NAME} {metric.digest}" if metric.digest is not None else repr(metric)
                asked.append(f"{task.name}/{key} {what} {task.generate!r}")
    harness = [target for target in objective_targets(recipe) if target.startswith(f"{LM_EVAL}/")]
    if harness and recipe.eval.lm_eval is not None:
        asked += [*harness, recipe.eval.lm_eval.model_dump_json()]
    return content_hash("\n".join(asked)) if asked else ""


def _is_word(recipe: Recipe) -> bool:
    return recipe.sweep is None or isinstance(recipe.sweep.objective, str)


def _aggregates(recipe: Recipe, targets: Any) -> dict[str, Aggregate]:
    forward = {key: AGGREGATES[name] for key, name in FORWARD.items()}
    harness = [target for target in targets if target.startswith(f"{LM_EVAL}/")]
    if harness and recipe.eval.lm_eval is not None:
        tasks = LmEvalTasks.load(recipe.eval.lm_eval)
        known = {target: tasks.aggregate(target) for target in harness}
    else:
        known = {}
    own = {
        task.name: {key: metric.aggregate for key, metric in make_metrics(task).items()} | forward
        for task in recipe.tasks
    }
    return {target: known.get(target) or own[split_target(target)[0]][split_target(target)[1]] for target in targets}
