"""Units: a quantity in another unit (pint, in exact fractions), rounded to four decimals."""

from __future__ import annotations

import random
from fractions import Fraction
from functools import cache
from typing import Any

from scripts.task_makers.base import MadeRow, TaskMaker, Wordings, on_side, pair

# What is asked is written as the unit is called in English; pint's name beside it. Both directions of each pair.
UNITS = {
    "inches": "inch",
    "feet": "foot",
    "yards": "yard",
    "miles": "mile",
    "centimetres": "centimeter",
    "metres": "meter",
    "kilometres": "kilometer",
    "ounces": "ounce",
    "pounds": "pound",
    "grams": "gram",
    "kilograms": "kilogram",
    "US gallons": "gallon",
    "litres": "liter",
    "minutes": "minute",
    "hours": "hour",
    "days": "day",
    "acres": "acre",
    "hectares": "hectare",
    "miles an hour": "mile / hour",
    "kilometres an hour": "kilometer / hour",
    "degrees Celsius": "degC",
    "degrees Fahrenheit": "degF",
}
PAIRS_OF_UNITS = (
    ("inches", "centimetres"),
    ("feet", "metres"),
    ("feet", "inches"),
    ("yards", "metres"),
    ("miles", "kilometres"),
    ("metres", "centimetres"),
    ("ounces", "grams"),
    ("pounds", "kilograms"),
    ("pounds", "ounces"),
    ("US gallons", "litres"),
    ("hours", "minutes"),
    ("days", "hours"),
    ("acres", "hectares"),
    ("miles an hour", "kilometres an hour"),
    ("degrees Celsius", "degrees Fahrenheit"),
)
DECIMALS = 4

WORDINGS = Wordings(
    seen=(
        "Convert {value} {old} to {new}.",
        "How many {new} are {value} {old}?",
        "{value} {old} in {new}:",
        "Give {value} {old} in {new}, with four decimals at the most.",
    ),
    unseen=("Express {value} {old} as {new}.", "A label says {value} {old}. What would it say in {new}?"),
)


def draw(rng: random.Random, held_out: bool) -> MadeRow:
    old, new = rng.sample(rng.choice(PAIRS_OF_UNITS), 2)
    # Whole numbers twice as often as tenths.
    tenths = on_side(held_out, "tenths", lambda: rng.choice((10, 10, 1)) * rng.randint(1, 2000))
    value = Fraction(tenths, 10)
    wording, answer = WORDINGS.draw(rng, held_out), written(converted(value, old, new))
    return pair(written(value), wording, answer, value=written(value), old=old, new=new)


def converted(value: Fraction, old: str, new: str) -> Fraction:
    return registry().Quantity(value, UNITS[old]).to(UNITS[new]).magnitude


@cache
def registry() -> Any:
    from pint import UnitRegistry

    return UnitRegistry(non_int_type=Fraction)


def written(value: Fraction) -> str:
    """Rounded to DECIMALS, without zeros at the end."""
    number = round(value * 10**DECIMALS)
    whole, rest = divmod(abs(number), 10**DECIMALS)
    digits = f"{whole}.{rest:0{DECIMALS}}".rstrip("0").rstrip(".")
    return f"-{digits}" if number < 0 else digits


TASKS = (
    TaskMaker(
        "units",
        draw,
        "a quantity → the number in another unit",
        "the number that is converted (every pair of units is seen)",
        ("pint",),
        ("loss", {"name": "numeric", "relative_tolerance": 0.001}),
        max_new_tokens=16,
    ),
)
