"""The batches of the next steps, built by one thread while a step is trained.

A thread and no loader processes: those die of the signals that schedulers send to a whole process group, which ends
the run instead of saving it, and pass every tensor on as an open file. What is built ahead is no part of a run's state:
a stopped run goes on from the number of its step, and the thread builds those batches again.
"""

from __future__ import annotations

from concurrent.futures import Future, ThreadPoolExecutor

import torch

from mtft.data.batching.batch import Batch
from mtft.data.batching.batches import KEPT, BatchSource

AHEAD = KEPT - 2  # steps: the source then knows what is in the one that is trained without asking its plan


class PrefetchedSteps:
    """`source` as a map-style dataset that is read in its order: asking for step s has the next ones built too.

    All batches are built in the one thread, so nothing else may change the source's plan meanwhile. An error in a batch
    is raised where that batch is asked for. device: where they will be copied to; for a GPU they are pinned.
    """

    def __init__(self, source: BatchSource, device: torch.device, *, ahead: int = AHEAD) -> None:
        self.source, self.device, self.ahead = source, device, ahead
        self._thread = ThreadPoolExecutor(1, "batches", initializer=self._begin)
        self._building: dict[int, Future[list[Batch]]] = {}

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, s: int) -> list[Batch]:
        for number in range(s, max(s + 1, min(s + 1 + self.ahead, len(self)))):
            if number not in self._building:
                self._building[number] = self._thread.submit(self._build, number)
        return self._building.pop(s).result()

    def close(self) -> None:
        """Ends the thread; what it is building is finished first."""
        self._thread.shutdown(cancel_futures=True)

    def _begin(self) -> None:
        if self.device.type == "cuda":  # else pinning would open a context on the first GPU, in every process
            torch.cuda.set_device(self.device)

    def _build(self, s: int) -> list[Batch]:
        batches = self.source[s]
        return [batch.pin_memory() for batch in batches] if self.device.type == "cuda" else batches
