"""What a plan amounts to: asked and realized shares, over the run and over its parts."""

from __future__ import annotations

from typing import Any, Protocol

import numpy as np

from data_mixers.mixture.mixture import Mixture
from data_mixers.plan.quota import Ints
from data_mixers.plan.schedule import MixtureSchedule

SPANS = 5  # parts of a run in which asked and realized shares are compared


class CountedPlan(Protocol):
    """What is asked of a plan here: MixturePlan and ReplannedPlan have it."""

    names: tuple[str, ...]
    steps: int
    size_K: Ints

    @property
    def unit(self) -> str: ...
    @property
    def mixture(self) -> Mixture: ...
    @property
    def schedule(self) -> MixtureSchedule | None: ...
    def counts(self, s: int) -> Ints: ...
    def amounts(self, s: int) -> Ints: ...


def realized_table(plan: CountedPlan) -> list[dict[str, Any]]:
    """One dict per task: asked and realized share (in the plan's unit), rows, tokens (unit tokens only), size,
    epochs. The key `realised` is that of the files in which it is written."""
    asked, amount_K, rows_K = plan.mixture.shares, plan.amounts(plan.steps), plan.counts(plan.steps)
    return [
        {
            "task": name,
            "asked": float(asked[k]),
            "realised": float(amount_K[k] / amount_K.sum()),
            "unit": plan.unit,
            "rows": int(rows_K[k]),
            "tokens": int(amount_K[k]) if plan.unit == "tokens" else None,
            "size": int(plan.size_K[k]),
            "epochs": float(rows_K[k] / plan.size_K[k]) if plan.size_K[k] else 0.0,
        }
        for k, name in enumerate(plan.names)
    ]


def realized_spans(plan: CountedPlan) -> list[dict[str, Any]]:
    """Asked and realized shares (in the plan's unit) in SPANS equal parts of a run with a schedule; [] without one."""
    if plan.schedule is None:
        return []
    border = np.unique(np.rint(np.linspace(0, plan.steps, SPANS + 1)).astype(int))
    share_SK = plan.schedule.shares(plan.steps)
    spans = []
    for first, last in zip(border[:-1].tolist(), border[1:].tolist()):
        amount_K = plan.amounts(last) - plan.amounts(first)
        asked = dict(zip(plan.names, share_SK[first:last].mean(axis=0).tolist()))
        realized = dict(zip(plan.names, (amount_K / amount_K.sum()).tolist()))
        spans.append({"steps": [first, last], "asked": asked, "realised": realized})
    return spans
