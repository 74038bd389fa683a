"""The small held-out stream that validation-driven balancers look at.

Every `Needs.valid_every` steps one micro-batch a rank of held-out examples, all tasks in it, forward only. The cost is
one forward of a micro-batch every so many steps (see scripts/bench_losses.py). The choice depends on (seed, step)
only: the same for any number of ranks, and after a restart.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from mtft.common.errors import UserError
from mtft.data.batching.batch import Batch
from mtft.data.batching.batches import ExampleStore, collate, deal_micro_batches
from mtft.data.batching.packing import pack


class ValidationStream:
    """`stream.batches(step)`: this rank's micro-batches of the measurement at `step`; as many on every rank.

    tokens      of one measurement over all ranks; tasks take turns until it is full, in an order that changes from one
                measurement to the next, so that with more tasks than fit each is measured now and then (NaN otherwise)
    max_length  longest packed row
    packing     several examples in a row
    """

    def __init__(
        self,
        stores: Sequence[ExampleStore | None],
        *,
        tasks: Sequence[str],
        tokens: int,
        max_length: int,
        packing: bool,
        pad_id: int,
        seed: int,
        rank: int = 0,
        world: int = 1,
    ) -> None:
        without = [task for task, store in zip(tasks, stores, strict=True) if store is None or not len(store.lengths)]
        if without:
            raise UserError(
                f"this balancer watches validation losses, and {', '.join(without)} has no held-out rows",
                where="tasks.*.eval_data",
                do="give every task eval_data, or take a balancer that reads training losses only",
            )
        self.stores = [store for store in stores if store is not None]
        self.tokens, self.capacity, self.packing, self.pad_id = tokens, min(max_length, tokens), packing, pad_id
        self.seed, self.rank, self.world = seed, rank, world

    def choose(self, step: int) -> list[tuple[int, int]]:
        """(task, row) of every example of the measurement, over all ranks."""
        rng = np.random.default_rng([self.seed, step])
        turns = [iter(rng.permutation(len(store.lengths)).tolist()) for store in self.stores]
        waiting, chosen, left = rng.permutation(len(self.stores)).tolist(), [], self.tokens
        while waiting:
            task = waiting.pop(0)
            row = next(turns[task], None)
            if row is None:
                continue  # every held-out row of the task is in
            length = int(self.stores[task].lengths[row])
            if length <= left:
                chosen.append((task, row))
                left -= length
                waiting.append(task)
            # A task whose next row doesn't fit is done: skipping to shorter rows would measure short examples only.
        return chosen

    def batches(self, step: int) -> list[Batch]:
        chosen = self.choose(step)
        lengths = np.array([int(self.stores[task].lengths[row]) for task, row in chosen], dtype=np.int64)
        rows = pack(lengths, self.capacity) if self.packing else [[i] for i in range(len(chosen))]
        dealt = deal_micro_batches(lengths, rows, max(self.capacity, self.tokens // self.world), self.world)[self.rank]
        return [
            collate(
                [[(self.stores[chosen[i][0]].example(chosen[i][1]), chosen[i][0]) for i in row] for row in part],
                self.pad_id,
            )
            for part in dealt
        ]
