"""How tasks get on with each other, from Gram matrices measured now and then while they train together.

    cosine    C_ij = G_ij / sqrt(G_ii G_jj)                    of the mean G
    conflict  share of the measures with G_ij < 0
    transfer  Z_ij = 1 - L_j(theta - eta g_i) / L_j  ~  eta G_ij / L_j     what a step on task i alone does to task j

Transfer is TAG's inter-task affinity (Fifty et al., "Efficiently Identifying Task Groupings", 2109.04617) to first
order: no look-ahead step is taken. eta is the learning rate, so it speaks of a plain gradient step; Adam's differs.
All means run over the measures in which both tasks were there: plain ones over the first 1 / (1 - keep), then old ones
fade. Pairs never seen together are NaN.

Clusters: average linkage on 1 - C. Tasks of one cluster pull together; those of different ones may do better apart.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from mtft.common.errors import UserError
from mtft.common.own_files import defect, read_own, write_own

FILE = "affinity.json"
FEWEST = 5  # measures, below which clusters would be noise
_STATE = ("gram_KK", "transfer_KK", "conflicts_KK", "together_KK", "measures", "step")


class Clusters(NamedTuple):
    """groups   lists of task indices, by first task;  heights  of the K - 1 joins, ascending (1 - mean cosine)
    silhouette  -1..1: how much closer tasks are to their own group than to the next one; NaN for 1 or K groups
    guessed     pairs that were never seen together, whose distance was taken as 1
    """

    groups: list[list[int]]
    heights: list[float]
    silhouette: float
    guessed: list[tuple[int, int]]


class Affinity:
    """`update` at every measurement; `keep`: share of the old mean that stays at each.

    split: the measures are of halves (mtft.gradients.capture.split_halves), so noise does not pull their cosines
    towards 0.
    """

    def __init__(self, tasks: Sequence[str], keep: float = 0.9, *, split: bool = False) -> None:
        if not 0 <= keep < 1:
            raise ValueError(f"keep must be in [0, 1), got {keep}")
        self.tasks, self.keep, self.split = tuple(tasks), keep, split
        K = len(self.tasks)
        self.gram_KK = torch.full((K, K), torch.nan, dtype=torch.float64)
        self.transfer_KK = torch.full((K, K), torch.nan, dtype=torch.float64)
        self.conflicts_KK = torch.zeros(K, K, dtype=torch.int64)
        self.together_KK = torch.zeros(K, K, dtype=torch.int64)  # measures in which both tasks were there
        self.measures = torch.zeros((), dtype=torch.int64)
        self.step = torch.zeros((), dtype=torch.int64)

    def update(self, step: int, gram_KK: Tensor, loss_K: Tensor, learning_rate: float) -> None:
        """Takes in one measurement.

        gram_KK  [K, K] of the gradients of the tasks' mean losses, NaN rows = absent;  loss_K  those losses
        """
        G = gram_KK.detach().double().cpu()
        L = loss_K.detach().double().cpu()
        measured = G.isfinite() & (L.isfinite()[:, None] & L.isfinite()[None, :])
        self.measures, self.step = self.measures + 1, torch.tensor(step)
        self.together_KK = self.together_KK + measured
        self.conflicts_KK = self.conflicts_KK + (measured & (G < 0) & ~torch.eye(len(self.tasks), dtype=torch.bool))
        self.gram_KK = self._mean(self.gram_KK, G, measured)
        moved = measured & (L[None, :] > 0)  # a loss of 0 has no relative change
        self.transfer_KK = self._mean(self.transfer_KK, learning_rate * G / L[None, :], moved)

    def _mean(self, old: Tensor, new: Tensor, measured: Tensor) -> Tensor:
        """The mean after one more measure; together_KK has it counted already."""
        keep_KK = (1 - 1 / self.together_KK.clamp(min=1).double()).clamp(max=self.keep)
        moved = torch.where(old.isnan(), new, keep_KK * old + (1 - keep_KK) * new)
        return torch.where(measured, moved, old)

    def cosine(self) -> Tensor:
        """[K, K] in [-1, 1], 1 on the diagonal; NaN where unknown, or where a gradient was 0."""
        length_K = self.gram_KK.diagonal().clamp(min=0).sqrt()
        product = length_K[:, None] * length_K[None, :]
        cosine = torch.where(product > 0, self.gram_KK / product, torch.nan).clamp(-1, 1)
        return torch.where(torch.eye(len(self.tasks), dtype=torch.bool) & (product > 0), 1.0, cosine)

    def conflict_rate(self) -> Tensor:
        """[K, K] in [0, 1]; NaN where the two were never measured together."""
        return torch.where(self.together_KK > 0, self.conflicts_KK / self.together_KK.clamp(min=1), torch.nan).double()

    def transfer(self) -> Tensor:
        """[K, K]: row i, column j = relative fall of task j's loss by one step on task i; < 0: it rises."""
        return self.transfer_KK

    def clusters(self, k: int | None = None) -> Clusters:
        """Groups of tasks that pull together; `k` groups, or as many as the silhouette likes best.

        Raises UserError before the fifth measurement.
        """
        if int(self.measures) < FEWEST:
            raise UserError(
                f"the tasks' gradients were measured {int(self.measures)} times; groups need at least {FEWEST}",
                where="loss.gradients.every",
                do="measure more often, or train longer",
            )
        return clusters(self.cosine(), k)

    def state_dict(self) -> dict[str, Any]:
        return {"tasks": list(self.tasks), **{name: getattr(self, name).clone() for name in _STATE}}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from `state_dict()`. Refuses the state of other tasks."""
        if list(state["tasks"]) != list(self.tasks):
            raise UserError(
                f"the checkpoint is of tasks {', '.join(state['tasks'])}; the recipe has {', '.join(self.tasks)}",
                where="tasks",
                do="use the same tasks in the same order, or start over with --fresh",
            )
        for name in _STATE:
            setattr(self, name, state[name].clone())

    def to_json(self) -> dict[str, Any]:
        """What affinity.json holds: matrices as lists of rows with null for NaN, and the groups if there are enough
        measurements. Row i, column j of `transfer` is what task i does to task j."""
        out: dict[str, Any] = {
            "tasks": list(self.tasks),
            "step": int(self.step),
            "measures": int(self.measures),
            "split": self.split,
            "cosine": _rows(self.cosine()),
            "conflict_rate": _rows(self.conflict_rate()),
            "transfer": _rows(self.transfer()),
            "gradient_norm": _rows(self.gram_KK.diagonal().clamp(min=0).sqrt()[None])[0],
            "measured_together": self.together_KK.tolist(),
        }
        if int(self.measures) >= FEWEST and len(self.tasks) > 1:
            clustering = self.clusters()
            out["clusters"] = {
                "groups": {
                    f"group-{g + 1}": [self.tasks[k] for k in group] for g, group in enumerate(clustering.groups)
                },
                "heights": clustering.heights,
                "silhouette": None if math.isnan(clustering.silhouette) else clustering.silhouette,
                "guessed": [[self.tasks[i], self.tasks[j]] for i, j in clustering.guessed],
            }
        return out

    def save(self, run_dir: Path) -> Path:
        """Writes <run_dir>/affinity.json, whole or not at all."""
        path = run_dir / FILE
        write_own(path, self.to_json())
        return path


def clusters(cosine: Tensor, k: int | None = None) -> Clusters:
    """Average linkage on 1 - C (a NaN counts as C = 0). `k` groups; None: 2..K - 1 by the mean silhouette, or one group
    where no split has a silhouette above 0.25 (Kaufman & Rousseeuw's "no substantial structure")."""
    from scipy.cluster.hierarchy import fcluster, linkage
    from scipy.spatial.distance import squareform

    C = cosine.double().numpy()
    K = len(C)
    if k is not None and not 1 <= k <= K:
        raise ValueError(f"{K} tasks can't make {k} groups")
    guessed = [(i, j) for i in range(K) for j in range(i + 1, K) if not np.isfinite(C[i, j])]
    apart = 1 - np.nan_to_num(C, nan=0.0)
    np.fill_diagonal(apart, 0.0)
    if K == 1:
        return Clusters([[0]], [], math.nan, guessed)
    tree = linkage(squareform((apart + apart.T) / 2, checks=False), method="average")
    cuts = {n: fcluster(tree, n, criterion="maxclust") for n in ([k] if k is not None else range(2, K))}
    scores = {n: silhouette(apart, labels) for n, labels in cuts.items()}
    best = k if k is not None else max(scores, key=lambda n: scores[n], default=1)
    if k is None and scores.get(best, 0.0) <= 0.25:
        best = 1
    labels = cuts.get(best, np.ones(K, dtype=int))
    order = dict.fromkeys(labels.tolist())
    groups = [[i for i in range(K) if labels[i] == label] for label in order]
    return Clusters(groups, [float(height) for height in tree[:, 2]], scores.get(best, math.nan), guessed)


def silhouette(apart: np.ndarray, labels: np.ndarray) -> float:
    """Mean over tasks of (b - a) / max(a, b): a = mean distance within its group, b = to the nearest other group.

    0 for a task alone (Rousseeuw 1987); NaN for one group.
    """
    names = np.unique(labels)
    if len(names) < 2:
        return math.nan
    scores = []
    for i, own in enumerate(labels):
        inside = (labels == own) & (np.arange(len(labels)) != i)
        if not inside.any():
            scores.append(0.0)
            continue
        a, b = apart[i, inside].mean(), min(apart[i, labels == other].mean() for other in names if other != own)
        scores.append((b - a) / max(a, b) if max(a, b) > 0 else 0.0)
    return float(np.mean(scores))


def read_groups(path: Path, tasks: Sequence[str]) -> dict[str, list[str]]:
    """{group: [task, ...]} out of a run's affinity.json, for `loss.balancer.groups`. Raises UserError."""
    where, do = str(path), "train with loss.gradients: {every: 20} first"
    data = read_own(path, {"tasks": list}, do=do)
    if "clusters" not in data:
        raise UserError(
            f"holds no groups: only {data.get('measures', 0)} measurements of at least {FEWEST}",
            where=where,
            do="measure more often (loss.gradients.every), or train longer",
        )
    if (problem := defect(data, {"clusters": dict, "clusters.groups": dict})) is None:
        bad = [name for name, group in data["clusters"]["groups"].items() if not isinstance(group, list)]
        problem = f"key clusters.groups.{bad[0]} is no list" if bad else None
    if problem is not None:
        raise UserError(f"damaged: {problem}", where=where, do=do)
    groups = {name: [task for task in group if task in tasks] for name, group in data["clusters"]["groups"].items()}
    if not any(groups.values()):
        named = ", ".join(map(str, data["tasks"]))
        raise UserError(f"is of other tasks: {named}", where=where, do=f"tasks here: {', '.join(tasks)}")
    return {name: group for name, group in groups.items() if group}


def _rows(matrix: Tensor) -> list[list[float | None]]:
    return [[value if math.isfinite(value) else None for value in row] for row in matrix.tolist()]
