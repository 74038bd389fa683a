"""Training: from a recipe, or from data sets in memory, to an exported adapter.

Letters in names of arrays: B rows, T positions, N supervised tokens or examples, V vocabulary, K tasks, H halves of
tasks, L tokens of an example, D width of the model, S steps.

The public names are imported when they are first used (PEP 562).
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mtft.training.run_training import train
    from mtft.training.trainer import MultiTaskTrainer

_MODULES = {"MultiTaskTrainer": "mtft.training.trainer", "train": "mtft.training.run_training"}
__all__ = ["MultiTaskTrainer", "train"]


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_MODULES[name]), name)
