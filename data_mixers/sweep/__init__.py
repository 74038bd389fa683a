"""Trials: run in parallel, ended early where hopeless, written to a ledger that survives any kill."""

from typing import TYPE_CHECKING

from data_mixers.common.lazy_names import lazy_names

if TYPE_CHECKING:
    from data_mixers.sweep.ledger import TrialLedger
    from data_mixers.sweep.runner import make_trials, run_sweep
    from data_mixers.sweep.trial import Trial

__all__ = ["Trial", "TrialLedger", "make_trials", "run_sweep"]

__getattr__, __dir__ = lazy_names(
    __name__,
    {
        "run_sweep": "data_mixers.sweep.runner",
        "make_trials": "data_mixers.sweep.runner",
        "Trial": "data_mixers.sweep.trial",
        "TrialLedger": "data_mixers.sweep.ledger",
    },
)
