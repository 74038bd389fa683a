"""Balancing over groups of tasks: any balancer, seeing each group as one task.

    L_g = sum_{k in g} p_k L_k / sum_{k in g} p_k         over the tasks present, p = the user's weights
    w_k = b_g p_k / sum_{j in g} p_j                       b = the balancer's weights of the groups

So many small tasks of one kind no longer outvote a single one of another, and a balancer's statistics come from more
tokens. Groups are given by name, or found by a former run from the cosines of the tasks' gradients
(mtft/gradients/affinity.py); a task in none is one by itself.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from data_mixers.common.suggest import did_you_mean
from mtft.common.errors import UserError
from mtft.gradients import affinity
from mtft.losses.balancers.base import Balancer, BalancerContext, BalancerNeeds, Observation

PREFIX = "groups."


class TaskGroupBalancer(Balancer):
    """`inner` balances the groups; its Context names them, in the order of `members`."""

    def __init__(self, context: BalancerContext, inner: Balancer, members: Sequence[Sequence[int]]) -> None:
        self.inner = inner
        self.NAME = inner.NAME  # pyright: ignore[reportAttributeAccessIssue] - a checkpoint is checked against it
        self.members = [list(group) for group in members]
        super().__init__(context)
        share_GK = torch.zeros(len(self.members), self.K, dtype=torch.float64)
        for g, group in enumerate(self.members):
            total = self.user_K[group].sum()
            # A group whose tasks all have weight 0 is still watched, with equal parts; its tasks get no weight.
            share_GK[g, group] = self.user_K[group] / total if total > 0 else 1 / len(group)
        self.share_GK = share_GK

    def declare(self) -> BalancerNeeds:
        return self.inner.needs

    def balance(self, step: int, step_loss_K: Tensor | None) -> Tensor:
        b_G = self.inner.weights(step, None if step_loss_K is None else self._mean(step_loss_K))
        group_user_G = torch.stack([self.user_K[group].sum() for group in self.members])
        # `weights` multiplies by the user's weights: what is left is one number a group.
        per_task_G = torch.where(group_user_G > 0, b_G / group_user_G.clamp(min=1e-300), 0.0)
        return (self.share_GK > 0).double().T @ per_task_G

    def observe(self, observation: Observation) -> None:
        of_groups = {name: self._mean(x) for name, x in observation._asdict().items() if isinstance(x, Tensor)}
        if observation.share_K is not None:  # parts add up
            of_groups["share_K"] = (self.share_GK > 0).double() @ observation.share_K
        self.inner.update(observation._replace(**of_groups))

    def figures(self) -> dict[str, float]:
        return self.inner.figures()

    def state_dict(self) -> dict[str, Any]:
        inner = {PREFIX + name: value for name, value in self.inner.state_dict().items()}
        return super().state_dict() | inner

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        super().load_state_dict(state)
        inner = {name.removeprefix(PREFIX): value for name, value in state.items() if name.startswith(PREFIX)}
        if not inner:
            raise UserError(
                "the checkpoint was written without groups of tasks",
                where="loss.balancer.groups",
                do="take the groups out again, or start over with --fresh",
            )
        self.inner.load_state_dict(inner)

    def _mean(self, x: Tensor) -> Tensor:
        """Losses [K] -> [G], or a Gram matrix [K, K] -> [G, G] of the groups' mean gradients; NaN = group absent."""
        present_K = (x if x.dim() == 1 else x.diagonal()).isfinite()
        part_GK = self.share_GK * present_K
        part_GK = part_GK / part_GK.sum(dim=1, keepdim=True)  # 0/0 = NaN: nobody of the group is there
        known = torch.nan_to_num(x, nan=0.0)
        return part_GK @ known if x.dim() == 1 else part_GK @ known @ part_GK.T


def read_groups(groups: Any, tasks: Sequence[str]) -> dict[str, list[int]]:
    """{group: [task, ...]} of a recipe -> {group: indices} in task order; a task in no group is a group of its own.

    A text is the path of a run's affinity.json, or of the run directory.
    """
    where = "loss.balancer.groups"
    if isinstance(groups, str):
        path = Path(groups)
        groups = affinity.read_groups(path / affinity.FILE if path.is_dir() else path, tasks)
    if not isinstance(groups, Mapping) or not all(
        isinstance(group, list | tuple) and group for group in groups.values()
    ):
        raise UserError(
            "groups must name lists of tasks, or a run's affinity.json",
            where=where,
            do="groups: {code: [python, sql], text: [chat]}, or groups: runs/first/affinity.json",
        )
    home: dict[str, str] = {}
    for group, names in groups.items():
        for name in names:
            if name not in tasks:
                hint = did_you_mean(name, tuple(tasks))
                raise UserError(
                    f"unknown task {name!r}{hint}", where=f"{where}.{group}", do=f"tasks: {', '.join(tasks)}"
                )
            if name in home:
                raise UserError(f"task {name} is in groups {home[name]} and {group}", where=where, do="name it once")
            home[name] = group
    clash = [name for name in tasks if name not in home and name in groups]
    if clash:
        raise UserError(f"{clash[0]} is a group and a task outside of it", where=where, do="rename the group")
    out: dict[str, list[int]] = {}
    for k, name in enumerate(tasks):
        out.setdefault(home.get(name, name), []).append(k)
    return out
