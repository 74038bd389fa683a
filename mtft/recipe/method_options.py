"""Methods that are dataclasses: a recipe names one, its fields are the options, their annotations what is allowed.

The one checker of balancers, aggregators and merge methods.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import MISSING, fields
from functools import cache
from typing import Any, TypeVar, get_type_hints

from pydantic import TypeAdapter, ValidationError

from data_mixers.common.suggest import did_you_mean
from mtft.common.errors import UserError
from mtft.common.listing import clipped
from mtft.recipe.yaml_source import kind_of

Method = TypeVar("Method")
LARGEST = 1e12  # of any number among the options: past it are overflows and memory that nobody has


def find_method(
    methods: Mapping[str, Method],
    name: str,
    what: str,
    where: str,
    *,
    error: type[UserError] = UserError,
    hint_below: bool = False,
) -> Method:
    """methods[name]; `error` for an unknown name. what: "balancer". hint_below: the hint stands in the line of `do`."""
    if name in methods:
        return methods[name]
    hint, do = did_you_mean(name, methods), f"one of {', '.join(methods)}"
    if hint_below:
        hint, do = "", f"{hint.removeprefix(': ')} {do}".strip()
    raise error(f"unknown {what} {name!r}{hint}", where=where, do=do)


def options_of(kind: type) -> tuple[str, ...]:
    """Names of a method's options, as they stand in a recipe."""
    return tuple(field.name for field in fields(kind))


def check_option_names(
    method: str, known: tuple[str, ...], given: Iterable[str], where: str, *, error: type[UserError] = UserError
) -> None:
    """`error` at `where`.option for one that is not known. method: as it is called in the message."""
    for option in given:
        if option not in known:
            raise error(
                f"{method} has no option {option!r}{did_you_mean(option, known)}",
                where=f"{where}.{option}",
                do=f"its options: {', '.join(known) or 'none'}",
            )


def check_options(method: Any, where: str, *, error: type[UserError] = UserError) -> None:
    """Checks every option of a method by its annotation (2 becomes 2.0 where a float is asked for, and 2.0 becomes 2).

    No number may be beyond LARGEST, infinite or NaN. Raises `error` at `where`.option.
    """
    for field in fields(method):
        value = getattr(method, field.name)
        try:
            object.__setattr__(method, field.name, _validated(_adapters(type(method))[field.name], value))
        except ValidationError as invalid:
            do = None if field.default is MISSING else f"the default is {field.default!r}"
            what = f"{_shown(value)}: {invalid.errors()[0]['msg'].lower()}"
            raise error(what, where=f"{where}.{field.name}", do=do) from None
        for number in _numbers_in(getattr(method, field.name)):
            if not abs(number) <= LARGEST:
                what = f"{_shown(number)}: a number between -{LARGEST:g} and {LARGEST:g} is needed"
                raise error(what, where=f"{where}.{field.name}", do=f"the default is {field.default!r}")


def _numbers_in(value: Any) -> Iterator[int | float]:
    """The numbers of an option, also inside of lists and mappings."""
    if isinstance(value, int | float):
        yield value
    elif isinstance(value, Mapping | list | tuple):
        for part in value.values() if isinstance(value, Mapping) else value:
            yield from _numbers_in(part)


def _shown(value: Any) -> str:
    return kind_of(value) if type(value) is int else clipped(repr(value), 100)


@cache
def _adapters(kind: type) -> dict[str, TypeAdapter[Any]]:
    hints = get_type_hints(kind, include_extras=True)
    return {name: TypeAdapter(hints[name]) for name in options_of(kind)}


def _validated(adapter: TypeAdapter[Any], value: Any) -> Any:
    try:
        return adapter.validate_python(value, strict=True)
    except ValidationError:
        if not (isinstance(value, float) and value.is_integer()):  # YAML's 2e2 is a float
            raise
        return adapter.validate_python(int(value), strict=True)
