"""How the processes of a run were launched: the one reader of WORLD_SIZE, RANK and ACCELERATE_*.

Also the check that all of them really train together. No torch at import.
"""

from __future__ import annotations

import itertools
import os
import shlex
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mtft.common.errors import UserError
from mtft.common.own_files import irregular, read_own

if TYPE_CHECKING:
    from accelerate import Accelerator

_TRUE, _FALSE = ("y", "yes", "t", "true", "on", "1"), ("n", "no", "f", "false", "off", "0")

_NUMBERS = {  # fields of LaunchConfig -> keys of DeepSpeed's zero_optimization
    "reduce_bucket": "reduce_bucket_size",
    "prefetch_bucket": "stage3_prefetch_bucket_size",
    "live_parameters": "stage3_max_live_parameters",
    "reuse_distance": "stage3_max_reuse_distance",
}


@dataclass(frozen=True)
class LaunchConfig:
    """What `accelerate launch` or torchrun has put into the environment.

    zero: DeepSpeed's stage, 0 = no DeepSpeed; fsdp: version, 0 = no FSDP; ranks: processes; cpu_optimizer: DeepSpeed
    takes an optimizer of its own, on the CPU; sequence_ranks: ranks that share a row (context and sequence
    parallelism); tensor_ranks: ranks that share a layer (tensor parallelism); reduce_bucket: numbers in the buffers in
    which DeepSpeed sums gradients; prefetch_bucket, live_parameters, reuse_distance: DeepSpeed's stage3_... of weights
    that are gathered ahead, that are gathered at once, and between two uses for which they stay gathered.
    """

    zero: int = 0
    fsdp: int = 0
    ranks: int = 1
    cpu_optimizer: bool = False
    sequence_ranks: int = 1
    tensor_ranks: int = 1
    reduce_bucket: int = 500_000_000
    prefetch_bucket: int = 50_000_000
    live_parameters: int = 1_000_000_000
    reuse_distance: int = 1_000_000_000

    @property
    def shards_weights(self) -> bool:
        """Each rank holds a part of every weight: only a module's own forward sees them whole."""
        return self.zero == 3 or self.fsdp > 0

    @classmethod
    def from_environment(cls, environment: Mapping[str, str] = os.environ) -> LaunchConfig:
        ranks = _integer(environment, "WORLD_SIZE", 1)
        fsdp = _integer(environment, "FSDP_VERSION", 1) if _flag(environment, "ACCELERATE_USE_FSDP") else 0
        sequence, tensor = _parallelism(environment, ranks if fsdp else None)
        if not _flag(environment, "ACCELERATE_USE_DEEPSPEED"):
            return cls(0, fsdp, ranks, sequence_ranks=sequence, tensor_ranks=tensor)
        section: Any = {}
        config = environment.get("ACCELERATE_DEEPSPEED_CONFIG_FILE")
        if config and Path(config).is_file():
            settings = read_own(Path(config), do="give DeepSpeed's configuration as a JSON file")
            section = settings.get("zero_optimization", {})
            zero = section.get("stage", 0) if isinstance(section, dict) else None
            if not isinstance(zero, int):
                raise UserError("zero_optimization.stage is no whole number", where=config, do="give 0, 1, 2 or 3")
            offload = section.get("offload_optimizer") or {}
            device = offload.get("device") if isinstance(offload, dict) else None
            forced = settings.get("zero_force_ds_cpu_optimizer", True)
            sequence = max(sequence, _size(settings, "sequence_parallel_size"))
            tensor = max(tensor, _size(settings.get("tensor_parallel"), "autotp_size"))
        else:
            zero = _integer(environment, "ACCELERATE_DEEPSPEED_ZERO_STAGE", 2)  # accelerate's own default
            device, forced = environment.get("ACCELERATE_DEEPSPEED_OFFLOAD_OPTIMIZER_DEVICE"), True
        own_optimizer = bool(forced) and device not in (None, "", "none")
        sizes = {field: section.get(key) for field, key in _NUMBERS.items()}
        numbers = {field: int(size) for field, size in sizes.items() if isinstance(size, int | float)}
        launch = cls(int(zero), fsdp, ranks, own_optimizer, sequence, tensor, **numbers)
        twice = section.get("overlap_comm") is True and zero < 3  # one is filled while the other is summed
        return replace(launch, reduce_bucket=2 * launch.reduce_bucket) if twice else launch


