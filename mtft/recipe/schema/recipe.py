"""The recipe: one YAML file that says what a run does. Frozen, strict: an unknown key is an error at any depth.

The files of this folder only declare, one section each. Every field carries its description: `mtft schema` and
docs/recipe.md are made from them.
"""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from mtft.recipe.schema.data import DataSection
from mtft.recipe.schema.evaluation import EvalSection
from mtft.recipe.schema.fuse import FuseSection
from mtft.recipe.schema.lora import LoraSection
from mtft.recipe.schema.loss import LossSection
from mtft.recipe.schema.merge import MergeSection
from mtft.recipe.schema.mixture import MixtureSection
from mtft.recipe.schema.model import ModelSection
from mtft.recipe.schema.output import OutputSection
from mtft.recipe.schema.run import RunSection
from mtft.recipe.schema.section import RecipeSection
from mtft.recipe.schema.sweep import SweepSection
from mtft.recipe.schema.task import TaskSection
from mtft.recipe.schema.train import TrainSection


class Recipe(RecipeSection):
    """A whole recipe. Sections that a command does not need may be left out."""

    name: str
    """Name of the run in reports and trackers."""
    seed: Annotated[int, Field(ge=0, lt=2**32)] = 17
    """Seed of everything: plan, initialisation, dropout, sampling."""
    model: ModelSection
    tasks: Annotated[tuple[TaskSection, ...], Field(strict=False, min_length=1)]
    data: DataSection = DataSection()
    mixture: MixtureSection = MixtureSection()
    lora: LoraSection | None = LoraSection()
    """null = full fine-tuning."""
    loss: LossSection = LossSection()
    train: TrainSection
    eval: EvalSection = EvalSection()
    output: OutputSection
    sweep: SweepSection | None = None
    merge: MergeSection | None = None
    fuse: FuseSection | None = None
    run: RunSection = RunSection()

    @property
    def task_names(self) -> tuple[str, ...]:
        return tuple(task.name for task in self.tasks)

    @property
    def counted_tasks(self) -> tuple[str, ...]:
        """The tasks that means, the worst and verdicts are about: all but the auxiliary ones."""
        return tuple(task.name for task in self.tasks if not task.auxiliary)

    @property
    def auxiliary_tasks(self) -> tuple[str, ...]:
        return tuple(task.name for task in self.tasks if task.auxiliary)
