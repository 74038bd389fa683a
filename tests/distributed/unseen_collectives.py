"""Collectives of torch.distributed that the memory profiler does not see: memory.py counts DeepSpeed with them.

gloo's threads copy what they gather, which NCCL does not, and are now and then the last to let go of a tensor, which
the profiler misses: up to 45 MB in a run, another amount in each. Here a thread without profiler runs the collective
on copies, and it has ended when the call returns. What DeepSpeed itself holds, and when, stays as it is.
"""

from concurrent.futures import ThreadPoolExecutor

import torch
import torch.distributed
from torch.utils._pytree import tree_map_only

NAMES = ("all_gather", "all_gather_into_tensor", "all_reduce", "broadcast", "reduce", "reduce_scatter_tensor")


class Ended:
    """What an asynchronous call returns."""

    def wait(self):
        return True


def use_unseen_collectives():
    """For the rest of the process; before DeepSpeed looks them up."""
    thread = ThreadPoolExecutor(1)
    for name in NAMES:
        setattr(torch.distributed, name, _unseen(getattr(torch.distributed, name), thread))


def _unseen(collective, thread):
    def on_copies(args, kwargs):
        pairs = []

        def copy(tensor):
            pairs.append((tensor, tensor.clone()))
            return pairs[-1][1]

        with torch.no_grad():
            args, kwargs = tree_map_only(torch.Tensor, copy, (args, kwargs))
            collective(*args, **kwargs)
            for tensor, copied in pairs:
                tensor.copy_(copied)

    def run(*args, async_op=False, **kwargs):
        thread.submit(on_copies, args, kwargs).result()
        return Ended() if async_op else None

    return run
