"""Whether what a finished run was trained and scored on is still what it was."""

from __future__ import annotations

from pathlib import Path

from mtft.common.errors import UserError
from mtft.recipe.schema.recipe import Recipe
from mtft.training.checkpoint.run_basis import check_finished_base
from mtft.training.run_files.run_dir import finished_on_other_data, read_result_file
from mtft.training.trainer_parts import data_identity, held_out_identity, read_training_inputs


def check_finished(recipe: Recipe) -> None:
    """UserError when rows (held-out ones too), or the base's weights, of a finished run have changed since.

    What is gone by now is no matter.
    """
    run_dir = Path(recipe.output.dir)
    check_finished_base(recipe, read_result_file(run_dir) or {}, run_dir)
    try:
        inputs = read_training_inputs(recipe)
    except UserError:
        return
    finished_on_other_data(run_dir, {**data_identity(inputs.stores), **held_out_identity(inputs.held_out)})
