"""Models of score by mixture. One method a file; the explicit table of names is here."""

from __future__ import annotations

import difflib

from ..errors import MixError
from .base import PointSurrogate, Prediction, Surrogate
from .gp import GaussianProcess
from .laws import ExpLaw, PowerLaw
from .lightgbm import LightGBM, RegMix
from .linear import Linear
from .mlp import MLP
from .ridge import Ridge
from .stack import CandidateScore, Stack

SURROGATES: dict[str, type[PointSurrogate]] = {
    "linear": Linear,
    "ridge": Ridge,
    "lightgbm": LightGBM,
    "regmix": RegMix,
    "mlp": MLP,
    "exp": ExpLaw,
    "power": PowerLaw,
    "gp": GaussianProcess,
    "stack": Stack,
}


def candidates_of(surrogate: str, *, goal: str, n: int) -> dict[str, PointSurrogate]:
    """Unfitted candidates of a choice: "auto" and "stack" are the stack of all, "gp" the GPs over all transforms (the
    weights of the stack choose), any other name itself."""
    processes: dict[str, PointSurrogate] = {
        f"gp {transform}": GaussianProcess(transform=transform, noise=None)
        for transform in ("quarter", "root", "log1", "quarter+root", "log1+root")
    }
    if surrogate in ("auto", "stack"):
        return {
            "ridge": Ridge(),
            "exp": ExpLaw(goal=goal),
            "power": PowerLaw(goal=goal),
            "trees": LightGBM(trees=300, learning_rate=0.03),  # a third of RegMix's cost, the same curve
            **processes,
        }
    if surrogate == "gp":
        return processes
    if surrogate not in SURROGATES:
        near = difflib.get_close_matches(surrogate, SURROGATES, n=1)
        raise MixError(
            f"unknown surrogate {surrogate!r}" + (f" (did you mean {near[0]!r}?)" if near else ""),
            where="surrogate",
            do=f"one of: auto, {', '.join(SURROGATES)}",
        )
    kind = SURROGATES[surrogate]
    return {surrogate: kind(goal=goal) if issubclass(kind, ExpLaw | PowerLaw) else kind()}


__all__ = [
    "MLP",
    "SURROGATES",
    "CandidateScore",
    "ExpLaw",
    "GaussianProcess",
    "LightGBM",
    "Linear",
    "PointSurrogate",
    "PowerLaw",
    "Prediction",
    "RegMix",
    "Ridge",
    "Stack",
    "Surrogate",
    "candidates_of",
]
