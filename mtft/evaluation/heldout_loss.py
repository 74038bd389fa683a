"""Held-out loss and accuracy of each task: one forward pass over every held-out example, shared out over the ranks.

Scores are those of rows: the examples that one conversation became are added up, so that it counts once.

Any model that can tell the loss and the hit of each supervised token can be scored: a `score` function takes a Batch
to (nll_BT, hit_BT). A plain or adapted transformers model does so by `mtft.losses.token_scores.token_scores`; a fused
model by its own method (with packing=False: it decodes row by row).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from mtft.data.batching.batch import Batch
from mtft.data.batching.batches import EvalBatch, eval_batches
from mtft.evaluation.task_scores import TaskScores

Score = Callable[[Batch], tuple[Tensor, Tensor]]
Told = Callable[[int, int], None]  # (done, of how many)


@dataclass(frozen=True)
class BatchLayout:
    """How held-out examples are laid out in batches; the scores don't depend on it."""

    micro_batch_tokens: int
    max_length: int
    pad_id: int
    packing: bool = True


def score_tasks(
    score: Score,
    stores: Sequence[Any | None],
    layout: BatchLayout,
    *,
    device: torch.device | str = "cpu",
    told: Told | None = None,
) -> dict[str, TaskScores]:
    """Scores by any `score` function. With torch.distributed every rank scores its part and all get the whole.
    told: called after each batch with (examples that this rank has scored, of how many, about)."""
    distributed = dist.is_available() and dist.is_initialized()
    rank, world = (dist.get_rank(), dist.get_world_size()) if distributed else (0, 1)
    scores, done = {}, 0
    every = -(-sum(store.num_examples for store in stores if store is not None) // world)
    for index, store in enumerate(stores):
        if store is None:
            continue
        # Each example is scored by one rank and is 0 on the others: a sum over ranks is the whole.
        sums_3N = np.zeros((3, store.num_examples))
        for piece in eval_batches(
            store,
            index,
            micro_batch_tokens=layout.micro_batch_tokens,
            max_length=layout.max_length,
            packing=layout.packing,
            pad_id=layout.pad_id,
            rank=rank,
            world=world,
        ):
            batch = piece.batch.to(device)
            with torch.no_grad():  # not inference_mode: weights that ZeRO-3 gathers there could not be trained after
                nll_BT, hit_BT = score(batch)
            sums_3N[:, piece.examples] = example_sums(nll_BT, hit_BT, batch, piece)
            done += len(piece.examples)
            if told is not None:
                told(done, every)
        if world > 1:
            total = torch.from_numpy(sums_3N).to(device)
            dist.all_reduce(total)
            sums_3N = total.cpu().numpy()
        nll_N, tokens_N, correct_N = sum_by_row(sums_3N, store.row_numbers)
        ids = tuple(str(store.ids[int(i)]) for i in np.unique(store.row_numbers, return_index=True)[1])
        scores[store.task] = TaskScores(store.task, ids, nll_N, tokens_N.astype(np.int64), correct_N.astype(np.int64))
    return scores


def sum_by_row(sums_3N: np.ndarray, rows_N: np.ndarray) -> np.ndarray:
    """float64 [3, R]: the examples of one conversation count as one. rows_N: row of each example, ascending."""
    _, starts = np.unique(rows_N, return_index=True)
    return np.add.reduceat(sums_3N, starts, axis=1) if len(starts) else sums_3N


def example_sums(nll_BT: Tensor, hit_BT: Tensor, batch: Batch, piece: EvalBatch) -> np.ndarray:
    """float64 [3, n]: sum of nll, supervised tokens and hits of each example, in the order (row, segment)."""
    host, at_N = batch.host, batch.host.supervised_N
    segment_BT = host.segment_ids_BT.long()
    per_row_B = segment_BT.amax(dim=1) + 1  # examples in each row; segments count from 0
    first_B = per_row_B.cumsum(0) - per_row_B
    example_N = (first_B[:, None] + segment_BT).flatten()[at_N]
    found_2N = torch.stack([x_BT.flatten()[batch.supervised_N].double() for x_BT in (nll_BT, hit_BT)]).cpu()
    values = (found_2N[0], torch.ones_like(found_2N[0]), found_2N[1])
    sums = [torch.bincount(example_N, weights=value_N, minlength=len(piece.examples)) for value_N in values]
    return torch.stack(sums).numpy()
