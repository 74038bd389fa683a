"""In which order the tokens of a micro-batch are contracted, task by task. Worked out once, used by every layer."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from mtft.common.device_copy import to_device
from mtft.data.batching.batch import PADDING


class TokenOrder(NamedTuple):
    """Slices of one task each.

    rows     how many rows the tokens are
    index_N  take the rows in this order first; None: as they lie
    parts    (task, start, end) of every slice; padding is in none
    """

    rows: int
    index_N: Tensor | None
    parts: list[tuple[int, int, int]]


def order_by_task(task_ids: Tensor, num_tasks: int, device: torch.device | str | None = None) -> TokenOrder:
    """Order of tokens with these task ids (int, any shape, row-major; -1 = padding), for contractions on `device`.

    Tokens lie in runs of one task (an example is never torn apart), and a run is a slice that costs no copy. With many
    short runs, sorting is cheaper: then every row is gathered, and each task is one slice.
    """
    task_N = task_ids.reshape(-1).long()
    rows = len(task_N)
    if rows == 0:
        return TokenOrder(0, None, [])
    low, high = torch.stack(torch.aminmax(task_N)).tolist()
    if low < PADDING or high >= num_tasks:
        raise ValueError(f"task ids from {low} to {high}, but there are {num_tasks} tasks")
    borders = torch.nonzero(task_N[1:] != task_N[:-1]).flatten() + 1
    starts_N = torch.cat([borders.new_zeros(1), borders])
    starts, tasks = starts_N.tolist(), task_N[starts_N].tolist()
    runs = [(k, a, b) for k, a, b in zip(tasks, starts, [*starts[1:], rows], strict=True) if k != PADDING]
    device = task_N.device if device is None else torch.device(device)
    if len(runs) <= _most_runs(rows, num_tasks, device):
        return TokenOrder(rows, None, runs)
    index_N = torch.argsort(task_N, stable=True)[int((task_N == PADDING).sum()) :]
    ends = torch.bincount(task_N[index_N], minlength=num_tasks).cumsum(0).tolist()
    parts = [(k, a, b) for k, (a, b) in enumerate(zip([0, *ends[:-1]], ends, strict=True)) if b > a]
    return TokenOrder(rows, to_device(index_N, device), parts)


def _most_runs(rows: int, num_tasks: int, device: torch.device) -> int:
    """Runs up to which slices beat a gather. A kernel launch is dear on a GPU, a copy on a CPU."""
    return max(2 * num_tasks, rows // 32 if device.type == "cpu" else 0)
