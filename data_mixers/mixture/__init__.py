"""A mixture, the bounds it must keep, and the nearest mixture inside them."""

from typing import TYPE_CHECKING

from data_mixers.common.lazy_names import lazy_names

if TYPE_CHECKING:
    from data_mixers.mixture.bounds import Bounds, Group, Infeasible
    from data_mixers.mixture.mixture import Mixture, natural, tempered, uniform

__all__ = ["Bounds", "Group", "Infeasible", "Mixture", "natural", "tempered", "uniform"]

__getattr__, __dir__ = lazy_names(
    __name__,
    {
        "Mixture": "data_mixers.mixture.mixture",
        "Bounds": "data_mixers.mixture.bounds",
        "Group": "data_mixers.mixture.bounds",
        "Infeasible": "data_mixers.mixture.bounds",
        "natural": "data_mixers.mixture.mixture",
        "tempered": "data_mixers.mixture.mixture",
        "uniform": "data_mixers.mixture.mixture",
    },
)
