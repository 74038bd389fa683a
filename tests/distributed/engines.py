"""Runs on every rank of test_engines.py: python engines.py FOLDER. All that a launch of an engine is asked for.

FOLDER holds the recipes; what each run must have come to is checked by the test. An error on any rank ends the launch.
"""

import os
import signal
import sys
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from mtft.common.errors import UserError
from mtft.distributed.launch import check_ranks, engine
from mtft.distributed.stop_signal import StopSignal
from mtft.recipe.load import load_recipe
from mtft.training.run_training import train
from mtft.training.trainer import MultiTaskTrainer


@contextmanager
def changed(name, wrap):
    """MultiTaskTrainer with one method wrapped: wrap(method as it is) -> method."""
    before = getattr(MultiTaskTrainer, name)
    setattr(MultiTaskTrainer, name, wrap(before))
    try:
        yield
    finally:
        setattr(MultiTaskTrainer, name, before)


def rank():
    return dist.get_rank() if dist.is_initialized() else 0


def stopping(step):
    """SIGTERM on the last rank in this step."""

    def wrap(before):
        def training_step(self, *args, **kwargs):
            if self.state.global_step + 1 == step and rank() == self.accelerator.num_processes - 1:
                os.kill(os.getpid(), signal.SIGTERM)
            return before(self, *args, **kwargs)

        return training_step

    return changed("training_step", wrap)


def poisoned(what, step):
    """On the last rank, a loss (or a gradient only) that is not a number in this step."""

    def wrap(before):
        def training_step(self, *args, **kwargs):
            objective = self.objective
            self.objective = Poisoned(objective, self.accelerator, self.state.global_step + 1 == step)
            try:
                return before(self, *args, **kwargs)
            finally:
                self.objective = objective

        return training_step

    class Poisoned:
        def __init__(self, objective, accelerator, now):
            self.objective, self.now = objective, now and rank() == accelerator.num_processes - 1

        def __getattr__(self, name):
            return getattr(self.objective, name)

        def nll(self, model, batch):
            nll_BT = self.objective.nll(model, batch)
            if self.now and torch.is_grad_enabled():
                # The square root of 0 is 0, and its gradient 0/0.
                return nll_BT * float("nan") if what == "loss" else nll_BT + (nll_BT * 0).sqrt()
            return nll_BT

    return changed("training_step", wrap)


def stopped(recipe, step):
    with stopping(step), pytest.raises(SystemExit) as stop:
        train(recipe, prove=False, quiet=True)
    assert stop.value.code == 0
    assert (Path(recipe.output.dir) / f"checkpoint-{step}").is_dir()


def tear(checkpoint):
    """Cuts the largest file of a checkpoint, as a disk that lied about syncing would."""
    if rank() == 0:
        victim = max((path for path in checkpoint.rglob("*") if path.is_file()), key=lambda path: path.stat().st_size)
        victim.write_bytes(victim.read_bytes()[:-3])
    dist.barrier()


def main(folder):
    recipes = {path.stem: load_recipe(path) for path in sorted(Path(folder).glob("*.yaml"))}
    deepspeed_files = engine() == "deepspeed"
    for name in ("adamw", "fast", "sgd", "weighted", "dropout"):
        train(recipes[name], prove=name == "adamw", quiet=True)
    for name in sorted({"full", "bf16", "bf16-full", "nf4"} & recipes.keys()):
        train(recipes[name], quiet=True)
    for name in sorted({"bf16-sgd", "bf16-empty", "bf16-nf4"} & recipes.keys()):
        train(recipes[name], prove=False, quiet=True)

    for name in sorted({"broken", "nf4-broken"} & recipes.keys()):
        stopped(recipes[name], 4)
        train(recipes[name], prove=False, quiet=True)
    stopped(recipes["torn"], 5)
    tear(Path(recipes["torn"].output.dir) / "checkpoint-5")
    train(recipes["torn"], prove=False, quiet=True)
    stopped(recipes["left"], 4)
    if deepspeed_files:
        with pytest.raises(UserError, match="DeepSpeed's files can't be taken over"):
            train(recipes["taken"], prove=False, quiet=True)
    else:
        train(recipes["taken"], prove=False, quiet=True)

    for name in ("loss", "gradient"):
        with poisoned(name, 4):
            train(recipes[name], prove=False, quiet=True)

    with StopSignal() as stop:
        assert not stop.agreed(torch.device("cpu"))
        if rank() == 1:
            os.kill(os.getpid(), signal.SIGTERM)
        assert stop.agreed(torch.device("cpu"))
        assert stop.seen == signal.SIGTERM

    class Alone:
        num_processes = 1

    with pytest.raises(UserError, match="would train alone"):
        check_ranks(Alone())


if __name__ == "__main__":
    # DeepSpeed's first use of it would compile it, for 90 CPU-seconds.
    if engine() == "deepspeed":
        import deepspeed

        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    main(*sys.argv[1:])
