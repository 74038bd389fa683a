"""Runs on every rank of test_ddp.py: python ranks.py RECIPE.yaml FOLDER. An error on any rank ends the launch."""

import os
import signal
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import save_file
from transformers.trainer_callback import TrainerCallback

from mtft.data.planning import make_plan
from mtft.errors import UserError
from mtft.recipe.load import load_recipe
from mtft.train.arguments import training_arguments
from mtft.train.assemble import build_trainer, read_inputs
from mtft.train.log import RunLog
from mtft.train.model import load_for_training
from mtft.train.ranks import check_ranks
from mtft.train.signals import StopSignal


class Gradients(TrainerCallback):
    def on_pre_optimizer_step(self, args, state, control, **kwargs):
        self.found = {name: p.grad.clone() for name, p in kwargs["model"].named_parameters() if p.requires_grad}


def gradients(recipe, folder):
    """Gradients of the recipe's only step, and the trainer."""
    inputs = read_inputs(recipe)
    plan = make_plan(recipe, inputs.stores)
    args = training_arguments(recipe, folder, steps=plan.steps, evaluates=False, saves=False)
    log = RunLog(None, steps=plan.steps, quiet=True)
    trainer = build_trainer(recipe, inputs, plan, load_for_training(recipe), args, log=log)
    seen = Gradients()
    trainer.add_callback(seen)
    trainer.train()
    return seen.found, trainer


def main(recipe_file, folder):
    recipe = load_recipe(recipe_file)
    found, trainer = gradients(recipe, Path(folder))
    rank = dist.get_rank()
    batches = trainer.steps[0]
    tasks = {int(task) for batch in batches for task in batch.task_ids_BT.unique() if task >= 0}
    every = [None, None]
    dist.all_gather_object(every, (len(batches), tasks))
    assert every[0][0] == every[1][0], "unequal numbers of micro-batches"
    assert every[0][1] != every[1][1], "no rank lacks a task: the test would show nothing"
    if rank == 0:
        save_file(found, Path(folder) / "gradients.safetensors")

    with StopSignal() as stop:
        assert not stop.agreed(torch.device("cpu"))
        if rank == 1:
            os.kill(os.getpid(), signal.SIGTERM)
        assert stop.agreed(torch.device("cpu"))
        assert stop.seen == signal.SIGTERM

    class Alone:
        num_processes = 1

    with pytest.raises(UserError, match="would train alone"):
        check_ranks(Alone())


if __name__ == "__main__":
    main(*sys.argv[1:])
