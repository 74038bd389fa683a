"""Evaluation: held-out scores of each task, with intervals: loss, token accuracy, exact match.

Letters in names (`nll_N` is [N]): N examples, B rows of a batch, T positions.
`evaluate` is imported on first use (PEP 562).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mtft.evaluation.evaluate_recipe import evaluate

__all__ = ["evaluate"]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from mtft.evaluation.evaluate_recipe import evaluate

    return evaluate
