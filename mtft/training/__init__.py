"""Training: from a recipe, or from data sets in memory, to an exported adapter.

Letters in names of arrays: B rows, T positions, N supervised tokens or examples, V vocabulary, K tasks, H halves of
tasks, L tokens of an example, D width of the model, S steps.

The public names are imported when they are first used (PEP 562).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from data_mixers.common.lazy_names import lazy_names

if TYPE_CHECKING:
    from mtft.training.run_training import train
    from mtft.training.trainer import MultiTaskTrainer

__all__ = ["MultiTaskTrainer", "train"]

__getattr__, __dir__ = lazy_names(
    __name__, {"MultiTaskTrainer": "mtft.training.trainer", "train": "mtft.training.run_training"}
)
