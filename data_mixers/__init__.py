"""Which share of which task: designs, surrogates, proposals and the plan that plays a mixture exactly.

Needs numpy and scipy only; scikit-learn, lightgbm and ray are imported inside the functions that use them. The names
below are imported when they are first used.

Letters (suffixes of arrays name their axes): K tasks, p or `shares` [K] a mixture, S steps, G rows (or tokens) of a
step, N_k rows of task k, n trials, m candidate mixtures, J targets (scores), X [n, K] the trials' mixtures, y [n] a
score of theirs.
"""

from typing import TYPE_CHECKING

from data_mixers.common.lazy_names import lazy_names

if TYPE_CHECKING:
    from data_mixers.common.errors import MixError
    from data_mixers.design.designs import batch_compositions, regmix_dirichlet, space_filling
    from data_mixers.fitting.surrogate_fits import fit_surrogates
    from data_mixers.mixture.bounds import Bounds, Group, Infeasible
    from data_mixers.mixture.mixture import Mixture, natural, tempered, uniform
    from data_mixers.plan.mixture_plan import MixturePlan
    from data_mixers.plan.schedule import MixtureSchedule
    from data_mixers.propose.proposal import propose_mixture
    from data_mixers.sweep.ledger import TrialLedger
    from data_mixers.sweep.runner import make_trials, run_sweep
    from data_mixers.sweep.trial import Trial

__all__ = [
    "Bounds",
    "Group",
    "Infeasible",
    "MixError",
    "Mixture",
    "MixturePlan",
    "MixtureSchedule",
    "Trial",
    "TrialLedger",
    "batch_compositions",
    "fit_surrogates",
    "make_trials",
    "natural",
    "propose_mixture",
    "regmix_dirichlet",
    "run_sweep",
    "space_filling",
    "tempered",
    "uniform",
]

__getattr__, __dir__ = lazy_names(
    __name__,
    {
        "Bounds": "data_mixers.mixture.bounds",
        "Group": "data_mixers.mixture.bounds",
        "Infeasible": "data_mixers.mixture.bounds",
        "MixError": "data_mixers.common.errors",
        "Mixture": "data_mixers.mixture.mixture",
        "MixturePlan": "data_mixers.plan.mixture_plan",
        "MixtureSchedule": "data_mixers.plan.schedule",
        "Trial": "data_mixers.sweep.trial",
        "TrialLedger": "data_mixers.sweep.ledger",
        "batch_compositions": "data_mixers.design.designs",
        "fit_surrogates": "data_mixers.fitting.surrogate_fits",
        "make_trials": "data_mixers.sweep.runner",
        "natural": "data_mixers.mixture.mixture",
        "propose_mixture": "data_mixers.propose.proposal",
        "regmix_dirichlet": "data_mixers.design.designs",
        "run_sweep": "data_mixers.sweep.runner",
        "space_filling": "data_mixers.design.designs",
        "tempered": "data_mixers.mixture.mixture",
        "uniform": "data_mixers.mixture.mixture",
    },
)
