"""One direction out of K task gradients: one method a file, one dict of names, one way to make them from a recipe.

All of them are written here on numpy and scipy, exactly where the original approximates (MGDA, Nash-MTL), so gradient
surgery needs no extra package; TorchJD is what the tests compare with.
"""

from __future__ import annotations

from collections.abc import Mapping

from data_mixers.common.suggest import did_you_mean
from mtft.common.errors import UserError
from mtft.gradients.aggregators.aligned_mtl import AlignedMtl
from mtft.gradients.aggregators.base import Aggregator
from mtft.gradients.aggregators.cagrad import CAGrad
from mtft.gradients.aggregators.dualproj import DualProj
from mtft.gradients.aggregators.imtl_g import ImtlG
from mtft.gradients.aggregators.mgda import Mgda
from mtft.gradients.aggregators.nash_mtl import NashMtl
from mtft.gradients.aggregators.pcgrad import PCGrad
from mtft.gradients.aggregators.sam_gs import SamGs
from mtft.gradients.aggregators.upgrad import UPGrad
from mtft.recipe.method_options import options_of

AGGREGATORS: dict[str, type[Aggregator]] = {
    kind.NAME: kind for kind in (UPGrad, DualProj, Mgda, PCGrad, CAGrad, ImtlG, NashMtl, AlignedMtl, SamGs)
}

# Asked for, and not possible here: name -> why, what instead.
REFUSED = {
    "rep_mtl": (
        "Rep-MTL compares the saliencies of all tasks at one and the same input, and an instruction example has one "
        "task: there is nothing to compare",
        "take `upgrad`, or loss.gradients.flat",
    )
}


def make_aggregator(
    name: str, options: Mapping[str, object] | None = None, *, seed: int = 0, where: str = "loss.gradients"
) -> Aggregator:
    """The aggregator of a recipe (`where` = the key it stands under). UserError for an unknown name or option."""
    if name in REFUSED:
        why, instead = REFUSED[name]
        raise UserError(why, where=f"{where}.aggregator", do=instead)
    if name not in AGGREGATORS:
        raise UserError(
            f"unknown aggregator {name!r}{did_you_mean(name, AGGREGATORS)}",
            where=f"{where}.aggregator",
            do=f"one of {', '.join(AGGREGATORS)}",
        )
    kind, options = AGGREGATORS[name], dict(options or {})
    for option in options:
        if option not in options_of(kind):
            known = ", ".join(options_of(kind)) or "none"
            raise UserError(
                f"aggregator {name} has no option {option!r}{did_you_mean(option, options_of(kind))}",
                where=f"{where}.options.{option}",
                do=f"its options: {known}",
            )
    return kind(seed=seed, where=f"{where}.options", **options)


__all__ = ["AGGREGATORS", "Aggregator", "make_aggregator"]
