"""All merge methods by name."""

from __future__ import annotations

import dataclasses
import difflib
import math
from collections.abc import Mapping
from typing import Any

from ..errors import MergeError
from .base import Method
from .breadcrumbs import Breadcrumbs
from .consensus import Consensus
from .core_elementwise import CoreDare, CoreTies
from .ctm import Ctm
from .dare import Dare
from .della import Della
from .delta_norm import DeltaNorm
from .doge import Doge
from .iso import IsoC, IsoCts
from .knots import KnotsDare, KnotsTies
from .linear import Cat, Linear, Svd
from .lines import Lines
from .pcb import Pcb
from .regmean import RegMean
from .robustmerge import RobustMerge
from .sce import Sce
from .svc import Svc
from .ties import Ties
from .tsv import Tsv
from .wudi import Wudi

METHODS: dict[str, type[Method]] = {
    "linear": Linear,
    "cat": Cat,
    "svd": Svd,
    "tsv": Tsv,
    "iso_c": IsoC,
    "iso_cts": IsoCts,
    "knots_ties": KnotsTies,
    "knots_dare": KnotsDare,
    "core_ties": CoreTies,
    "core_dare": CoreDare,
    "wudi": Wudi,
    "svc": Svc,
    "ctm": Ctm,
    "lines": Lines,
    "delta_norm": DeltaNorm,
    "regmean": RegMean,
    "ties": Ties,
    "dare": Dare,
    "della": Della,
    "breadcrumbs": Breadcrumbs,
    "sce": Sce,
    "pcb": Pcb,
    "consensus": Consensus,
    "doge": Doge,
    "robustmerge": RobustMerge,
}


def make_method(name: str, options: Mapping[str, object] | None = None, *, key: str = "") -> Method:
    """The method `name` with its options checked; MergeError names what is unknown and what was probably meant.

    `key`: where both stand in a recipe ("merge."), for that message.
    """
    if name not in METHODS:
        raise MergeError(f"unknown merge method {name!r}", where=f"{key}method", do=_suggest(name, list(METHODS)))
    kind = METHODS[name]
    fields = {f.name: f for f in dataclasses.fields(kind) if f.init}  # type: ignore[arg-type]
    typed = {}
    for option, value in (options or {}).items():
        where = f"{key}options.{option} of method {name}"
        if option not in fields:
            do = _suggest(option, list(fields)) if fields else f"{name} has no options"
            raise MergeError(f"{name} has no option {option!r}", where=where, do=do)
        typed[option] = _typed(fields[option], value, where)
    return kind(**typed)


def _typed(field: dataclasses.Field, value: Any, where: str) -> object:
    """The value as its option's type: 2.0 is a whole number, 1 a float."""
    default = field.default
    number = isinstance(value, int | float) and not isinstance(value, bool)
    if default is None:
        good = value is None or (number and math.isfinite(value))
    elif isinstance(default, bool):
        good = isinstance(value, bool)
    elif isinstance(default, int):
        good = number and math.isfinite(value) and value == int(value)
    elif isinstance(default, float):
        good = number and math.isfinite(value)
    elif isinstance(default, str):
        good = isinstance(value, str)
    else:
        good = True
    if not good:
        raise MergeError(
            f"{value!r} does not fit", where=where, do=f"give a {type(default).__name__}, as in the default {default!r}"
        )
    if default is None or isinstance(default, bool | str):
        return value
    return type(default)(value)  # type: ignore[arg-type]


def _suggest(name: str, known: list[str]) -> str:
    close = difflib.get_close_matches(str(name), known, n=1)
    return (f"did you mean {close[0]!r}? " if close else "") + "known: " + ", ".join(known)
