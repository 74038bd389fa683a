"""Surrogates fitted to trials: cross-validated, calibrated, carried to other scales."""

from typing import TYPE_CHECKING

from data_mixers.common.lazy_names import lazy_names

if TYPE_CHECKING:
    from data_mixers.fitting.surrogate_fits import fit_surrogates

__all__ = ["fit_surrogates"]

__getattr__, __dir__ = lazy_names(
    __name__,
    {
        "fit_surrogates": "data_mixers.fitting.surrogate_fits",
    },
)
