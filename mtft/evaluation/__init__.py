"""Scores of models on held-out rows, with intervals, and comparisons of them.

Letters in names (`nll_BT` is [B, T]): B rows of a batch, T positions, N examples (of a batch: supervised tokens),
D bootstrap draws. `evaluate` is imported on first use (PEP 562).
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
