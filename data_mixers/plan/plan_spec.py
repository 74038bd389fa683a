"""The checked arguments of a plan, and the fresh order that every epoch of a task has.

Row v of a task with N rows (its v-th visit) is row pi(v mod N) of epoch v div N, with pi the permutation of that task
and epoch (permutation.py).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from data_mixers.mixture.mixture import Floats, Mixture, check_known, limit_array
from data_mixers.plan.permutation import half_bits, permute, round_keys, task_word
from data_mixers.plan.quota import Ints
from data_mixers.plan.schedule import MixtureSchedule

Rows = tuple[Ints, Ints, Ints]  # task, epoch, row: int64, one entry per slot


@dataclass(frozen=True, eq=False)
class PlanSpec:
    """What the orders of rows are made from.

    mixture: the shares (of a schedule: their mean). size_K: rows of each task. start_K: visits made before this plan.
    carry: what another plan still owes each task. max_visits_K: the visits that max_epochs allows (inf: no cap).
    """

    names: tuple[str, ...]
    mixture: Mixture
    schedule: MixtureSchedule | None
    steps: int
    batch: int
    seed: int
    style: Literal["mixed", "alternating"]
    size_K: Ints
    start_K: Ints
    carry: list[float] | None
    max_visits_K: Floats

    @cached_property
    def _task_words(self) -> NDArray[np.uint64]:
        return np.array([task_word(name) for name in self.names], dtype=np.uint64)

    @cached_property
    def _half_bits(self) -> NDArray[np.uint64]:
        return half_bits(np.maximum(self.size_K, 1))

    def rows_of(self, task: Ints, visit: Ints) -> Rows:
        """(task, epoch, row) of the visit-th row drawn from each task."""
        if not len(task):
            return task, visit, visit.copy()
        size = self.size_K[task]
        epoch, position = np.divmod(visit, size)
        pairs, which = np.unique(task * (int(epoch.max()) + 1) + epoch, return_inverse=True)
        pair_task, pair_epoch = np.divmod(pairs, int(epoch.max()) + 1)
        keys = round_keys(self.seed, self._task_words[pair_task], pair_epoch)[:, which]
        return task, epoch, permute(position, size, self._half_bits[task], keys)


def max_visits(
    max_epochs: Mapping[str, float] | float | None, names: tuple[str, ...], size_K: Ints
) -> NDArray[np.float64]:
    """Visits [K] that max_epochs allows each task; inf without a cap."""
    if max_epochs is None:
        return np.full(len(names), np.inf)
    if isinstance(max_epochs, Mapping):
        check_known(max_epochs, names, where="max_epochs")
    with np.errstate(invalid="ignore"):
        return np.nan_to_num(np.floor(limit_array(max_epochs, names) * size_K + 1e-9), nan=0.0, posinf=np.inf)
