"""Which share of which task: designs, surrogates, proposals and the plan that plays a mixture exactly.

Needs numpy and scipy only; scikit-learn, lightgbm and ray are imported inside the functions that use them.
"""

from .bounds import Bounds, Group, Infeasible
from .design import batch_compositions, regmix_dirichlet, space_filling
from .errors import MixError
from .ledger import Trial, TrialLedger
from .mixture import Mixture, natural, tempered, uniform
from .plan import MixturePlan
from .schedule import MixtureSchedule
from .sweep import make_trials, run_sweep

# The models are in data_mixers.fit, data_mixers.propose, ...: they import scipy's optimisers, which takes a moment.
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
