"""What a mixture may be: floors, caps, groups and epoch caps; the nearest allowed mixture; why there is none.

    l_k <= p_k <= u_k = min(cap_k, max_epochs_k N_k / total),   low_g <= sum of p over group g <= high_g,   sum p = 1

Epoch caps (p_k <= k N_k / R) as in Olmix (arXiv 2602.12237). Projection in KL or L2:
    KL: p_k = clip(q_k e^m, l_k, u_k)     L2: p_k = clip(q_k - m, l_k, u_k)     m by bisection until the sum is 1.
A group whose sum leaves [low, high] gets its own m for the sum low or high (KKT), so disjoint groups stay exact.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Literal

import numpy as np
from numpy.typing import ArrayLike

from data_mixers.common.errors import MixError
from data_mixers.mixture.mixture import Floats, Mixture, check_known, check_names, limit_array, size_array
from data_mixers.mixture.projection import interior_point, project, smallest_violation

TOLERANCE = 1e-9
Metric = Literal["kl", "l2"]


class Infeasible(MixError):
    """No mixture satisfies the bounds; `what` names the constraints that clash."""


@dataclass(frozen=True)
class Group:
    """Tasks whose shares together lie in [low, high]."""

    name: str
    members: tuple[str, ...]
    low: float = 0.0
    high: float = 1.0


@dataclass(frozen=True)
class Bounds:
    """Limits of a mixture, by task name. `sizes` and `total` (same unit) turn `max_epochs` into caps.

    `names` fixes the order of the K tasks; without it they come from `sizes`, or from the mixture that is projected.
    """

    floors: Mapping[str, float] = field(default_factory=dict)
    caps: Mapping[str, float] = field(default_factory=dict)
    groups: tuple[Group, ...] = ()
    max_epochs: Mapping[str, float] | float = field(default_factory=dict)
    sizes: Mapping[str, float] | None = None
    total: float | None = None
    names: tuple[str, ...] | None = None

    def __post_init__(self) -> None:
        if self.names is None and self.sizes is not None:
            object.__setattr__(self, "names", tuple(self.sizes))
        if self.max_epochs != {} and (self.sizes is None or self.total is None):
            raise MixError(
                "max_epochs needs sizes and total", do="give Bounds(sizes=..., total=run length in the same unit)"
            )
        if self.total is not None and not 0 < self.total < np.inf:
            raise MixError(f"the run's length is {self.total}", where="total", do="a number > 0")
        epochs = self.max_epochs.values() if isinstance(self.max_epochs, Mapping) else [self.max_epochs]
        if not all(limit > 0 for limit in epochs):
            raise MixError(f"max_epochs is {self.max_epochs}", where="max_epochs", do="numbers > 0")
        for kind, limits in (("floor", self.floors), ("cap", self.caps)):
            for name, value in limits.items():
                if not 0 <= value <= 1:
                    raise MixError(f"the {kind} of {name} is {value}", do="shares lie between 0 and 1")
        for group in self.groups:
            if not 0 <= group.low <= group.high:
                raise MixError(f"group {group.name} has low {group.low} and high {group.high}", do="0 <= low <= high")
        for name, size in (self.sizes or {}).items():
            if size == 0 and self.floors.get(name, 0) > 0:
                raise MixError(
                    f"task {name} has no rows and a floor of {self.floors[name]}", do="drop the floor or the task"
                )
        if self.names is not None:
            used = [*self.floors, *self.caps, *(name for group in self.groups for name in group.members)]
            used += self.max_epochs if isinstance(self.max_epochs, Mapping) else []
            check_known(used, self.names, where="bounds")

    def over(self, names: tuple[str, ...]) -> Bounds:
        """These bounds for the tasks in the order of `names`."""
        if self.sizes is not None:
            check_names(tuple(self.sizes), names, where="bounds.sizes")
        return replace(self, names=tuple(names))

    def _named(self) -> tuple[str, ...]:
        if self.names is None:
            raise ValueError("these bounds do not know their tasks yet: use bounds.over(names)")
        return self.names

    def lower(self) -> Floats:
        """l [K]."""
        return np.array([float(self.floors.get(name, 0.0)) for name in self._named()])

    def upper(self) -> Floats:
        """u [K] = min(1, cap, epoch cap). A task of size 0 has u = 0."""
        return np.minimum(self._share_caps(), self._epoch_caps())

    def _share_caps(self) -> Floats:
        return np.array([float(self.caps.get(name, 1.0)) for name in self._named()])

    def _epoch_caps(self) -> Floats:
        names = self._named()
        if self.sizes is None:
            return np.ones(len(names))
        size_K = size_array(names, {name: self.sizes[name] for name in names})
        limit_K = np.ones(len(names))
        if self.max_epochs != {} and self.total is not None:
            with np.errstate(invalid="ignore"):
                limit_K = np.nan_to_num(
                    limit_array(self.max_epochs, names) * size_K / float(self.total), nan=0.0, posinf=1.0
                )
        return np.where(size_K > 0, np.minimum(limit_K, 1.0), 0.0)

    def violations(self, p: Mixture | ArrayLike) -> list[str]:
        """What p breaks by more than 1e-9, one sentence each; empty = allowed."""
        bounds, share_K = self._align(p)
        names, out = bounds._named(), []
        if abs(share_K.sum() - 1) > TOLERANCE:
            out.append(f"the shares add up to {share_K.sum():.9g}")
        for name, share, low, high in zip(names, share_K, bounds.lower(), bounds.upper(), strict=True):
            if share < low - TOLERANCE:
                out.append(f"{name} has {share:.6g}, its floor is {low:.6g}")
            if share > high + TOLERANCE:
                out.append(f"{name} has {share:.6g}, its cap is {high:.6g}")
        for group, member_K in zip(bounds.groups, bounds.member_masks(), strict=True):
            total = share_K[member_K].sum()
            if not group.low - TOLERANCE <= total <= group.high + TOLERANCE:
                out.append(f"group {group.name} has {total:.6g}, allowed are {group.low:.6g} to {group.high:.6g}")
        return out

    def member_masks(self) -> list[np.ndarray]:
        """One boolean [K] per group."""
        return [np.array([name in group.members for name in self._named()]) for group in self.groups]

    def _align(self, p: Mixture | ArrayLike) -> tuple[Bounds, Floats]:
        if isinstance(p, Mixture):
            bounds = self if self.names is not None else self.over(p.names)
            return bounds, np.array(p.over(bounds._named()).shares)
        return self, np.array(p, dtype=np.float64)

    def project(self, p: Mixture | ArrayLike, metric: Metric = "kl") -> Floats:
        """Nearest allowed mixture [K] (or row by row, [n, K]), feasible to 1e-9. Infeasible where there is none."""
        bounds, q = self._align(p)
        bounds.check_feasible()
        rows = project(np.atleast_2d(q), bounds.lower(), bounds.upper(), bounds._intervals(), metric)
        return rows if q.ndim == 2 else rows[0]

    def _intervals(self) -> list[tuple[np.ndarray, float, float]]:
        return [(mask, group.low, group.high) for mask, group in zip(self.member_masks(), self.groups, strict=True)]

    def check_feasible(self) -> None:
        """Raise Infeasible, naming the constraints that clash. Found feasible once, it is not solved again."""
        if self.__dict__.get("_feasible"):
            return
        self._check_box()
        if not self.groups:
            return
        names, low_K, high_K = self._named(), self.lower(), self.upper()
        floor_slack, cap_slack, group_slack = smallest_violation(low_K, high_K, self._intervals())
        total = float(floor_slack.sum() + cap_slack.sum() + group_slack.sum())
        if total <= TOLERANCE:
            object.__setattr__(self, "_feasible", True)
            return
        broken = [f"floor of {names[k]} ({low_K[k]:.4g})" for k in np.flatnonzero(floor_slack > TOLERANCE)]
        broken += [f"cap of {names[k]} ({high_K[k]:.4g})" for k in np.flatnonzero(cap_slack > TOLERANCE)]
        broken += [
            f"group {group.name} ({group.low:.4g} to {group.high:.4g} over {', '.join(group.members)})"
            for group, size in zip(self.groups, group_slack, strict=True)
            if size > TOLERANCE
        ]
        raise Infeasible(
            f"no mixture satisfies the bounds: they miss each other by {total:.4g} at {'; '.join(broken)}",
            where="bounds",
            do="loosen one of the named limits" + self._binding_epochs(),
        )

    def interior(self) -> Floats:
        """A mixture [K] as far from all limits as can be; raises Infeasible with the clashing constraints named."""
        self.check_feasible()
        return self.project_exact(interior_point(self.lower(), self.upper(), self._intervals()))

    def project_exact(self, p_K: Floats) -> Floats:
        """p moved by rounding errors only: clipped to the box and scaled over its free part to sum 1."""
        low_K, high_K = self.lower(), self.upper()
        p_K = np.clip(p_K, low_K, high_K)
        gap = 1.0 - p_K.sum()
        room_K = (high_K - p_K) if gap > 0 else (p_K - low_K)
        return p_K if room_K.sum() <= 0 else p_K + gap * room_K / room_K.sum()

    def _check_box(self) -> None:
        names, low_K, high_K = self._named(), self.lower(), self.upper()
        for name, low, high in zip(names, low_K, high_K, strict=True):
            if low > high + TOLERANCE:
                raise Infeasible(
                    f"the floor of {name} ({low:.4g}) is above its cap ({high:.4g})",
                    where="bounds",
                    do="lower the floor or raise the cap" + self._binding_epochs(),
                )
        if low_K.sum() > 1 + TOLERANCE:
            listed = ", ".join(f"{name} {low:.4g}" for name, low in zip(names, low_K, strict=True) if low > 0)
            raise Infeasible(f"floors add up to {low_K.sum():.4g} > 1 ({listed})", where="bounds", do="lower a floor")
        if high_K.sum() < 1 - TOLERANCE:
            listed = ", ".join(f"{name} {high:.4g}" for name, high in zip(names, high_K, strict=True))
            raise Infeasible(
                f"caps add up to {high_K.sum():.4g} < 1 ({listed})",
                where="bounds",
                do="raise a cap" + (self._binding_epochs() or ", or drop one"),
            )

    def _binding_epochs(self) -> str:
        binding_K = self._epoch_caps() < self._share_caps()
        names = [name for name, binds in zip(self._named(), binding_K, strict=True) if binds]
        return f", or lower the steps (epoch caps bind for {', '.join(names)})" if names else ""
