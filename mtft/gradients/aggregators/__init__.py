"""One direction out of K task gradients: one method a file, one dict of names, one way to make them from a recipe.

All of them are written here on numpy and scipy, exactly where the original approximates (MGDA, Nash-MTL), so gradient
surgery needs no extra package; TorchJD is what the tests compare with.
"""

from __future__ import annotations

from collections.abc import Mapping

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
from mtft.recipe.method_options import check_option_names, find_method, options_of

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
    kind, options = find_method(AGGREGATORS, name, "aggregator", f"{where}.aggregator"), dict(options or {})
    check_option_names(f"aggregator {name}", options_of(kind), options, f"{where}.options")
    return kind(seed=seed, where=f"{where}.options", **options)


__all__ = ["AGGREGATORS", "Aggregator", "make_aggregator"]
