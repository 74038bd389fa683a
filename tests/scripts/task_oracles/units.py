"""Units by their legal definitions as exact fractions of the metre, kilogram, litre, second and square metre."""

import re
from fractions import Fraction

FACTORS = {
    name: Fraction(size)
    for name, size in {
        "inches": "0.0254",
        "feet": "0.3048",
        "yards": "0.9144",
        "miles": "1609.344",
        "centimetres": "0.01",
        "metres": "1",
        "kilometres": "1000",
        "ounces": "0.028349523125",
        "pounds": "0.45359237",
        "grams": "0.001",
        "kilograms": "1",
        "US gallons": "3.785411784",
        "litres": "1",
        "minutes": "60",
        "hours": "3600",
        "days": "86400",
        "hectares": "10000",
        "miles an hour": "1609.344",
        "kilometres an hour": "1000",
    }.items()
}
# The acre of pint is that of the US survey foot, 1200/3937 m: 43,560 square feet.
FACTORS["acres"] = 43560 * Fraction(1200, 3937) ** 2
DEGREES = ("degrees Celsius", "degrees Fahrenheit")
NAME = "|".join(sorted([*FACTORS, *DEGREES], key=len, reverse=True))


def exact(value, old, new):
    if old in DEGREES:
        return value * Fraction(9, 5) + 32 if old == DEGREES[0] else (value - 32) * Fraction(5, 9)
    return value * FACTORS[old] / FACTORS[new]


def units(row):
    asked = re.search(rf"([\d.]+) ({NAME})", row["prompt"])
    rest = row["prompt"].replace(asked[0], "")
    (new,) = re.findall(NAME, rest)
    assert abs(Fraction(row["response"]) - exact(Fraction(asked[1]), asked[2], new)) <= Fraction(1, 20000)
    assert re.fullmatch(r"-?(0|[1-9]\d*)(\.\d{0,3}[1-9])?", row["response"])


ORACLES = {"units": units}
