"""Which share of which task: designs, surrogates, proposals and the plan that plays a mixture exactly.

Needs numpy and scipy only; scikit-learn, lightgbm and ray are imported inside the functions that use them.
"""

from .bounds import Bounds, Group, Infeasible
from .errors import MixError
from .mixture import Mixture, natural, tempered, uniform
from .plan import MixturePlan

__all__ = ["Bounds", "Group", "Infeasible", "MixError", "Mixture", "MixturePlan", "natural", "tempered", "uniform"]
