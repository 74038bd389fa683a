"""What a rank holds through a step under each engine, out of what one process would hold.

    engine       weights   gradients             optimizer                        buffers
    one process  whole     whole                 whole                            -
    DDP          whole     whole                 whole                            the gradients once more, in buckets
    FSDP2        a part    a part                a part                           played along (fsdp_play)
    ZeRO-1       whole     whole                 a part, and of an fp32 copy      reduce buckets
    ZeRO-2       whole     a part                a part, and of an fp32 copy      reduce buckets
    ZeRO-3       a part    a part                a part, and of an fp32 copy      reduce bucket, weights (zero_play)

DeepSpeed's bucket is of one size whatever is trained (reduce_bucket_size: 5e8 numbers, 2 GB): a smaller one in its JSON
saves that. ZeRO's gradients as they come, and ZeRO-3's gathered weights, are played along (zero_play).
"""

from __future__ import annotations

from dataclasses import dataclass

from mtft.distributed.launch import LaunchConfig


@dataclass(frozen=True)
class EngineShare:
    """Bytes of a rank: `weights`; `training`: gradients, optimizer and buffers; `gradients`: those of them that are not
    there, or were counted, at the highest point of the played step."""

    weights: int
    training: int
    gradients: int


def engine_share(
    launch: LaunchConfig,
    *,
    weights: int,
    uncut: int,
    gradients: int,
    states: int,
    accumulates: bool = False,
) -> EngineShare:
    """Of whole `weights` (of which `uncut` bytes stay whole), `gradients` and optimizer `states`, in bytes.

    accumulates: gradients of an earlier micro-batch are there when a large one is run.
    """
    ranks = launch.ranks
    part = (weights - uncut) // ranks + uncut
    if launch.fsdp:
        return EngineShare(part, (gradients + states) // ranks, gradients // ranks)
    if not launch.zero:
        return EngineShare(weights, gradients * (2 if ranks > 1 else 1) + states, gradients)
    optimizer, buckets = (gradients + states) // ranks, 4 * launch.reduce_bucket
    if launch.zero == 3:
        return EngineShare(part, optimizer + gradients // ranks + buckets, 0)
    kept = gradients if launch.zero == 1 else gradients // ranks
    return EngineShare(weights, optimizer + kept + buckets, 0 if accumulates else kept)  # else they come after it
