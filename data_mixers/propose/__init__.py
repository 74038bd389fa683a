"""The best allowed mixture by the fitted surrogates, and whether it is better than the current one."""

from typing import TYPE_CHECKING

from data_mixers.common.lazy_names import lazy_names

if TYPE_CHECKING:
    from data_mixers.propose.proposal import propose_mixture

__all__ = ["propose_mixture"]

__getattr__, __dir__ = lazy_names(
    __name__,
    {
        "propose_mixture": "data_mixers.propose.proposal",
    },
)
