"""Optimizer steps as a dataset: step s -> this rank's micro-batches; and what the step holds on all ranks."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from torch.utils.data import Dataset

from mtft.data.batching.batch import Batch

if TYPE_CHECKING:
    from data_mixers.plan.mixture_plan import MixturePlan
    from data_mixers.plan.replanned import ReplannedPlan
    from mtft.data.batching.batches import BatchSource


class StepContent(NamedTuple):
    """What an optimizer step holds over all ranks, for each task: [K].

    examples_K  int64;  tokens_K  int64, prompt and response;  share_K  part of the step, in the mixture's unit
    """

    examples_K: np.ndarray
    tokens_K: np.ndarray
    share_K: np.ndarray


class StepDataset(Dataset):
    """The steps of `plan`, as `source` deals them out to this rank.

    until  number of steps after which the run ends, where that is earlier than the plan does
    """

    def __init__(self, source: BatchSource, plan: MixturePlan | ReplannedPlan) -> None:
        self.source, self.plan = source, plan
        self.until: int | None = None

    def __len__(self) -> int:
        return self.plan.steps if self.until is None else self.until

    def __getitem__(self, step: int) -> list[Batch]:
        return self.source[step]

    def content(self, step: int) -> StepContent:
        """What a step holds, told from the plan alone."""
        task, _, row = self.source.examples(step)
        stores = self.source.stores
        examples_K = np.bincount(task, minlength=len(stores))
        tokens_K = np.array([int(store.lengths[row[task == k]].sum()) for k, store in enumerate(stores)])
        part_K = tokens_K if self.plan.unit == "tokens" else examples_K
        return StepContent(examples_K, tokens_K, part_K / max(part_K.sum(), 1))

    def names(self, step: int) -> list[dict[str, str]]:
        """Which examples a step holds, by task and id."""
        task, _, row = self.source.examples(step)
        stores = self.source.stores
        return [{"task": stores[k].task, "id": str(stores[k].ids[int(i)])} for k, i in zip(task, row, strict=True)]
