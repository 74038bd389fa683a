"""What a rank holds through a step under each engine, out of what one process would hold.

    engine       weights   gradients             optimizer                        buffers
    one process  whole     whole                 whole                            -
    DDP          whole     whole                 whole                            the gradients once more, in buckets
    FSDP2        a part    a part                a part                           played along (fsdp_play)
    ZeRO-1       whole     whole                 a part, and of an fp32 copy      reduce buckets
    ZeRO-2       whole     a part                a part, and of an fp32 copy      reduce buckets
    ZeRO-3       a part    a part                a part, and of an fp32 copy      reduce bucket, gathered weights

DeepSpeed's bucket is of one size whatever is trained (reduce_bucket_size: 5e8 numbers, 2 GB): a smaller one in its JSON
saves that. ZeRO-3 keeps gathered weights that it will need again soon, up to stage3_max_live_parameters (1e9).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn

from mtft.distributed.launch import LaunchConfig

LIVE_PARAMETERS = 1_000_000_000  # DeepSpeed's stage3_max_live_parameters


@dataclass(frozen=True)
class EngineShare:
    """Bytes of a rank: `weights`; `training`: gradients, optimizer and buffers; `gradients`: those of them that are not
    there, or were counted, at the highest point of the played step; `gathered`: what comes to that."""

    weights: int
    training: int
    gradients: int
    gathered: int = 0


def engine_share(
    launch: LaunchConfig,
    *,
    weights: int,
    uncut: int,
    gradients: int,
    states: int,
    parameters: int,
    width: int,
    accumulates: bool = False,
) -> EngineShare:
    """Of whole `weights` (of which `uncut` bytes stay whole), `gradients` and optimizer `states`, in bytes.

    parameters: how many there are; width: bytes of one that is gathered; accumulates: gradients of an earlier
    micro-batch are there when a large one is run.
    """
    ranks = launch.ranks
    part = (weights - uncut) // ranks + uncut
    if launch.fsdp:
        return EngineShare(part, (gradients + states) // ranks, gradients // ranks)
    if not launch.zero:
        return EngineShare(weights, gradients * (2 if ranks > 1 else 1) + states, gradients)
    optimizer, buckets = (gradients + states) // ranks, 4 * launch.reduce_bucket
    if launch.zero == 3:
        live = min(parameters, LIVE_PARAMETERS) * width
        return EngineShare(part, optimizer + gradients // ranks + buckets, 0, live)
    kept = gradients if launch.zero == 1 else gradients // ranks
    return EngineShare(weights, optimizer + kept + buckets, 0 if accumulates else kept)  # else they come after it


class BucketPlay:
    """DeepSpeed moves every gradient into its bucket as it comes."""

    def __init__(self, model: nn.Module) -> None:
        self._trained = [parameter for parameter in model.parameters() if parameter.requires_grad]

    def begin(self) -> None:
        for parameter in self._trained:
            parameter.register_post_accumulate_grad_hook(_drop)

    def finish(self) -> None:
        pass


def _drop(parameter: torch.Tensor) -> None:
    parameter.grad = None