def check_launch(command: str) -> None:
    """UserError if a launch command can't be split, names no program, or a --config_file that is no file."""
    where = "command line, --launch"
    try:
        words = shlex.split(command)
    except ValueError as error:
        raise UserError(f"can't be split into words: {error}", where=where, do="close its quotes") from None
    if not words or shutil.which(words[0]) is None:
        what = f"there is no program {words[0] if words else command!r}"
        raise UserError(what, where=where, do="--launch 'accelerate launch --config_file ddp.yaml'")
    configs = [word.partition("=")[2] for word in words if word.startswith("--config_file=")]
    configs += [value for flag, value in itertools.pairwise(words) if flag == "--config_file"]
    for config in map(Path, configs):
        if (kind := irregular(config)) is not None or not config.exists():
            what = f"the config file {config} is {kind}" if kind else f"there is no config file {config}"
            raise UserError(what, where=where, do="name one, such as recipes/accelerate/ddp.yaml")


def _flag(environment: Mapping[str, str], name: str) -> bool:
    """A switch by accelerate's rule (accelerate.utils.str_to_bool); unset or empty: off."""
    value = (environment.get(name) or "false").lower()
    if value not in (*_TRUE, *_FALSE):
        raise UserError(f"{value!r} is neither true nor false", where=f"environment variable {name}")
    return value in _TRUE


def _integer(environment: Mapping[str, str], name: str, default: int) -> int:
    value = environment.get(name) or default
    try:
        return int(value)
    except ValueError:
        raise UserError(f"{value!r} is not a number", where=f"environment variable {name}") from None


def _parallelism(environment: Mapping[str, str], fsdp_ranks: int | None) -> tuple[int, int]:
    """(ranks that share a row, ranks that share a layer), of accelerate's parallelism_config.

    UserError for sizes of data parallelism that FSDP can't shard over: accelerate says so after the model is loaded.
    """
    if not _flag(environment, "ACCELERATE_USE_PARALLELISM_CONFIG"):
        return 1, 1
    axes = ("DP_REPLICATE", "DP_SHARD", "CP", "SP", "TP")
    replicas, shards, cp, sp, tp = (_integer(environment, f"PARALLELISM_CONFIG_{axis}_SIZE", 1) for axis in axes)
    if fsdp_ranks is not None and cp * sp * tp == 1 and (shards == 1 or replicas * shards != fsdp_ranks):
        raise UserError(
            f"dp_replicate_size {replicas} x dp_shard_size {shards} can't be had of {fsdp_ranks} processes under FSDP",
            where="parallelism_config in the launcher's configuration",
            do="take it out, or give sizes whose product is the number of processes, dp_shard_size above 1",
        )
    return cp * sp, tp


def _size(section: object, key: str) -> int:
    """A size in DeepSpeed's JSON; 1 where it is left out, 0, or no number (which DeepSpeed refuses itself)."""
    size = section.get(key) if isinstance(section, dict) else None
    return size if isinstance(size, int) else 1


def world_size() -> int:
    """Processes that the launcher started (torchrun, accelerate launch); 1 without a launcher."""
    return _integer(os.environ, "WORLD_SIZE", 1)


def several_machines() -> bool:
    """True where processes of this launch run on other machines too."""
    return _integer(os.environ, "LOCAL_WORLD_SIZE", world_size()) < world_size()


def is_main_process() -> bool:
    """True on the one process that writes files and talks."""
    return _integer(os.environ, "RANK", 0) == 0


def engine() -> str:
    """What the launcher asks for: "deepspeed", "fsdp", or "ddp" (also in one process)."""
    for name in ("deepspeed", "fsdp"):
        if _flag(os.environ, f"ACCELERATE_USE_{name.upper()}"):
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
