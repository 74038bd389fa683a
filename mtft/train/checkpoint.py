"""What a checkpoint of a run holds, and how a run takes it up again. The files themselves: mtft.train.state.

Saved: trainable weights; optimizer, schedule and gradient scaler; the balancer; the random state of every rank;
counters of skipped steps; and the run's identity (fingerprints of plan and data), which must be the same to go on.
The data need no state: step s of the plan is a pure function of s.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from mtft.errors import UserError
from mtft.train.state import checkpoint_folder, load_tree, prune_checkpoints, save_tree, whole_folder
from mtft.train.tree import random_state, restore_random_state

if TYPE_CHECKING:
    from mtft.train.trainer import MultiTaskTrainer

WEIGHTS, TRAINER_STATE = "weights.safetensors", "trainer_state.json"


def trainable(model: nn.Module) -> dict[str, Tensor]:
    """Parameters that training moves, by name; a parameter that two modules share stands once."""
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


def save(trainer: MultiTaskTrainer) -> Path:
    """Writes checkpoint-<step> of a run in one process or under DDP; called on every rank, written by one."""
    from safetensors.torch import save_file

    run_dir, step = Path(trainer.args.output_dir), trainer.state.global_step
    random_states = _gather(random_state())
    if not trainer.args.should_save:
        _barrier()
        return checkpoint_folder(run_dir, step)
    scaler = trainer.accelerator.scaler
    tree = {
        "step": step,
        "identity": trainer.identity,
        "tasks": list(trainer.tasks),
        "optimizer": trainer.optimizer.state_dict(),
        "scheduler": trainer.lr_scheduler.state_dict(),
        "scaler": None if scaler is None else scaler.state_dict(),
        "balancer": trainer.balancer.state_dict(),
        "bad_steps": trainer.bad_steps,
        "random": random_states,
    }
    with whole_folder(checkpoint_folder(run_dir, step)) as folder:
        weights = {name: value.detach().cpu().contiguous() for name, value in trainable(trainer.model).items()}
        save_file(weights, folder / WEIGHTS, metadata={"format": "pt"})
        save_tree(folder, tree)
        trainer.state.save_to_json(str(folder / TRAINER_STATE))
    prune_checkpoints(run_dir, trainer.keep)
    _barrier()
    return checkpoint_folder(run_dir, step)


def check_identity(folder: Path, identity: dict[str, Any]) -> None:
    """UserError when a checkpoint was made from other data, another plan or another recipe; says which."""
    before = load_tree(folder)["identity"]
    other = [key for key in dict.fromkeys((*before, *identity)) if before.get(key) != identity.get(key)]
    if other:
        raise UserError(
            f"{folder.name} belongs to a run with another {' and '.join(other)}: continuing would mix two runs",
            where=str(folder.parent),
            do="restore the data of that run, start over with --fresh, or give another output.dir",
        )


def load_weights(trainer: MultiTaskTrainer, folder: Path) -> None:
    """Puts the saved weights into the model, which must have the same trainable parameters."""
    from safetensors.torch import load_file

    saved, model = load_file(folder / WEIGHTS), trainable(trainer.model)
    if saved.keys() != model.keys():
        raise ValueError(f"{folder / WEIGHTS} holds other parameters: {sorted(saved.keys() ^ model.keys())[:4]}")
    with torch.no_grad():
        for name, value in saved.items():
            model[name].copy_(value)


def load_state(trainer: MultiTaskTrainer, folder: Path) -> None:
    """Optimizer, schedule, scaler, balancer and counters."""
    tree = load_tree(folder)
    trainer.optimizer.load_state_dict(tree["optimizer"])
    trainer.lr_scheduler.load_state_dict(tree["scheduler"])
    if trainer.accelerator.scaler is not None and tree["scaler"] is not None:
        trainer.accelerator.scaler.load_state_dict(tree["scaler"])
    trainer.balancer.load_state_dict(tree["balancer"])
    trainer.bad_steps = tree["bad_steps"]


def load_random_state(trainer: MultiTaskTrainer, folder: Path) -> None:
    """This rank's random state. With another number of ranks there is none: dropout then differs, nothing else does."""
    states, rank = load_tree(folder)["random"], trainer.accelerator.process_index
    if len(states) != trainer.accelerator.num_processes:
        trainer.run_log.say(
            f"the checkpoint is of {len(states)} processes, this run has {trainer.accelerator.num_processes}: "
            "dropout draws other numbers from here on"
        )
        return
    restore_random_state(states[rank])


def _gather(mine: dict[str, Any]) -> list[dict[str, Any]]:
    if not (dist.is_available() and dist.is_initialized()):
        return [mine]
    every: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(every, mine)
    return every


def _barrier() -> None:
    if dist.is_available() and dist.is_initialized():
        dist.barrier()
