"""Names of what a recipe measures on held-out rows: "task/metric", as sweep.objective and train.watch use them.

A task's name alone is its held-out loss. Those of lm-evaluation-harness are "lm_eval/TASK/METRIC".
"""

from __future__ import annotations

from mtft.recipe.schema.metric import metric_key
from mtft.recipe.schema.recipe import Recipe
from mtft.recipe.schema.task import TaskSection

FORWARD = ("loss", "token_accuracy", "exact_match")
"""What the forward pass over the held-out rows gives, whatever a task's `metrics` are."""
OVER_TASKS = ("mean", "worst")
LM_EVAL = "lm_eval"


def metrics_of(task: TaskSection) -> tuple[str, ...]:
    """Keys of a task's metrics: those of the forward pass, then what has to be asked."""
    return tuple(dict.fromkeys([*FORWARD, *filter(None, map(metric_key, task.metrics))]))


def split_target(name: str) -> tuple[str, str]:
    """(task, mean or worst; metric) of "sql/f1" or "sql"."""
    of, _, metric = name.rpartition("/")
    return (of, metric) if of else (metric, "loss")


def targets_of(recipe: Recipe, name: str) -> tuple[str, ...]:
    """ "task/metric" of everything that "mean/f1", "worst", "sql/f1" or "sql" stands for; empty if nothing.

    Auxiliary tasks only by their names; where a metric is named, only tasks that have held-out rows to measure it on.
    """
    if name.startswith(f"{LM_EVAL}/"):
        return (name,) if name.split("/")[1] in lm_eval_tasks(recipe) else ()
    of, metric = split_target(name)
    tasks = [task for task in recipe.tasks if (of in OVER_TASKS and not task.auxiliary) or task.name == of]
    measured = [task for task in tasks if "/" not in name or task.eval_data is not None]
    return tuple(f"{task.name}/{metric}" for task in measured if metric in metrics_of(task))


def lm_eval_tasks(recipe: Recipe) -> tuple[str, ...]:
    """Names of lm-eval's tasks that the recipe measures."""
    return () if recipe.eval.lm_eval is None else recipe.eval.lm_eval.tasks


def objective_targets(recipe: Recipe) -> tuple[str, ...]:
    """ "task/metric" of everything that sweep.objective looks at."""
    if recipe.sweep is None:
        return ()
    objective = recipe.sweep.objective
    names = (objective,) if isinstance(objective, str) else objective
    return tuple(dict.fromkeys(target for name in names for target in targets_of(recipe, name)))
