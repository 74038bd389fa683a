"""Python objects between ranks. Without a process group there is one rank, and nothing is sent. Collective calls."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch.distributed as dist

from mtft.common.errors import UserError


def in_group() -> bool:
    return dist.is_available() and dist.is_initialized()


def barrier() -> None:
    """Waits until every rank has come here."""
    if in_group():
        dist.barrier()


def from_first_rank(mine: Any) -> Any:
    """What rank 0 has, on every rank."""
    values = [mine]
    if in_group():
        dist.broadcast_object_list(values, src=0)
    return values[0]


def from_all_ranks(mine: Any) -> list[Any]:
    """What each rank has, in their order."""
    if not in_group():
        return [mine]
    values: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(values, mine)
    return values


def on_first_rank(work: Callable[[], Any]) -> Any:
    """What `work` gives on rank 0, on every rank; its UserError too: the others would wait for ever."""
    outcome: Any = None
    if not in_group() or dist.get_rank() == 0:
        try:
            outcome = work()
        except UserError as error:
            outcome = error
    outcome = from_first_rank(outcome)
    if isinstance(outcome, UserError):
        raise outcome
    return outcome
