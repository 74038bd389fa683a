"""Methods that another method may build on (`of`)."""

from __future__ import annotations

from typing import Literal

from mtft.merge.methods.base import CoreSpaceMethod
from mtft.merge.methods.iso import IsoC, IsoCts
from mtft.merge.methods.linear import LinearMerge
from mtft.merge.methods.tsv import Tsv
from mtft.merge.methods.wudi import Wudi

InnerName = Literal["linear", "tsv", "iso_c", "iso_cts", "wudi"]
INNER: dict[InnerName, type[CoreSpaceMethod]] = {
    "linear": LinearMerge,
    "tsv": Tsv,
    "iso_c": IsoC,
    "iso_cts": IsoCts,
    "wudi": Wudi,
}


def core_method(name: InnerName) -> CoreSpaceMethod:
    """The method `name` with its defaults."""
    return INNER[name]()
