"""Which share of which task: designs, surrogates, proposals and the plan that plays a mixture exactly.

Needs numpy and scipy only; scikit-learn, lightgbm and ray are imported inside the functions that use them.
"""

from data_mixers.common.errors import MixError
from data_mixers.design.designs import batch_compositions, regmix_dirichlet, space_filling
from data_mixers.mixture.bounds import Bounds, Group, Infeasible
from data_mixers.mixture.mixture import Mixture, natural, tempered, uniform
from data_mixers.plan.mixture_plan import MixturePlan
from data_mixers.plan.schedule import MixtureSchedule
from data_mixers.sweep.ledger import Trial, TrialLedger
from data_mixers.sweep.runner import make_trials, run_sweep

# The models are in data_mixers.fitting.surrogate_fits, data_mixers.propose.proposal, ...: they import scipy's
# optimisers, which takes a moment.
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
    "make_trials",
    "natural",
    "regmix_dirichlet",
    "run_sweep",
    "space_filling",
    "tempered",
    "uniform",
]
