"""Inner products of task gradients, G = J J^T, float64 [K, K], and their combinations, J^T alpha.

Under data parallelism the order matters: every rank holds a part of each task's gradient, so J is summed over ranks
first and contracted then. The sum of the ranks' own Gram matrices lacks all products across ranks.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
import torch.distributed as dist
from torch import Tensor

COLUMNS = 1 << 20  # of a block that are float64 at a time: 8 MiB a task
BUCKET = 1 << 24  # numbers in one all-reduce


def gram(J: Mapping[str, Tensor]) -> Tensor:
    """G = sum over parameters of J_p J_p^T, float64 [K, K] on the CPU.

    J: {parameter: [K, *shape]}, the same on all ranks. Memory on top of J: 8 MiB a task.
    """
    if not J:
        raise ValueError("no gradient to contract")
    blocks = iter(J.values())
    total_KK = block_gram(next(blocks))
    for block in blocks:
        total_KK += block_gram(block)
    return total_KK.cpu()


def block_gram(block: Tensor) -> Tensor:
    """J_p J_p^T of one block [K, *shape], float64 on its device."""
    rows_KD = block.flatten(1)
    total_KK = rows_KD.new_zeros(len(rows_KD), len(rows_KD), dtype=torch.float64)
    for part_KC in rows_KD.split(COLUMNS, dim=1):
        part_KC = part_KC.double()
        total_KK.addmm_(part_KC, part_KC.T)
    return total_KK


def combine(jacobian: Mapping[str, Tensor], alpha_K: Tensor) -> dict[str, Tensor]:
    """J^T alpha = sum_k alpha_k J_k by parameter; a task with alpha 0 counts as 0 whatever its row holds."""
    tasks = alpha_K.nonzero().flatten().tolist()
    return {
        name: sum((float(alpha_K[k]) * block[k] for k in tasks), start=torch.zeros_like(block[0]))
        for name, block in jacobian.items()
    }


def sum_over_ranks(blocks: Iterable[Tensor], group: dist.ProcessGroup | None = None) -> None:
    """All-reduces blocks in place, a few at a time in one buffer. The same shapes and order on every rank."""
    bucket: list[Tensor] = []
    for block in blocks:
        if bucket and sum(held.numel() for held in bucket) + block.numel() > BUCKET:
            _reduce(bucket, group)
            bucket = []
        bucket.append(block)
    if bucket:
        _reduce(bucket, group)


def ranks_of(group: dist.ProcessGroup | None = None) -> int:
    """Processes of the group (None: of the default one); 1 without torch.distributed."""
    return dist.get_world_size(group) if dist.is_available() and dist.is_initialized() else 1


def _reduce(bucket: list[Tensor], group: dist.ProcessGroup | None) -> None:
    if len(bucket) == 1 and bucket[0].is_contiguous():
        dist.all_reduce(bucket[0], group=group)
        return
    flat = torch.cat([block.flatten() for block in bucket])
    dist.all_reduce(flat, group=group)
    start = 0
    for block in bucket:
        block.copy_(flat[start : start + block.numel()].view_as(block))
        start += block.numel()
