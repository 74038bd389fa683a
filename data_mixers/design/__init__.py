"""Which mixtures to try, and which tasks matter for a target."""

from typing import TYPE_CHECKING

from data_mixers.common.lazy_names import lazy_names

if TYPE_CHECKING:
    from data_mixers.design.designs import batch_compositions, regmix_dirichlet, space_filling

__all__ = ["batch_compositions", "regmix_dirichlet", "space_filling"]

__getattr__, __dir__ = lazy_names(
    __name__,
    {
        "space_filling": "data_mixers.design.designs",
        "regmix_dirichlet": "data_mixers.design.designs",
        "batch_compositions": "data_mixers.design.designs",
    },
)
