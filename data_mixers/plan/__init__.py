"""The exact order of a run's rows: counts of every step, orders of every epoch, schedules, changes on the way."""

from typing import TYPE_CHECKING

from data_mixers.common.lazy_names import lazy_names

if TYPE_CHECKING:
    from data_mixers.plan.mixture_plan import MixturePlan
    from data_mixers.plan.schedule import MixtureSchedule

__all__ = ["MixturePlan", "MixtureSchedule"]

__getattr__, __dir__ = lazy_names(
    __name__,
    {
        "MixturePlan": "data_mixers.plan.mixture_plan",
        "MixtureSchedule": "data_mixers.plan.schedule",
    },
)
