"""The table of surrogates by name: a new one is a file here and a line below."""

from __future__ import annotations

from data_mixers.common.errors import MixError
from data_mixers.common.suggest import closest_match
from data_mixers.surrogates.base import PointSurrogate
from data_mixers.surrogates.gaussian_process import GaussianProcess
from data_mixers.surrogates.lightgbm import LightGBM, RegMix
from data_mixers.surrogates.linear import LinearSurrogate
from data_mixers.surrogates.mlp import MLP
from data_mixers.surrogates.parametric_laws import BiMix, ExpLaw, Law, PowerLaw, TransferLaw
from data_mixers.surrogates.ridge import Ridge
from data_mixers.surrogates.stack import Stack
from data_mixers.surrogates.warped_gp import WarpedGP
from data_mixers.sweep.trial import Goal

SURROGATES: dict[str, type[PointSurrogate]] = {
    "linear": LinearSurrogate,
    "ridge": Ridge,
    "lightgbm": LightGBM,
    "regmix": RegMix,
    "mlp": MLP,
    "exp": ExpLaw,
    "power": PowerLaw,
    "bimix": BiMix,
    "transfer": TransferLaw,
    "gp": GaussianProcess,
    "warped": WarpedGP,
    "stack": Stack,
}


def candidates_of(surrogate: str, *, goal: Goal) -> dict[str, PointSurrogate]:
    """Unfitted candidates of a choice: "auto" and "stack" are the stack of all families, "gp" and "warped" such
    processes over several transforms (the weights of the stack choose), any other name itself.

    The members of "auto" were chosen by cross-validation on training trials only (docs/mixing.md).
    """
    warped: dict[str, PointSurrogate] = {
        f"warped {transform}": WarpedGP(transform=transform, noise=None, goal=goal)
        for transform in ("root", "quarter+root", "log1+root")
    }
    if surrogate in ("auto", "stack"):
        return {
            "ridge": Ridge(),
            "transfer": TransferLaw(goal=goal),
            "trees": LightGBM(trees=300, learning_rate=0.03),  # a third of RegMix's cost, the same curve
            "gp tied": GaussianProcess(transform="quarter", noise=None, tied=0.1),
            "gp loose": GaussianProcess(transform="quarter", noise=None, tied=0.4),
            **warped,
        }
    if surrogate == "gp":
        free = ("quarter", "root", "log1", "quarter+root", "log1+root")
        return {
            **{f"gp {transform}": GaussianProcess(transform=transform, noise=None) for transform in free},
            "gp tied": GaussianProcess(transform="quarter", noise=None, tied=0.1),
        }
    if surrogate == "warped":
        return warped
    if surrogate not in SURROGATES:
        near = closest_match(surrogate, SURROGATES)
        raise MixError(
            f"unknown surrogate {surrogate!r}" + (f" (did you mean {near!r}?)" if near else ""),
            where="surrogate",
            do=f"one of: auto, {', '.join(SURROGATES)}",
        )
    kind = SURROGATES[surrogate]
    return {surrogate: kind(goal=goal) if issubclass(kind, Law | WarpedGP) else kind()}
