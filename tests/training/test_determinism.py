"""`train.deterministic`: the switches are on while it trains and as before afterwards; what can't be is named."""

import os

import pytest
import torch
from transformers import TrainingArguments
from transformers.trainer_callback import TrainerCallback

from mtft.common.errors import UserError
from mtft.training.determinism import deterministic_kernels
from mtft.training.transformers_arguments import read_transformers_arguments
from tests.training.conftest import lines
from tests.training.test_trainer import trainer_for


def switches():
    return (
        torch.are_deterministic_algorithms_enabled(),
        torch.is_deterministic_algorithms_warn_only_enabled(),
        torch.backends.cudnn.deterministic,
        torch.utils.deterministic.fill_uninitialized_memory,
    )


class Switches(TrainerCallback):
    def on_pre_optimizer_step(self, args, state, control, **kwargs):
        self.seen = switches()


def test_they_are_on_while_it_trains_and_the_run_is_the_same_on_the_cpu(recipe, tmp_path, monkeypatch):
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG", raising=False)
    before, logged = switches(), {}
    for asked in (False, True):
        (tmp_path / str(asked)).mkdir()
        train = {**recipe["train"], "steps": 2, "deterministic": asked}
        trainer, *_ = trainer_for(recipe, tmp_path / str(asked), train=train)
        assert os.environ.get("CUBLAS_WORKSPACE_CONFIG") == (":4096:8" if asked else None)  # before a model is loaded
        trainer.add_callback(watch := Switches())
        trainer.train()
        assert watch.seen == ((True, False, True, False) if asked else before)
        assert switches() == before
        logged[asked] = [(line["loss"], line["grad_norm"]) for line in lines(tmp_path / str(asked))]
    assert logged[True] == logged[False]


def test_an_operation_that_has_no_such_kernel_is_named():
    before = switches()
    no_kernel = pytest.raises(UserError, match="put_ does not have a deterministic implementation")
    with no_kernel as caught, deterministic_kernels(True):
        torch.zeros(3).put_(torch.tensor([0, 0]), torch.ones(2))
    assert "train.deterministic" in str(caught.value)
    assert switches() == before
    with pytest.raises(RuntimeError, match="another"), deterministic_kernels(True):
        raise RuntimeError("another")
    with deterministic_kernels(False):
        assert switches() == before
        torch.zeros(3).put_(torch.tensor([0, 0]), torch.ones(2))


def test_transformers_own_setting_is_taken(tmp_path):
    args = TrainingArguments(output_dir=str(tmp_path), max_steps=2, use_cpu=True)
    assert read_transformers_arguments(args)[0]["train"]["deterministic"] is False
    args.full_determinism = True
    assert read_transformers_arguments(args)[0]["train"]["deterministic"] is True
