"""What differs between engines: who holds the weights, who takes the optimizer step, what a checkpoint consists of.

    engine            weights                    the optimizer step                   checkpoint
    one process, DDP  whole on every rank        Trainer's                            whole tensors
    FSDP2             a part a rank (DTensors)   Trainer's, each rank on its part     whole tensors, gathered one by one
    ZeRO-1, ZeRO-2    whole on every rank        inside the last backward of a step   DeepSpeed's files, a part a rank
    ZeRO-3            a part a rank              inside the last backward of a step   DeepSpeed's files, a part a rank

All of them are held to one process on two gloo ranks (tests/distributed). A checkpoint of whole tensors goes on under
every engine and number of ranks that writes such; DeepSpeed's only under the stage and the number of ranks it is from.

A step whose gradient is not finite is skipped, under ZeRO by DeepSpeed itself (0.19, in every precision); if it took
one, the run is stopped, and goes on from its last checkpoint.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from mtft.common.errors import UserError
from mtft.distributed.launch import LaunchConfig, engine

if TYPE_CHECKING:
    from pathlib import Path

    import torch
    from accelerate import Accelerator


def sharding_of_launch() -> dict[str, Any]:
    """{"name", "processes"} of this launch; kept with a checkpoint."""
    launch = LaunchConfig.from_environment()
    name = f"zero{launch.zero}" if launch.zero else "fsdp" if launch.fsdp else "ddp"
    return {"name": name, "processes": launch.ranks}


def fsdp_settings(dtype: torch.dtype) -> dict[str, Any]:
    """Keyword arguments of accelerate's FSDP plugin; the launcher's configuration adds the others.

    Weights are gathered in the precision of the forward pass, gradients are averaged in fp32 as under DDP (accelerate's
    own choice is to average them in bf16). Layers are sharded one by one, which is why the model's layer class counts.
    """
    import torch
    from torch.distributed.fsdp import MixedPrecisionPolicy

    narrow = None if dtype == torch.float32 else dtype
    policy = MixedPrecisionPolicy(param_dtype=narrow, reduce_dtype=None if narrow is None else torch.float32)
    return {"fsdp_version": 2, "auto_wrap_policy": "transformer_based_wrap", "mixed_precision_policy": policy}


def set_deepspeed_precision(plugin: Any, dtype: torch.dtype, *, full: bool) -> None:
    """Writes the precision of a run into accelerate's DeepSpeed plugin; with bf16 it is that of DDP.

    What is trained stays fp32, the forward pass runs under autocast, gradients are summed and averaged in fp32.
    DeepSpeed's own bf16 mode would cast an adapter (or the whole model) to bf16 and sum and average in it. Its fp16
    mode is kept, for its loss scaling.

    Raises UserError when the user's configuration fixes another precision than the recipe's.
    """
    import torch

    config = plugin.deepspeed_config
    for name, own_mode in (("bf16", False), ("fp16", dtype == torch.float16)):
        if config.get(name, {}).get("enabled") is True and not own_mode:
            raise UserError(
                f"DeepSpeed's configuration fixes {name}; the recipe's model.dtype decides ({dtype})",
                where=f"{name}.enabled in DeepSpeed's configuration",
                do=f'take {name} out of it, or set "enabled": "auto"',
            )
    narrow = dtype == torch.bfloat16
    # No module is "safe" in bf16: weights and gradients travel between ranks in the precision that they have.
    config["torch_autocast"] = {"enabled": narrow, "dtype": "bfloat16", "lower_precision_safe_modules": []}
    # Only for loading, where ZeRO-3 shards the base in its precision. The engine does not read this copy.
    plugin.dschf.config["bf16"] = {"enabled": narrow and not full}


def check_sharded(model: nn.Module) -> None:
    """Refuses a run that asked for FSDP and did not get it: each rank would hold everything, or train alone."""
    from torch.distributed.tensor import DTensor

    if engine() != "fsdp":
        return
    whole = [name for name, parameter in model.named_parameters() if not isinstance(parameter, DTensor)]
    if whole:
        raise UserError(
            f"FSDP was asked for, but {len(whole)} parameters are not sharded, for example {whole[0]}",
            where="the launcher's configuration (distributed_type: FSDP)",
            do="start several processes with recipes/accelerate/fsdp2.yaml, or take one.yaml or ddp.yaml",
        )


def trainable(model: nn.Module) -> dict[str, Tensor]:
    """Parameters that training moves, by name; a parameter that two modules share stands once."""
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


def elements(parameter: Tensor) -> int:
    """Numbers in a parameter: all of them, where ZeRO-3 has left an empty tensor or nf4 packs two in a byte."""
    packed = vars(parameter).get("quant_state")
    return int(vars(parameter).get("ds_numel", parameter.numel() if packed is None else packed.shape.numel()))


def resting(model: nn.Module) -> nn.Module:
    """The model with every rank holding its own part only: FSDP leaves some weights gathered after a forward pass."""
    from torch.distributed.fsdp import FSDPModule

    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()
    return model


def gathered(tree: Any, *, keep: bool) -> Any:
    """A nested state with DTensors made whole on the CPU, one at a time. A collective call; only ranks that `keep` do.

    Everything else stays as it is. The result may share memory with the tree, where nothing had to be moved.
    """
    from torch.distributed.tensor import DTensor

    if isinstance(tree, DTensor):
        whole = tree.full_tensor()
        return whole.detach().cpu() if keep else None
    if isinstance(tree, dict):
        return {key: gathered(value, keep=keep) for key, value in tree.items()}
    if isinstance(tree, list | tuple):
        return type(tree)(gathered(value, keep=keep) for value in tree)
    return tree


def placed(whole: Tensor, like: Tensor) -> Tensor:
    """This rank's part of `whole`, if `like` is sharded: the inverse of `gathered`. Without communication."""
    from torch.distributed.tensor import DTensor, distribute_tensor

    if not isinstance(like, DTensor):
        return whole
    here = whole.to(like.device_mesh.device_type)
    return distribute_tensor(here, like.device_mesh, like.placements, src_data_rank=None)


def placed_moments(optimizer: Any, state: dict[str, Any]) -> dict[str, Any]:
    """An optimizer's state with whole tensors, as its own parameters are placed."""
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]

    def of(parameter: Tensor, moments: dict[str, Any]) -> dict[str, Any]:
        same = {key for key, value in moments.items() if isinstance(value, Tensor) and value.shape == parameter.shape}
        return {key: placed(value, parameter) if key in same else value for key, value in moments.items()}

    return {**state, "state": {index: of(parameters[index], moments) for index, moments in state["state"].items()}}


def whole_weights(accelerator: Accelerator, model: nn.Module, *, fsdp: bool, keep: bool) -> Mapping[str, Tensor] | None:
    """The trained weights, gathered on the CPU of the writing rank, where the engine shards them; else None.

    A collective call; only ranks that `keep` get them.
    """
    if fsdp:
        return gathered(trainable(resting(model)), keep=keep)
    plugin = accelerator.state.deepspeed_plugin
    if plugin is None or plugin.zero_stage != 3:
        return None
    import deepspeed

    whole = {}
    for name, parameter in trainable(model).items():  # one at a time: the whole may not fit on a GPU
        with deepspeed.zero.GatheredParameters([parameter]):
            if keep:
                whole[name] = parameter.detach().cpu().clone()
    return whole


def save_engine_state(deepspeed_engine: Any, folder: Path) -> None:
    """DeepSpeed's own checkpoint (its files are pickles): weights that are trained, optimizer. A collective call."""
    deepspeed_engine.save_checkpoint(str(folder), exclude_frozen_parameters=True)
