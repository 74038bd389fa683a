"""Every number of a recipe has an upper end, and what is beyond it is refused with its key."""

from __future__ import annotations

import types
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Annotated, Any, Union, get_args, get_origin

import pytest
from annotated_types import Le, Lt

from mtft.common.errors import UserError
from mtft.recipe.error_messages import _flatten
from mtft.recipe.method_options import check_options
from mtft.recipe.schema.recipe import Recipe
from mtft.recipe.schema.section import RecipeSection

OPTIONS = {".loss.gradients.options", ".merge.options", ".merge.per_module.options"}  # judged by the method's class


def endless(annotation: Any, metadata: list[Any], place: str) -> Iterator[str]:
    """Keys of numbers without an upper end."""
    origin, parts = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        yield from endless(parts[0], [*metadata, *parts[1:]], place)
    elif origin in (Union, types.UnionType, tuple, dict):
        for part in parts:
            yield from endless(part, metadata if origin in (Union, types.UnionType) else [], place)
    elif annotation in (int, float):
        if not any(isinstance(item, Le | Lt) for item in _flatten(metadata)):
            yield place
    elif isinstance(annotation, type) and issubclass(annotation, RecipeSection):
        for name, field in annotation.model_fields.items():
            yield from endless(field.annotation, field.metadata, f"{place}.{name}")


def test_every_number_has_an_upper_end():
    assert set(endless(Recipe, [], "")) == OPTIONS


@pytest.mark.parametrize(
    ("override", "needed"),
    [
        ("train.steps=100000000000000000000", "train.steps is 100000000000000000000, and must be a whole number > 0"),
        ("seed=4294967296", "seed is 4294967296, and must be a whole number >= 0 and < 4294967296"),
        ("seed=-1", "seed is -1, and must be a whole number >= 0 and < 4294967296"),
        ("train.batch_tokens=1000000000000000", "a whole number > 0 and <= 100000000"),
        ("train.learning_rate=1e300", "train.learning_rate is 1e+300, and must be a number > 0 and <= 1000"),
        ("merge.weights=[1e300]", "merge.weights.0 is 1e+300, and must be a number >= -1000000000 and <= 1000000000"),
        (f"train.steps={'9' * 5000}", "train.steps is '999"),
        (f"lora.alpha={'9' * 400}", "lora.alpha is a number of about 400 digits, and must be a number > 0"),
        (f"seed=0x{'f' * 5000}", "seed is a number of about 6020 digits"),
    ],
)
def test_numbers_out_of_range_are_refused_with_the_bound(folder, override, needed):
    assert needed in folder.message(override)


@dataclass
class Options:
    rate: float = 1.0
    count: int = 2
    each: dict[str, float] | None = None


@pytest.mark.parametrize(
    "options", [{"rate": 1e300}, {"rate": float("nan")}, {"count": 10**5000}, {"each": {"a": -1e13}}]
)
def test_options_of_methods_have_an_upper_end(options):
    with pytest.raises(UserError, match="a number between -1e\\+12 and 1e\\+12 is needed"):
        check_options(Options(**options), "merge.options")


def test_names_of_tasks_leave_room_for_names_of_files(folder):
    assert "a name of at most 100 letters" in folder.message(f"tasks.sum.name={'n' * 101}")


@pytest.mark.parametrize("shares", ["{file: 5}", "{schedule: 5}"])
def test_a_rule_of_the_wrong_kind_is_no_task(folder, shares):
    rule = shares[1:].partition(":")[0]
    assert f"mixture.shares.{rule} is 5, and must be" in folder.message(f"mixture.shares={shares}")
