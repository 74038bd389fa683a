"""From what a recipe asks to the plan that is played: shares, examples in a step, number of steps, epoch caps.

The one place where this is decided: `mtft check` shows it, `mtft train` and the trials play it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import numpy as np

from data_mixers.mixture import Mixture, natural, tempered, uniform
from data_mixers.plan import MixturePlan
from mtft.recipe.schema import FileShares, Recipe, TemperatureShares


class Sized(Protocol):
    """What planning needs of a token store."""

    task: str

    @property
    def lengths(self) -> np.ndarray: ...  # tokens of each example, int64 [N]


def asked_mixture(recipe: Recipe, sizes: dict[str, int]) -> Mixture:
    """The shares that the recipe asks for. `sizes`: examples (or tokens, with unit tokens) of each task."""
    asked = recipe.mixture.shares
    if asked == "natural":
        return natural(sizes)
    if asked == "uniform":
        return uniform(recipe.task_names)
    if isinstance(asked, TemperatureShares):
        return tempered(sizes, asked.temperature)
    if isinstance(asked, FileShares):
        return Mixture.from_yaml(asked.file, names=recipe.task_names)
    shares = {name: float(asked.get(name, 0.0)) for name in recipe.task_names}  # a task that isn't named has share 0
    return Mixture.of(shares)


def task_sizes(recipe: Recipe, stores: Sequence[Sized]) -> dict[str, int]:
    """Size of each task in the unit of the recipe's shares: examples, or tokens."""
    if recipe.mixture.unit == "tokens":
        return {store.task: int(store.lengths.sum()) for store in stores}
    return {store.task: len(store.lengths) for store in stores}


def epoch_caps(recipe: Recipe) -> dict[str, float]:
    """max_epochs of each task that has one: its own, else the mixture's."""
    caps = {task.name: task.max_epochs or recipe.mixture.max_epochs for task in recipe.tasks}
    return {name: cap for name, cap in caps.items() if cap is not None}


def make_plan(recipe: Recipe, stores: Sequence[Sized], mixture: Mixture | None = None) -> MixturePlan:
    """The plan of a run over `stores` (one a task, in the recipe's order).

    unit examples: a step holds G = batch_tokens // mean length under the mixture examples (at least 1);
    unit tokens: a step holds batch_tokens tokens.
    epochs: steps = as many as show `epochs` times the rows (tokens) that all tasks have together.
    Raises MixError when a share asks for more epochs than allowed and on_cap is `error`.
    """
    by_examples = recipe.mixture.unit == "examples"
    mixture = mixture or asked_mixture(recipe, task_sizes(recipe, stores))
    lengths = [np.asarray(store.lengths) for store in stores]
    mean = sum(share * float(length.mean()) for share, length in zip(mixture.shares, lengths) if share > 0)
    batch = max(1, int(recipe.train.batch_tokens // mean)) if by_examples else recipe.train.batch_tokens
    steps, epochs = recipe.train.steps, recipe.train.epochs
    if steps is None:
        if epochs is None:
            raise ValueError("train.steps or train.epochs must be given")
        total = sum(len(length) if by_examples else int(length.sum()) for length in lengths)
        steps = max(1, round(epochs * total / batch))
    return MixturePlan(
        mixture,
        [len(length) for length in lengths],
        steps=steps,
        batch=batch,
        seed=recipe.seed,
        max_epochs=epoch_caps(recipe) or None,
        on_cap=recipe.mixture.on_cap,
        unit=recipe.mixture.unit,
        lengths=None if by_examples else lengths,
    )
