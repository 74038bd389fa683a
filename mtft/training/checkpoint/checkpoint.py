"""What a checkpoint of a run holds, and how a run takes it up again. The files themselves:
mtft.training.checkpoint.checkpoint_files.

Saved: trainable weights and optimizer (whole, also where ranks hold parts of them; under DeepSpeed in its own files);
schedule and gradient scaler; the balancer; the random state of every rank; counters of skipped steps; the run's
identity (fingerprints of plan and data) and what it is trained with (run_basis.py), which must be the same to go on.
The data need no state: step s of the plan is a pure function of s; with mixture.online, of s and the changes so far,
which are saved.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from accelerate import Accelerator
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import TrainerState

from mtft.common.errors import UserError
from mtft.common.state_tree import random_state, restore_random_state
from mtft.distributed.collectives import barrier, from_all_ranks
from mtft.distributed.sharding import (
    gathered,
    placed,
    placed_moments,
    resting,
    save_engine_state,
    sharding_of_launch,
    trainable,
)
from mtft.recipe.schema.recipe import Recipe
from mtft.training.checkpoint.checkpoint_files import (
    atomic_checkpoint_dir,
    checkpoint_folder,
    load_tree,
    prune_checkpoints,
    read_state,
    save_tree,
)
from mtft.training.checkpoint.run_basis import (
    OTHER_RUN,
    check_basis,
    check_digest,
    check_parameters,
    parameters_digest,
)
from mtft.training.online_mixture import OnlineMixture
from mtft.training.run_files.run_dir import check_same_recipe
from mtft.training.step.objective import StepContext
from mtft.training.step.task_gradients import TaskGradientStep

WEIGHTS, TRAINER_STATE = "weights.safetensors", "trainer_state.json"
NO_GRADIENTS = {"aggregator": None, "affinity": None}  # of a run that measures none


class Stateful(Protocol):
    """A part of a run that a checkpoint holds."""

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state: dict[str, Any], /) -> Any: ...


@dataclass(frozen=True)
class RunState:
    """What a checkpoint holds of a run beside weights and random numbers. bad_steps: counters, changed in place."""

    context: StepContext
    scheduler: Stateful
    balancer: Stateful
    gradient_step: TaskGradientStep | None
    stopping: Stateful
    online: OnlineMixture | None
    bad_steps: dict[str, int]


def save(
    run: RunState,
    run_dir: Path,
    trainer_state: TrainerState,
    identity: dict[str, Any],
    basis: dict[str, Any] | None = None,
    *,
    writer: bool,
    keep: int,
) -> None:
    """Writes checkpoint-<step>. A collective call: one rank writes, and under DeepSpeed every rank its own part."""
    context, step = run.context, trainer_state.global_step
    random_states = from_all_ranks(random_state())
    own_files, scaler = context.deepspeed, context.accelerator.scaler
    model = resting(context.model)
    tree = {
        "step": step,
        "identity": identity,
        "basis": None if basis is None else {**basis, "parameters": parameters_digest(trainable(model))},
        "engine": sharding_of_launch(),
        "tasks": list(context.tasks),
        "optimizer": None if own_files else gathered(context.optimizer.state_dict(), keep=writer),
        "scheduler": run.scheduler.state_dict(),
        "scaler": None if scaler is None else scaler.state_dict(),
        "balancer": run.balancer.state_dict(),
        "gradients": NO_GRADIENTS if run.gradient_step is None else run.gradient_step.state_dict(),
        "stopping": run.stopping.state_dict(),
        "online": None if run.online is None else run.online.controller.state(step),
        "bad_steps": run.bad_steps,
        "random": random_states,
    }
    with atomic_checkpoint_dir(checkpoint_folder(run_dir, step), writer=writer, barrier=barrier) as folder:
        if own_files:
            save_engine_state(context.wrapped, folder)
        weights = {} if own_files else gathered(trainable(model), keep=writer)
        if writer:
            if not own_files:
                weights = {name: value.detach().cpu().contiguous() for name, value in weights.items()}
                save_file(weights, folder / WEIGHTS, metadata={"format": "pt"})
            save_tree(folder, tree)
            trainer_state.save_to_json(str(folder / TRAINER_STATE))
    if writer:
        prune_checkpoints(run_dir, keep)


def check_identity(
    folder: Path,
    identity: dict[str, Any],
    basis: Mapping[str, Any] | None = None,
    *,
    say: Callable[[str], None] = lambda _: None,
) -> None:
    """UserError when a checkpoint was made from another recipe, template or base, other data or another plan: which.

    Also when the launch can't read it: DeepSpeed's files fit only the stage and the number of ranks that wrote them.
    basis: of the run that would go on (None: not known). say: told of packages that have other versions now.
    """
    state = read_state(folder, {"identity": dict, "engine": dict, "engine.name": str, "engine.processes": int})
    if basis is not None:
        check_basis(state.get("basis"), basis, folder, say=say)
    before, wrote, here = state["identity"], state["engine"], sharding_of_launch()
    if wrote != here and "zero" in wrote["name"] + here["name"]:
        raise UserError(
            f"{folder.name} was written under {_words(wrote)}, this launch is {_words(here)}: "
            "DeepSpeed's files can't be taken over",
            where=str(folder.parent),
            do="continue with the launcher configuration and the number of processes it was started with, "
            "or start over with --fresh",
        )
    other = [key for key in dict.fromkeys((*before, *identity)) if before.get(key) != identity.get(key)]
    if other:
        what = f"{folder.name} belongs to a run with another {' and '.join(other)}: continuing would mix two runs"
        do = "restore the data of that run, start over with --fresh, or give another output.dir"
        raise UserError(what, where=str(folder.parent), do=do)


def check_checkpoint_recipe(folder: Path, recipe: Recipe) -> None:
    """UserError, with both values of each key, when a checkpoint was trained by another recipe, as far as it says."""
    basis = read_state(folder).get("basis")
    if isinstance(basis, dict):
        check_same_recipe(basis.get("recipe"), recipe, folder)


def load_weights(bare: nn.Module, folder: Path) -> None:
    """Puts the saved weights into the model, which must have the same trainable parameters."""
    saved, model = load_file(folder / WEIGHTS), trainable(resting(bare))
    check_parameters(saved, model, folder)
    with torch.no_grad():
        for name, value in saved.items():
            model[name].copy_(placed(value, model[name]))


def load_state(run: RunState, folder: Path) -> None:
    """Optimizer (DeepSpeed has loaded its own), schedule, scaler, balancer and counters."""
    tree, optimizer, scaler = load_tree(folder), run.context.optimizer, run.context.accelerator.scaler
    check_digest((tree.get("basis") or {}).get("parameters"), trainable(run.context.model), folder)
    if tree["optimizer"] is not None:
        try:
            optimizer.load_state_dict(placed_moments(optimizer, tree["optimizer"]))
        except (KeyError, IndexError, ValueError, RuntimeError, AttributeError, TypeError) as error:
            kind = type(getattr(optimizer, "optimizer", optimizer)).__name__
            what = f"{folder.name} holds the state of another optimizer than {kind}: {error!r}"
            raise UserError(what, where=str(folder.parent), do=OTHER_RUN) from error
    run.scheduler.load_state_dict(tree["scheduler"])
    if scaler is not None and tree["scaler"] is not None:
        scaler.load_state_dict(tree["scaler"])
    run.balancer.load_state_dict(tree["balancer"])
    run.stopping.load_state_dict(tree["stopping"])
    if run.online is not None:
        run.online.controller.restore(tree["online"])
    if run.gradient_step is not None:
        run.gradient_step.load_state_dict(tree["gradients"])
    run.bad_steps.update(tree["bad_steps"])


def load_random_state(accelerator: Accelerator, folder: Path, *, say: Callable[[str], None]) -> None:
    """This rank's random state. With another number of ranks there is none: dropout then differs, nothing else does."""
    states, rank = load_tree(folder)["random"], accelerator.process_index
    if len(states) != accelerator.num_processes:
        say(
            f"the checkpoint is of {len(states)} processes, this run has {accelerator.num_processes}: "
            "dropout draws other numbers from here on"
        )
        return
    restore_random_state(states[rank])


def _words(engine: dict[str, Any]) -> str:
    count = engine["processes"]
    return f"{engine['name']} with {count} process{'es' if count > 1 else ''}"
