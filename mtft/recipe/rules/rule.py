"""One row of the table of what can't go together, and the questions about a recipe that several rows ask."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

from mtft.common.listing import listed
from mtft.distributed.launch import LaunchConfig
from mtft.recipe.schema.metric import metric_key
from mtft.recipe.schema.model import ModelSection
from mtft.recipe.schema.recipe import Recipe
from mtft.recipe.schema.sweep import SweepSection
from mtft.recipe.targets import FORWARD, objective_targets, split_target

Stage = Literal["check", "train", "eval", "mix", "merge", "fuse", "run"]
TRAINING: tuple[Stage, ...] = ("check", "train", "mix", "run")
MERGING: tuple[Stage, ...] = ("check", "merge", "run")


class BalancerFacts(Protocol):
    """What of a balancer's needs matters here (mtft.losses.balancers.base.BalancerNeeds has it)."""

    @property
    def valid_every(self) -> int | None: ...


@dataclass(frozen=True)
class Rule:
    """One row of the table. `when` sees the recipe, the engine, and what the balancer needs (None: not asked).

    tasks: the tasks that it is about, which `why` then ends with.
    """

    keys: str
    stages: tuple[Stage, ...]
    when: Callable[[Recipe, LaunchConfig, BalancerFacts | None], bool]
    why: str
    do: str
    fatal: bool = True
    tasks: Callable[[Recipe], Sequence[str]] | None = None

    def reason(self, recipe: Recipe) -> str:
        return self.why if self.tasks is None else f"{self.why}: {listed(self.tasks(recipe))}"


def without_eval(recipe: Recipe) -> list[str]:
    return [task.name for task in recipe.tasks if task.eval_data is None]


def counted_without_eval(recipe: Recipe) -> list[str]:
    return [name for name in without_eval(recipe) if name in recipe.counted_tasks]


def judged_without_eval(recipe: Recipe) -> list[str]:
    """The tasks without eval_data by whose held-out losses something is decided: auxiliary ones only where named."""
    objective = recipe.sweep and recipe.sweep.objective
    named = {
        split_target(name)[0] for name in (recipe.train.watch, *(objective if isinstance(objective, dict) else ()))
    }
    every = recipe.train.task_patience is not None
    return [name for name in without_eval(recipe) if every or name in recipe.counted_tasks or name in named]


def asked(recipe: Recipe) -> list[str]:
    """The tasks that name metrics beyond those of the forward pass."""
    return [task.name for task in recipe.tasks if any(metric_key(metric) not in FORWARD for metric in task.metrics)]


def asked_without_eval(recipe: Recipe) -> list[str]:
    """Those that have no rows to measure them on."""
    return [name for name in asked(recipe) if name in without_eval(recipe)]


def asked_with_eval(recipe: Recipe) -> list[str]:
    return [name for name in asked(recipe) if name not in without_eval(recipe)]


def reads_labels_in_trials(recipe: Recipe) -> bool:
    """Whether the objective looks at labels that are read from held-out rows of which trials see the first alone."""
    if recipe.sweep is None or recipe.sweep.eval_limit is None:
        return False
    targets = objective_targets(recipe)
    return any(
        f"{task.name}/{metric_key(item)}" in targets
        and (item if isinstance(item, str) else getattr(item, "name", None)) in ("label_accuracy", "label_macro_f1")
        and (isinstance(item, str) or not (item.model_extra or {}).get("labels"))
        for task in recipe.tasks
        for item in task.metrics
    )


def planned_trials(recipe: Recipe) -> int:
    """Trials that the sweep will run; 0 without one."""
    if recipe.sweep is None:
        return 0
    if recipe.sweep.design != "cocktail":
        return recipe.sweep.trials
    from data_mixers.design.cocktail import cocktail_grid

    return len(cocktail_grid(len(recipe.tasks))) * (1 + recipe.sweep.repeats)


def part_of_several_gpus(sweep: SweepSection | None) -> bool:
    """True where a trial asks for, say, one GPU and a half."""
    gpus = None if sweep is None or sweep.resources is None else sweep.resources.gpus
    return gpus is not None and gpus > 1 and gpus % 1 != 0


def quantised(model: ModelSection) -> bool:
    return model.quantise != "none"


def asks(recipe: Recipe, key: str) -> bool:
    """Whether a key of loss.gradients is set."""
    return recipe.loss.gradients is not None and bool(getattr(recipe.loss.gradients, key))


def compares_gradients(recipe: Recipe) -> bool:
    return recipe.loss.gradients is not None or recipe.loss.balancer.name in ("lagged", "gradnorm")


def merges_own_adapters(recipe: Recipe) -> bool:
    return recipe.merge is not None and recipe.merge.adapters is None


def merge_sees_rows(recipe: Recipe) -> bool:
    """The merge chooses something by rows."""
    merge = recipe.merge
    if merge is None or merge.base is not None:
        return False
    routes = merge.experts is not None and merge.experts.kind == "twin"
    return merge.search is not None or merge.gates is not None or routes


def epoch_capped(recipe: Recipe) -> bool:
    return recipe.mixture.max_epochs is not None or any(task.max_epochs is not None for task in recipe.tasks)


def schedule_free(recipe: Recipe) -> bool:
    return recipe.train.optimizer.startswith("schedule_free")


def decides_by_evaluation(recipe: Recipe) -> bool:
    train = recipe.train
    return train.patience is not None or train.task_patience is not None or recipe.output.export == "best"
