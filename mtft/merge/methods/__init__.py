"""All merge methods by name."""

from __future__ import annotations

from collections.abc import Mapping

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
from mtft.recipe.method_options import check_option_names, find_method, options_of

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


def method_name(method: MergeMethod) -> str:
    """What merge.json calls a method."""
    names = {of_name: name for name, of_name in METHODS.items()}
    return method.label or names.get(type(method), type(method).__name__)


def make_method(name: str, options: Mapping[str, object] | None = None, *, key: str = "") -> MergeMethod:
    """The method `name` with its options checked; MergeError names what is unknown and what was probably meant.

    `key`: where both stand in a recipe ("merge."), for that message.
    """
    kind = find_method(METHODS, name, "merge method", f"{key}method", error=MergeError, hint_below=True)
    options = dict(options or {})
    check_option_names(name, options_of(kind), options, f"{key}options", error=MergeError)
    return kind(where=f"{key}options", **options)
