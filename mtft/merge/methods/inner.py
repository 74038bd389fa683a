"""Methods that another method may build on (`of`)."""

from __future__ import annotations

from ..errors import MergeError
from .base import CoreMethod
from .iso import IsoC, IsoCts
from .linear import Linear
from .tsv import Tsv
from .wudi import Wudi

INNER: dict[str, type[CoreMethod]] = {"linear": Linear, "tsv": Tsv, "iso_c": IsoC, "iso_cts": IsoCts, "wudi": Wudi}


def core_method(name: str) -> CoreMethod:
    """The method `name` with its defaults; MergeError if it can't be built on."""
    if name not in INNER:
        raise MergeError(f"of is {name!r}", where="options.of", do=f"one of {', '.join(INNER)}")
    return INNER[name]()
