"""The train stage: the joint run and the runs it is compared with, each an ordinary run in <output.dir>/train/NAME/.

joint           all tasks in the chosen mixture: what the user came for
predicted       all tasks in the mixture that the trials propose, where that is not the chosen one
baseline        all tasks in the mixture of run.baseline
single-TASK     one task alone, if it counts: what the merge stage merges, and the yardstick of retention
strong          the joint run on the strong model: the yardstick of fusion
"""

from __future__ import annotations

import shlex
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from data_mixers.mixture.mixture import Mixture, natural, uniform
from mtft.common.atomic_io import write_text
from mtft.common.errors import UserError
from mtft.common.folder_lock import sole_writer
from mtft.data.planning import task_sizes
from mtft.pipeline.stages import derived_recipes
from mtft.pipeline.stages.stage_cache import move_aside
from mtft.recipe.load import dump_recipe
from mtft.recipe.schema.recipe import Recipe
from mtft.training.run_files.run_dir import check_recipe, read_result_file

if TYPE_CHECKING:
    from mtft.training.run_training import TrainResult


@dataclass(frozen=True)
class RunChoice:
    """The mixtures of the joint runs. chosen: what to play; proposed: what the trials propose (None: no trials)."""

    chosen: Mixture
    proposed: Mixture | None = None


def joint_mixtures(recipe: Recipe, choice: RunChoice, stores: Sequence[Any]) -> dict[str, Mixture]:
    """The mixture of each joint run: `joint`, and `predicted` and `baseline` where they differ from it."""
    mixtures = {"joint": choice.chosen}
    if choice.proposed is not None and recipe.run.predicted == "always":
        mixtures["predicted"] = choice.proposed
    if recipe.run.baseline != "none":
        sizes = task_sizes(recipe, stores)
        mixtures["baseline"] = uniform(recipe.task_names) if recipe.run.baseline == "uniform" else natural(sizes)
    different: dict[str, Mixture] = {}
    moves = recipe.mixture.moves  # `joint` is then only its mean, or its start: equal to none
    for name, mixture in mixtures.items():
        if moves or all(mixture != other for other in different.values()):
            different[name] = mixture
    return different


def joint_labels(recipe: Recipe, choice: RunChoice, stores: Sequence[Any]) -> dict[str, str]:
    """How each joint run is called in tables: by where its mixture comes from."""
    sizes = task_sizes(recipe, stores)
    known = [(choice.proposed, "predicted"), (uniform(recipe.task_names), "uniform"), (natural(sizes), "natural")]
    labels = {}
    for name, mixture in joint_mixtures(recipe, choice, stores).items():
        if name == "joint" and recipe.mixture.moves:
            labels[name] = "joint as asked"
            continue
        labels[name] = "joint " + next((word for other, word in known if other == mixture), "as asked")
    return labels


def planned_runs(recipe: Recipe, choice: RunChoice, stores: Sequence[Any]) -> dict[str, Recipe]:
    """The recipes of the train stage by name, in the order in which they run."""
    root, mixture = Path(recipe.output.dir) / "train", choice.chosen
    joints = joint_mixtures(recipe, choice, stores)
    # shares that move are played as asked (a recipe with them has no sweep that could propose anything else)
    as_asked = recipe.mixture.moves
    runs = {
        name: derived_recipes.joint_recipe(recipe, None if as_asked and name == "joint" else played, root / name)
        for name, played in joints.items()
    }
    if recipe.merge is not None and recipe.merge.adapters is None and recipe.run.singles:
        for task in recipe.counted_tasks:
            runs[f"single-{task}"] = derived_recipes.single_task_recipe(
                recipe, task, mixture[task], root / f"single-{task}"
            )
    if recipe.fuse is not None and recipe.run.tune_strong:
        runs["strong"] = derived_recipes.strong_recipe(
            recipe, recipe.fuse.strong, None if as_asked else mixture, root / "strong"
        )
    return runs


def train_runs(
    runs: dict[str, Recipe], *, fresh: bool, launch: str | None, say: Callable[[str], None]
) -> dict[str, TrainResult]:
    """Trains what isn't finished; returns every run's result.

    fresh: a run of another recipe moves aside; launch: a command such as `accelerate launch --config_file X` to which
    `-m mtft train RECIPE` is appended (without it the runs go on in this process).
    """
    from mtft.training.run_training import train

    results = {}
    for name, recipe in runs.items():
        folder = Path(recipe.output.dir)
        if fresh:
            _clear_if_other(folder, recipe)
        finished = read_result_file(folder) is not None
        if not finished:
            say(f"train: {name}")
            if launch is not None:
                _launched(recipe, folder, launch)
        results[name] = train(recipe, quiet=finished or launch is not None, prove=name == "joint")
        if (why := results[name].not_proved) is not None:
            say(f"warning: {name} is trained, not proved: {why}\n  do: mtft export {folder}")
    return results


def _clear_if_other(folder: Path, recipe: Recipe) -> None:
    """Moves the folder aside if it holds a run of another recipe, or none that can be read; a run of this one goes on
    or stands.
    """
    from mtft.training.checkpoint.checkpoint import check_checkpoint_recipe
    from mtft.training.checkpoint.checkpoint_files import latest_checkpoint
    from mtft.training.finished_run import check_finished

    with sole_writer(folder):
        try:
            check_recipe(folder, recipe)
            if read_result_file(folder) is not None:
                check_finished(recipe)
            elif (checkpoint := latest_checkpoint(folder, say=lambda _: None, tidy=False)) is not None:
                check_checkpoint_recipe(checkpoint, recipe)
        except UserError:
            move_aside(folder)


def _launched(recipe: Recipe, folder: Path, launch: str) -> None:
    """`LAUNCH -m mtft train RECIPE` in its own processes; they write to our terminal."""
    written = folder.with_name(f"{folder.name}.recipe.yaml")
    write_text(written, dump_recipe(recipe))
    command = [*shlex.split(launch), "-m", "mtft", "train", str(written)]
    code = subprocess.run(command, check=False).returncode
    if code != 0 or read_result_file(folder) is None:
        print(f"the command was: {shlex.join(command)}", file=sys.stderr)
        raise UserError(
            f"the launched run of {folder.name} ended with exit code {code} before it was finished",
            where=str(folder),
            do="see its message above; the same command continues",
        )
