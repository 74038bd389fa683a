"""Options of a method that is a dataclass: its fields are the keys of a recipe, their annotations what is allowed."""

from __future__ import annotations

from dataclasses import fields
from typing import Any, get_type_hints

from pydantic import TypeAdapter, ValidationError

from mtft.common.errors import UserError


def options_of(kind: type) -> tuple[str, ...]:
    """Names of a method's options, as they stand in a recipe."""
    return tuple(field.name for field in fields(kind))


def check_options(method: Any, where: str) -> None:
    """Checks every option of a method by its annotation (2 becomes 2.0 where a float is asked for).

    Raises UserError at `where`.option.
    """
    hints = get_type_hints(type(method), include_extras=True)
    for name in options_of(type(method)):
        value = getattr(method, name)
        try:
            setattr(method, name, TypeAdapter(hints[name]).validate_python(value, strict=True))
        except ValidationError as error:
            raise UserError(f"{value!r}: {error.errors()[0]['msg'].lower()}", where=f"{where}.{name}") from None
