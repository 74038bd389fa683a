"""The processes of a run: who writes, and the check that all of them really train together. No torch at import."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from mtft.common.errors import UserError

if TYPE_CHECKING:
    from accelerate import Accelerator


def world_size() -> int:
    """Processes that the launcher started (torchrun, accelerate launch); 1 without a launcher."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def is_main_process() -> bool:
    """True on the one process that writes files and talks."""
    return int(os.environ.get("RANK", "0")) == 0


def engine() -> str:
    """What the launcher asks for: "deepspeed", "fsdp", or "ddp" (also in one process)."""
    for name in ("deepspeed", "fsdp"):
        if os.environ.get(f"ACCELERATE_USE_{name.upper()}", "false").lower() in ("1", "true", "yes"):
            return name
    return "ddp"


def init_cpu_process_group() -> None:
    """Joins CPU ranks under a sharding engine, before TrainingArguments would, which gets it wrong on CPUs.

    DeepSpeed: it names no backend, and each rank would train alone. FSDP: accelerate shards only ranks of the kind
    MULTI_GPU, and takes a request on MULTI_CPU for DDP without a word. With the kind set here it runs the code that
    it runs on GPUs, over gloo. TrainingArguments has to be told to keep this state (use_configured_state).
    """
    from accelerate import PartialState
    from accelerate.state import AcceleratorState
    from accelerate.utils import DistributedType

    # A second run in the process: TrainingArguments forgets the first one so, except where it is told to keep a state.
    AcceleratorState._reset_state(reset_partial_state=True)
    if engine() == "fsdp":
        PartialState(cpu=True).distributed_type = DistributedType.MULTI_GPU
    else:
        PartialState(backend="gloo")


def check_ranks(accelerator: Accelerator) -> None:
    """Refuses a run whose processes don't know of each other.

    Some combinations of launcher, engine and device leave every process alone with its share of the data: the run
    ends well and its result is wrong. Seen with DeepSpeed on machines without a GPU, and with backends named by hand.
    """
    import torch

    launched = world_size()
    together = torch.distributed.get_world_size() if torch.distributed.is_initialized() else 1
    if not accelerator.num_processes == together == launched:
        raise UserError(
            f"{launched} processes were launched, torch.distributed joins {together}, accelerate sees "
            f"{accelerator.num_processes}: each would train alone and the result would be wrong",
            where="the launcher's environment (WORLD_SIZE)",
            do="start with `accelerate launch --config_file recipes/accelerate/ddp.yaml -m mtft train RECIPE` or with "
            "torchrun, and name no backend by hand",
        )
