"""How the task weights move: one method a file, one dict of names, one way to make them from a recipe."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from mtft.losses.balancers.base import Balancer, BalancerContext, BalancerNeeds, Observation
from mtft.losses.balancers.coba import CoBa
from mtft.losses.balancers.dwa import DynamicWeightAverage
from mtft.losses.balancers.famo import Famo
from mtft.losses.balancers.focal import Focal
from mtft.losses.balancers.gradnorm import GradNorm
from mtft.losses.balancers.lagged_gradients import LaggedAggregation
from mtft.losses.balancers.scalarization import GeometricMean, SmoothTchebycheff
from mtft.losses.balancers.self_paced import SelfPaced
from mtft.losses.balancers.static import Fixed, Random, Temperature, Uniform
from mtft.losses.balancers.task_groups import TaskGroupBalancer, read_groups
from mtft.losses.balancers.uncertainty import ImpartialLoss, UncertaintyWeighting
from mtft.losses.balancers.visatb import VisAtb
from mtft.recipe.method_options import check_option_names, find_method, options_of
from mtft.recipe.schema.loss import BalancerSection

BALANCERS: dict[str, type[Balancer]] = {
    kind.NAME: kind
    for kind in (
        Uniform,
        Fixed,
        Random,
        Temperature,
        Focal,
        SelfPaced,
        CoBa,
        Famo,
        DynamicWeightAverage,
        UncertaintyWeighting,
        ImpartialLoss,
        GeometricMean,
        SmoothTchebycheff,
        GradNorm,
        LaggedAggregation,
        VisAtb,
    )
}


def make_balancer(
    section: BalancerSection,
    tasks: Sequence[str],
    user_weights: Sequence[float],
    seed: int = 0,
    *,
    normalise: str = "task_token",
    examples: Sequence[float] | None = None,
    tokens: Sequence[float] | None = None,
) -> Balancer:
    """The balancer that a recipe's `loss.balancer` describes; with `groups: {name: [task, ...]}` one over groups.

    `user_weights`: the weight of each task in the recipe, multiplied into every weight that comes out.
    `examples`, `tokens`: size of each task's training data in examples and supervised tokens, by their weights
    (temperature needs them).
    Raises UserError for an unknown name or option, or an option out of its range.
    """
    context = BalancerContext(
        tasks=tuple(tasks),
        user_K=torch.tensor(list(user_weights), dtype=torch.float64),
        seed=seed,
        normalise=normalise,
        examples_K=None if examples is None else torch.tensor(list(examples), dtype=torch.float64),
        tokens_K=None if tokens is None else torch.tensor(list(tokens), dtype=torch.float64),
    )
    options = dict(section.model_extra or {})
    groups = options.pop("groups", None)
    kind = balancer_class(section)
    if groups is None:
        return kind(context, **options)
    members = read_groups(groups, context.tasks)

    def total(size_K: torch.Tensor | None) -> torch.Tensor | None:
        return None if size_K is None else torch.stack([size_K[group].sum() for group in members.values()])

    of_groups = context._replace(
        tasks=tuple(members), user_K=None, examples_K=total(context.examples_K), tokens_K=total(context.tokens_K)
    )
    return TaskGroupBalancer(context, kind(of_groups, **options), list(members.values()))


def balancer_class(section: BalancerSection) -> type[Balancer]:
    """The class behind `loss.balancer`; the names of the section's options are checked (for `mtft check`)."""
    kind = find_method(BALANCERS, section.name, "balancer", "loss.balancer.name")
    known = (*options_of(kind), "groups")
    check_option_names(f"balancer {section.name}", known, section.model_extra or {}, "loss.balancer")
    return kind


__all__ = [
    "BALANCERS",
    "Balancer",
    "BalancerContext",
    "BalancerNeeds",
    "Observation",
    "balancer_class",
    "make_balancer",
]
