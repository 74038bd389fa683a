"""Recipes made from the user's recipe: the joint runs, the single-task runs, the tuned strong model.

Each derived run is an ordinary recipe: it lies in its folder, and `mtft train <folder>/recipe.yaml` repeats it.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import TypeVar

from pydantic import BaseModel

from data_mixers.mixture.mixture import Mixture
from mtft.data.demonstrations.pool import pool_task
from mtft.recipe.schema.mixture import MixtureSection
from mtft.recipe.schema.model import ModelSection
from mtft.recipe.schema.recipe import Recipe
from mtft.recipe.schema.run import RunSection
from mtft.recipe.schema.shots import DemonstrationRows
from mtft.recipe.schema.sweep import SweepSection
from mtft.recipe.schema.task import TaskSection
from mtft.recipe.schema.train import TrainSection
from mtft.recipe.targets import targets_of

SectionT = TypeVar("SectionT", bound=BaseModel)

MIN_SINGLE_STEPS = 10


def override_section(section: SectionT, **values: object) -> SectionT:
    """A copy of a frozen section with other values, checked like the original."""
    return type(section).model_validate({**dict(section), **values})


def joint_recipe(recipe: Recipe, mixture: Mixture | None, folder: Path) -> Recipe:
    """All tasks in the shares of `mixture`, which stay; None: as the recipe asks."""
    changes = {} if mixture is None else {"shares": mixture.as_dict(), "online": None}
    return _training_recipe(recipe, folder, mixture=override_section(recipe.mixture, **changes))


def single_task_recipe(recipe: Recipe, task: str, share: float, folder: Path) -> Recipe:
    """One task alone, for as many steps as make it see about the rows that the joint run gives it."""
    steps = recipe.run.single_steps
    if steps is None and recipe.train.steps is not None:
        steps = max(MIN_SINGLE_STEPS, math.ceil(recipe.train.steps * share))
    train = override_section(recipe.train, steps=steps, epochs=None) if steps else recipe.train
    tasks = tuple(_alone(recipe, section) for section in recipe.tasks if section.name == task)
    if not targets_of(recipe.model_copy(update={"tasks": tasks}), train.watch):
        train = override_section(train, watch="mean")
    mixture = MixtureSection(unit=recipe.mixture.unit, max_epochs=recipe.mixture.max_epochs, on_cap="redistribute")
    return _training_recipe(recipe, folder, tasks=tasks, mixture=mixture, train=train)


def _alone(recipe: Recipe, task: TaskSection) -> TaskSection:
    """The task as the only one of a recipe: it counts, and rows of another that it is shown are written out."""
    task = task.model_copy(update={"auxiliary": False})
    if task.shots is None or task.shots.source in (None, task.name):
        return task
    source = pool_task(recipe, task)
    assert source is not None
    rows = DemonstrationRows(**{key: getattr(source, key) for key in DemonstrationRows.model_fields})
    return task.model_copy(update={"shots": override_section(task.shots, **{"from": rows})})


def strong_recipe(recipe: Recipe, model: ModelSection, mixture: Mixture | None, folder: Path) -> Recipe:
    """The joint run on the strong `model`: what fusion is measured against."""
    return override_section(joint_recipe(recipe, mixture, folder), model=model)


def proxy_recipe(recipe: Recipe, sweep: SweepSection) -> Recipe:
    """What every trial shares: the recipe with the sweep's own model, adapter, length and batch. No checkpoints."""
    train = override_section(
        recipe.train, steps=sweep.steps, epochs=None, eval_every=None, patience=None, task_patience=None
    )
    if sweep.batch_tokens is not None:
        train = override_section(train, batch_tokens=sweep.batch_tokens)
    lora = recipe.lora if sweep.lora is None else None if sweep.lora == "full" else sweep.lora
    values = {"train": train, "lora": lora, "model": sweep.model or recipe.model}
    output = override_section(recipe.output, save_every=None, trackers=())
    return override_section(recipe, **values, output=output, sweep=None, merge=None, fuse=None, run=RunSection())


def unmeasured(recipe: Recipe) -> Recipe:
    """The recipe with every task's metrics and answers as they are by default."""
    plain = {name: TaskSection.model_fields[name].get_default() for name in ("metrics", "generate")}
    return recipe.model_copy(update={"tasks": tuple(task.model_copy(update=plain) for task in recipe.tasks)})


def _training_recipe(recipe: Recipe, folder: Path, *, train: TrainSection | None = None, **values: object) -> Recipe:
    """The recipe of one training run: no sections of other stages. The base is scored once, by the pipeline."""
    return override_section(
        recipe,
        **values,
        train=override_section(train or recipe.train, eval_on_start=False),
        output=override_section(recipe.output, dir=str(folder)),
        sweep=None,
        merge=None,
        fuse=None,
        run=RunSection(),
    )
