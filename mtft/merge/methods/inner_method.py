"""Methods that another method may build on (`of`)."""

from __future__ import annotations

from mtft.common.errors import MergeError
from mtft.merge.methods.base import CoreSpaceMethod
from mtft.merge.methods.iso import IsoC, IsoCts
from mtft.merge.methods.linear import LinearMerge
from mtft.merge.methods.tsv import Tsv
from mtft.merge.methods.wudi import Wudi

INNER: dict[str, type[CoreSpaceMethod]] = {
    "linear": LinearMerge,
    "tsv": Tsv,
    "iso_c": IsoC,
    "iso_cts": IsoCts,
    "wudi": Wudi,
}


def core_method(name: str) -> CoreSpaceMethod:
    """The method `name` with its defaults; MergeError if it can't be built on."""
    if name not in INNER:
        raise MergeError(f"of is {name!r}", where="options.of", do=f"one of {', '.join(INNER)}")
    return INNER[name]()
