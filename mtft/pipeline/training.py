"""The train stage: the joint run and the runs it is compared with, each an ordinary run in <output.dir>/train/NAME/.

joint           all tasks in the chosen mixture: what the user came for
baseline        all tasks in the mixture of run.baseline
single-TASK     one task alone: what the merge stage merges, and the yardstick of retention
strong          the joint run on the strong model: the yardstick of fusion
"""

from __future__ import annotations

import shlex
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from data_mixers.mixture import Mixture, natural, uniform
from mtft.data.planning import task_sizes
from mtft.errors import UserError
from mtft.pipeline import derive
from mtft.pipeline.stages import move_aside
from mtft.recipe.load import dump_recipe
from mtft.recipe.schema import Recipe
from mtft.train.folder import check_recipe, read_result

if TYPE_CHECKING:
    from mtft.train.run import TrainResult


def planned_runs(recipe: Recipe, mixture: Mixture, stores: Sequence[Any]) -> dict[str, Recipe]:
    """The recipes of the train stage by name, in the order in which they run."""
    root = Path(recipe.output.dir) / "train"
    runs = {"joint": derive.joint(recipe, mixture, root / "joint")}
    if recipe.run.baseline != "none" and len(recipe.tasks) > 1:
        sizes = task_sizes(recipe, stores)
        other = uniform(recipe.task_names) if recipe.run.baseline == "uniform" else natural(sizes)
        if other != mixture:
            runs["baseline"] = derive.joint(recipe, other, root / "baseline")
    if recipe.merge is not None and recipe.merge.adapters is None and recipe.run.singles:
        for task in recipe.task_names:
            runs[f"single-{task}"] = derive.single(recipe, task, mixture[task], root / f"single-{task}")
    if recipe.fuse is not None and recipe.run.tune_strong:
        runs["strong"] = derive.strong(recipe, mixture, root / "strong")
    return runs


def train_runs(
    runs: dict[str, Recipe], *, fresh: bool, launch: str | None, say: Callable[[str], None]
) -> dict[str, TrainResult]:
    """Trains what isn't finished; returns every run's result.

    fresh: a run of another recipe moves aside; launch: a command such as `accelerate launch --config_file X` to which
    `-m mtft train RECIPE` is appended (without it the runs go on in this process).
    """
    from mtft.train.run import train

    results = {}
    for name, recipe in runs.items():
        folder = Path(recipe.output.dir)
        if fresh:
            _clear_if_other(folder, recipe)
        finished = read_result(folder) is not None
        if not finished:
            say(f"train: {name}")
            if launch is not None:
                _launched(recipe, folder, launch)
        results[name] = train(recipe, quiet=finished or launch is not None, prove=name == "joint")
    return results


def _clear_if_other(folder: Path, recipe: Recipe) -> None:
    """Moves the folder aside if it holds a run of another recipe; a run of this one goes on or stands."""
    try:
        check_recipe(folder, recipe)
    except UserError:
        move_aside(folder)


def _launched(recipe: Recipe, folder: Path, launch: str) -> None:
    """`LAUNCH -m mtft train RECIPE` in its own processes; they write to our terminal."""
    written = folder.with_name(f"{folder.name}.recipe.yaml")
    written.parent.mkdir(parents=True, exist_ok=True)
    written.write_text(dump_recipe(recipe), encoding="utf-8")
    command = [*shlex.split(launch), "-m", "mtft", "train", str(written)]
    code = subprocess.run(command, check=False).returncode
    if code != 0 or read_result(folder) is None:
        print(f"the command was: {shlex.join(command)}", file=sys.stderr)
        raise UserError(
            f"the launched run of {folder.name} ended with exit code {code} before it was finished",
            where=str(folder),
            do="see its message above; the same command continues",
        )
