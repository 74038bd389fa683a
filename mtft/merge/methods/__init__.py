"""All merge methods by name."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

from data_mixers.common.suggest import closest_match
from mtft.common.errors import MergeError
from mtft.experimental.core_elementwise import CoreDare, CoreTies
from mtft.merge.methods.base import MergeMethod
from mtft.merge.methods.breadcrumbs import Breadcrumbs
from mtft.merge.methods.consensus import Consensus
from mtft.merge.methods.ctm import Ctm
from mtft.merge.methods.dare import Dare
from mtft.merge.methods.della import Della
from mtft.merge.methods.delta_norm import DeltaNorm
from mtft.merge.methods.doge import Doge
from mtft.merge.methods.iso import IsoC, IsoCts
from mtft.merge.methods.knots import KnotsDare, KnotsTies
from mtft.merge.methods.linear import Cat, LinearMerge, Svd
from mtft.merge.methods.lines import Lines
from mtft.merge.methods.pcb import Pcb
from mtft.merge.methods.regmean import RegMean
from mtft.merge.methods.robustmerge import RobustMerge
from mtft.merge.methods.sce import Sce
from mtft.merge.methods.svc import Svc
from mtft.merge.methods.ties import Ties
from mtft.merge.methods.tsv import Tsv
from mtft.merge.methods.wudi import Wudi

METHODS: dict[str, type[MergeMethod]] = {
    "linear": LinearMerge,
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


def make_method(name: str, options: Mapping[str, object] | None = None, *, key: str = "") -> MergeMethod:
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
    close = closest_match(name, known)
    return (f"did you mean {close!r}? " if close else "") + "known: " + ", ".join(known)
