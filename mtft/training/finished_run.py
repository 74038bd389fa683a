"""Whether what a finished run was trained and scored on, and by which metrics, is still what it was."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mtft.common.errors import UserError
from mtft.evaluation.questions import AskedMetrics
from mtft.recipe.schema.recipe import Recipe
from mtft.recipe.targets import FORWARD
from mtft.training.checkpoint.run_basis import check_finished_base
from mtft.training.run_files.run_dir import RESULT, finished_on_other_data, read_result_file
from mtft.training.training_inputs import data_identity, held_out_identity, read_training_inputs


def check_finished(recipe: Recipe) -> None:
    """UserError when rows (held-out ones too), the base's weights, or metrics of a finished run have changed since.

    What is gone by now is no matter.
    """
    run_dir = Path(recipe.output.dir)
    check_finished_base(recipe, read_result_file(run_dir) or {}, run_dir)
    try:
        inputs = read_training_inputs(recipe)
        code = AskedMetrics.of(recipe, inputs.tokenizer).user_code()
    except UserError:
        return
    finished_on_other_data(run_dir, {**data_identity(inputs.stores), **held_out_identity(inputs.held_out)})
    _scored_by_others(run_dir, recipe, code)


def _scored_by_others(run_dir: Path, recipe: Recipe, code: Mapping[str, str]) -> None:
    """UserError, naming the tasks, when the finished run was scored by other metrics than the recipe asks for.

    code: {"task/metric": SHA-256} of the user's own code among them.
    """
    content = read_result_file(run_dir) or {}
    basis = content.get("basis")
    if not isinstance(basis, Mapping):  # of an older version
        return
    was, now = _asked(Recipe.model_validate(basis.get("recipe"))), _asked(recipe)
    other = [f"tasks.{task}.metrics (or generate)" for task in now if was.get(task) != now[task]]
    known = content.get("scoring_code") or {}
    other += [f"the code of {name}" for name, digest in code.items() if known.get(name, digest) != digest]
    if other:
        raise UserError(
            f"the run is finished, and was scored otherwise: {', '.join(other)} changed since",
            where=str(run_dir),
            do=f"`mtft eval` scores it as asked for now; or delete {RESULT}: the same command then does the end again, "
            "and nothing is trained twice as long as the last checkpoint stands",
        )


def _asked(recipe: Recipe) -> dict[str, Any]:
    """{task: what was asked of the model beside the forward pass} of the tasks with held-out rows."""
    dumped = {task.name: task.model_dump(mode="json") for task in recipe.tasks if task.eval_data is not None}
    metrics = {task: [item for item in of["metrics"] if item not in FORWARD] for task, of in dumped.items()}
    return {task: (metrics[task], dumped[task]["generate"]) if metrics[task] else None for task in dumped}
