"""`mtft mix blame`: what each dataset of a recipe's mixture is worth, by the trials that its sweep has run."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from mtft.common.errors import UserError
from mtft.common.folder_lock import sole_writer
from mtft.common.own_files import write_own
from mtft.pipeline.stages.mix import current_mixture, fit_trials, own_trials, sweep_section, too_few
from mtft.pipeline.stages.mix_files import BLAME, LEDGER, mix_dir, refuse_foreign_files
from mtft.pipeline.stages.sweep_targets import sweep_objective
from mtft.recipe.schema.recipe import Recipe

if TYPE_CHECKING:
    from data_mixers.propose.blame import Blame


def mix_blame(recipe: Recipe) -> tuple[Path, Blame]:
    """(blame.json, what stands in it). UserError where no trials have been run."""
    from data_mixers.propose.blame import Blame, blame

    sweep_section(recipe)  # a recipe without one is told so first
    folder = mix_dir(recipe)
    if not (folder / LEDGER).is_file():
        raise UserError("no trials have been run", where=str(folder / LEDGER), do="mtft mix sweep RECIPE")
    refuse_foreign_files(recipe, LEDGER, BLAME)
    current = current_mixture(recipe)
    if (why := too_few(recipe)) is not None:
        found = Blame.undecided(current, why)
    else:
        fits = fit_trials(recipe, own_trials(recipe))
        found = blame(fits, sweep_objective(recipe), current=current, seed=recipe.seed)
    with sole_writer(folder):
        write_own(folder / BLAME, found.as_dict())
    return folder / BLAME, found
