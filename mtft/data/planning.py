"""From what a recipe asks to the plan that is played: shares, examples in a step, number of steps, epoch caps.

The one place where this is decided: `mtft check` shows it, `mtft train` and the trials play it.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from data_mixers.mixture.bounds import Bounds, Group, Infeasible
from data_mixers.mixture.mixture import Mixture, natural, tempered, uniform
from data_mixers.plan.mixture_plan import MixturePlan
from data_mixers.plan.replanned import ReplannedPlan
from data_mixers.plan.schedule import MixtureSchedule
from mtft.common.errors import UserError
from mtft.data.store.token_store import TokenStore
from mtft.recipe.schema.mixture import FileShares, ScheduleShares, TemperatureShares
from mtft.recipe.schema.recipe import Recipe
from mtft.recipe.schema.section import MOST_STEPS


def requested_shares(recipe: Recipe, sizes: dict[str, int]) -> Mixture | MixtureSchedule:
    """The shares that the recipe asks for. `sizes`: examples (or tokens, with unit tokens) of each task."""
    shares = recipe.mixture.shares
    if isinstance(shares, ScheduleShares):
        return MixtureSchedule(
            tuple((stop.at, _resolve_shares(recipe, stop.shares, sizes)) for stop in shares.schedule)
        )
    return _resolve_shares(recipe, shares, sizes)


def requested_mixture(recipe: Recipe, sizes: dict[str, int]) -> Mixture:
    """The same as one mixture: of a schedule its mean."""
    requested = requested_shares(recipe, sizes)
    return requested.mean() if isinstance(requested, MixtureSchedule) else requested


def _resolve_shares(recipe: Recipe, shares: object, sizes: dict[str, int]) -> Mixture:
    """One mixture of the recipe. Rules keep to its floors, caps and groups; what is written out is what is played."""
    if isinstance(shares, FileShares):
        return Mixture.from_yaml(shares.file, names=recipe.task_names)
    if isinstance(shares, dict):
        return Mixture.of({name: float(shares.get(name, 0.0)) for name in recipe.task_names})
    if isinstance(shares, TemperatureShares):
        mixture = tempered(sizes, shares.temperature)
    else:
        mixture = natural(sizes) if shares == "natural" else uniform(recipe.task_names)
    bounds = share_bounds(recipe)
    try:
        return Mixture(mixture.names, bounds.project(mixture)) if bounds.violations(mixture) else mixture
    except Infeasible as error:
        raise Infeasible(error.what, where="mixture.floors, caps, groups", do=error.do) from None


def share_bounds(recipe: Recipe) -> Bounds:
    """The recipe's floors, caps and groups (no epoch caps: they depend on the run's length)."""
    mixture = recipe.mixture
    return Bounds(floors=mixture.floors, caps=mixture.caps, groups=groups(recipe), names=recipe.task_names)


def groups(recipe: Recipe) -> tuple[Group, ...]:
    """mixture.groups for data_mixers."""
    named = recipe.mixture.groups
    return tuple(Group(name, group.tasks, group.floor, group.cap) for name, group in named.items())


def task_sizes(recipe: Recipe, stores: Sequence[TokenStore]) -> dict[str, int]:
    """Size of each task in the unit of the recipe's shares: examples, or tokens."""
    if recipe.mixture.unit == "tokens":
        return {store.task: int(store.lengths.sum()) for store in stores}
    return {store.task: len(store.lengths) for store in stores}


def epoch_caps(recipe: Recipe) -> dict[str, float]:
    """max_epochs of each task that has one: its own, else the mixture's."""
    caps = {task.name: task.max_epochs or recipe.mixture.max_epochs for task in recipe.tasks}
    return {name: cap for name, cap in caps.items() if cap is not None}


def _mean_length(stores: Sequence[TokenStore], requested: Mixture | MixtureSchedule) -> float:
    """Tokens of an example, on average under the mixture (of a schedule: its mean)."""
    shares = requested.mean().shares if isinstance(requested, MixtureSchedule) else requested.shares
    return sum(share * float(store.lengths.mean()) for share, store in zip(shares, stores) if share > 0)


def batch_tokens_of(recipe: Recipe, stores: Sequence[TokenStore], examples: int) -> int:
    """train.batch_tokens of steps that hold so many examples."""
    mean = _mean_length(stores, requested_shares(recipe, task_sizes(recipe, stores)))
    return int(examples * mean) + 1  # less than one example more


def make_plan(
    recipe: Recipe, stores: Sequence[TokenStore], mixture: Mixture | None = None
) -> MixturePlan | ReplannedPlan:
    """The plan of a run over `stores` (one a task, in the recipe's order); with mixture.online a chain that begins so.

    unit examples: a step holds G = batch_tokens // mean length under the mixture examples (at least 1; of a schedule:
    under its mean, so steps grow and shrink with the shares of long examples);
    unit tokens: a step holds batch_tokens tokens.
    epochs: steps = as many as show `epochs` times the rows (tokens) that all tasks have together.
    Raises MixError when a share asks for more epochs than allowed and on_cap is `error`, UserError for too many steps.
    """
    by_examples = recipe.mixture.unit == "examples"
    requested = mixture or requested_shares(recipe, task_sizes(recipe, stores))
    lengths = [np.asarray(store.lengths) for store in stores]
    mean = _mean_length(stores, requested)
    batch = max(1, int(recipe.train.batch_tokens // mean)) if by_examples else recipe.train.batch_tokens
    steps, epochs = recipe.train.steps, recipe.train.epochs
    if steps is None:
        if epochs is None:
            raise ValueError("train.steps or train.epochs must be given")
        total = sum(len(length) if by_examples else int(length.sum()) for length in lengths)
        steps = max(1, round(epochs * total / batch))
        if steps > MOST_STEPS:
            what = f"{epochs:g} epochs are {steps:,} steps, and {MOST_STEPS:,} is the most"
            raise UserError(what, where="train.epochs", do="lower train.epochs, or raise train.batch_tokens")
    return (MixturePlan if recipe.mixture.online is None else ReplannedPlan)(
        requested,
        [len(length) for length in lengths],
        steps=steps,
        batch=batch,
        seed=recipe.seed,
        max_epochs=epoch_caps(recipe) or None,
        on_cap=recipe.mixture.on_cap,
        unit=recipe.mixture.unit,
        lengths=None if by_examples else lengths,
        style="alternating" if recipe.train.batch_style == "alternating" else "mixed",
    )
