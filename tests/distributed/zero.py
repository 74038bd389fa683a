"""Runs on every rank of test_zero.py: python zero.py WHOLE.yaml BROKEN.yaml. The second is stopped and goes on."""

import os
import signal
import sys

import deepspeed
import pytest
import torch.distributed as dist

from mtft.recipe.load import load_recipe
from mtft.train.run import train
from mtft.train.trainer import MultiTaskTrainer

# Its first use would compile it, for 90 CPU-seconds.
deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False


def main(whole, broken):
    train(load_recipe(whole), prove=True)

    step_as_it_is = MultiTaskTrainer.training_step

    def stopping(self, *args, **kwargs):
        if self.state.global_step + 1 == 4 and dist.get_rank() == 1:
            os.kill(os.getpid(), signal.SIGTERM)
        return step_as_it_is(self, *args, **kwargs)

    MultiTaskTrainer.training_step = stopping
    with pytest.raises(SystemExit) as stop:
        train(load_recipe(broken), prove=False)
    assert stop.value.code == 0
    MultiTaskTrainer.training_step = step_as_it_is
    train(load_recipe(broken), prove=False)


if __name__ == "__main__":
    main(*sys.argv[1:])
