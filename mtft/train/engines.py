"""What differs between engines: who holds the weights, and who takes the optimizer step.

    engine            weights                   the optimizer step                    tested against one process
    one process, DDP  whole on every rank       Trainer's                             tests/distributed/test_ddp.py
    ZeRO-1, ZeRO-2    whole on every rank       inside the last backward of a step    tests/distributed/test_zero.py
    ZeRO-3            sharded over the ranks    inside the last backward of a step    tests/distributed/test_zero.py

With ZeRO a step whose gradient is not finite has been taken before anyone can look at it: such a run is stopped, and
goes on from its last checkpoint. FSDP is refused: on CPUs accelerate runs it as DDP, so nothing could be tested.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from mtft.errors import UserError
from mtft.train.ranks import engine

if TYPE_CHECKING:
    from pathlib import Path

    from mtft.train.trainer import MultiTaskTrainer


def refuse_untested(quantise: str) -> None:
    """UserError for an engine that is not supported with this recipe."""
    if engine() == "fsdp":
        raise UserError(
            "FSDP is not supported",
            where="the launcher's configuration (distributed_type: FSDP)",
            do="use recipes/accelerate/zero3.yaml for models that don't fit, ddp.yaml for those that do",
        )
    if engine() == "deepspeed" and quantise != "none":
        raise UserError(
            f"a base quantised to {quantise} can't be sharded by DeepSpeed",
            where="model.quantise",
            do="use recipes/accelerate/ddp.yaml, or set model.quantise: none",
        )


def trainable(model: nn.Module) -> dict[str, Tensor]:
    """Parameters that training moves, by name; a parameter that two modules share stands once."""
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


def whole_weights(trainer: MultiTaskTrainer, model: nn.Module) -> Mapping[str, Tensor] | None:
    """The trained weights, gathered on the CPU, where the engine shards them; else None. A collective call."""
    plugin = trainer.accelerator.state.deepspeed_plugin
    if plugin is None or plugin.zero_stage != 3:
        return None
    import deepspeed

    parameters = trainable(model)
    whole = {}
    for name, parameter in parameters.items():  # one at a time: the whole may not fit on a GPU
        with deepspeed.zero.GatheredParameters([parameter]):
            whole[name] = parameter.detach().cpu().clone()
    return whole


def save_engine_state(trainer: MultiTaskTrainer, folder: Path) -> None:
    """DeepSpeed's own checkpoint (its files are pickles): weights that are trained, optimizer. A collective call."""
    deepspeed_engine: Any = trainer.model_wrapped
    deepspeed_engine.save_checkpoint(str(folder), exclude_frozen_parameters=True)
