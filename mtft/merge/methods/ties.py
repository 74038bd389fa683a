"""TIES: trim each task to its largest entries, elect one sign per entry, merge the values that agree with it.

    T_k = topk(D_k);   s = sign of the sum;   the value is made from the T_k whose sign is s

Yadav et al., "TIES-Merging: Resolving Interference When Merging Models" (NeurIPS 2023, arXiv 2306.01708). Three
meanings are in use, equal only for weights 1:

    variant    sign from           value                                             sum = 0
    paper      sum w_k T_k         mean (or `value: sum`) of agreeing w_k T_k        sign of the sum of all signs
    mergekit   sum w_k T_k         sum of agreeing w_k T_k / sum of agreeing w_k     +
    peft       sum T_k             sum of agreeing w_k T_k / count of agreeing       +

Entries of equal size at the threshold are all kept; the peers keep an arbitrary part of them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Literal

import numpy as np

from mtft.merge.linalg.streamed_delta import Rule
from mtft.merge.methods.base import ModulePass, Scope, Share
from mtft.merge.methods.elementwise_base import (
    ElementwiseMethod,
    TaskDelta,
    global_thresholds,
    magnitude_thresholds,
    task_delta,
)

Variant = Literal["paper", "mergekit", "peft"]
Value = Literal["mean", "sum"]


@dataclass(frozen=True)
class Ties(ElementwiseMethod):
    """density: share of entries kept. variant, value: above. scope: trim per `module` (peers) or `global` (paper)."""

    density: Share = 0.2
    variant: Variant = "paper"
    value: Value = "mean"
    scope: Scope = "module"

    def survey(self, modules: ModulePass) -> tuple[dict[str, float], float] | None:
        """For `global`: every adapter's threshold over all of its modules, and the majority sign."""
        if self.scope == "module":
            return None
        thresholds = global_thresholds(modules, self.density)
        majority = 0.0
        for parts in modules():
            task = task_delta(parts)
            majority += sign_balance(task, keep_above([thresholds[name] for name in parts.names]), task.weights_K)
        return thresholds, majority

    def rule(self, task: TaskDelta, seen: tuple[dict[str, float], float] | None = None) -> Rule:
        if seen is None:
            cut = keep_above(magnitude_thresholds(task.stream, self.density, task.module))
            return elect_signs(task, cut, self.variant, self.value)
        thresholds, majority = seen
        cut = keep_above([thresholds[name] for name in task.names])
        return elect_signs(task, cut, self.variant, self.value, majority)


Cut = Callable[[int, list[np.ndarray]], list[np.ndarray]]
"""(first row, blocks of D_k) -> blocks of T_k."""


def keep_above(thresholds: list[float]) -> Cut:
    """Keep |x| >= threshold."""
    return lambda start, blocks: [x * (np.abs(x) >= t) for x, t in zip(blocks, thresholds)]


def sign_balance(task: TaskDelta, cut: Cut, weights_K: np.ndarray) -> float:
    """Sum of the elected signs over all entries: which sign is the more common one."""
    total = 0.0
    for start, blocks in task.stream:
        weighted = [x.dtype.type(w) * x for w, x in zip(weights_K, cut(start, blocks))]
        total += float(np.sign(np.sum(weighted, axis=0)).sum(dtype=np.float64))
    return total


def elect_signs(task: TaskDelta, cut: Cut, variant: str, value: str, majority: float | None = None) -> Rule:
    """The election among the blocks that `cut` leaves. majority: the sign that breaks ties in variant `paper`
    (None: of this module, at the price of a pass when the first tie is met)."""
    weights_K = task.weights_K.astype(task.stream.dtype)
    by_own = variant == "peft"
    tie_sign = cache(lambda: sign_balance(task, cut, task.weights_K) if majority is None else majority)

    def rule(start: int, blocks: list[np.ndarray]) -> np.ndarray:
        trimmed = cut(start, blocks)
        voting = trimmed if by_own else [w * x for w, x in zip(weights_K, trimmed)]
        total = voting[0].copy()
        for x in voting[1:]:
            total += x
        sign = np.sign(total)
        zero = total == 0
        if variant != "paper":
            sign[zero] = 1
        elif any(np.logical_and(zero, x).any() for x in trimmed):  # exact cancellation: rare, costs a pass
            sign[zero] = np.sign(tie_sign())
        result, share = np.zeros_like(total), np.zeros_like(total)
        for w, x in zip(weights_K, voting):
            along = x * sign
            agrees = along > 0
            np.maximum(along, 0, out=along)
            if by_own:
                along *= w
            result += along
            if variant == "mergekit":
                share += w * agrees
            else:
                share += agrees
        result *= sign
        if variant == "paper" and value == "sum":
            return result
        share[share == 0] = 1
        result /= share
        return result

    return rule
