"""micro_batch_tokens: auto finds a size, keeps it, and leaves the gradient alone."""

import gc
import json
import signal
import weakref

import pytest
import torch

from mtft.common.errors import UserError
from mtft.common.state_tree import random_state
from mtft.data.planning import make_plan
from mtft.recipe.schema.recipe import Recipe
from mtft.training.build_model import load_for_training
from mtft.training.memory import auto_micro_batch
from mtft.training.memory.auto_micro_batch import (
    fastest,
    find_micro_batch,
    full_batch,
    largest,
    largest_on_gpu,
    sizes,
    with_auto_micro_batch,
)
from mtft.training.run_training import train
from mtft.training.training_inputs import read_training_inputs
from tests.slow import slow
from tests.training.test_run_training import kill_at_step, picture, recipe_in, run
from tests.training.test_trainer import first_gradients


def test_search():
    assert sizes(64, 500) == [64, 128, 256, 512]
    assert sizes(64, 10) == [64]
    assert sizes(100, 350) == [100, 200, 400]
    assert largest([1, 2, 4, 8], lambda size: size <= 5) == 4
    assert largest([8, 16], lambda size: False) == 8
    asked = []

    def seconds(size):
        asked.append(size)
        return size * {1: 2.0, 2: 1.0, 4: 0.97, 8: 0.99, 16: 0.98, 32: 0.1}[size]

    assert fastest([1, 2, 4, 8, 16, 32], lambda size: True, seconds) == 2  # within 5 % of the best
    assert asked == [1, 2, 4, 8, 16]  # two in a row without a gain
    assert fastest([1, 2, 4], lambda size: size < 2, seconds) == 1


CPU = torch.device("cpu")
REFUSALS = [
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 7.50 GiB."),
    torch.AcceleratorError("CUDA error: out of memory"),
    RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
    RuntimeError("cuDNN error: CUDNN_STATUS_INTERNAL_ERROR_DEVICE_ALLOCATION_FAILED"),
]


@pytest.fixture(autouse=True)
def _nothing_old_to_collect():
    """Every trial collects garbage, which takes a second in a process that has run many tests."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


class Device:
    """torch.cuda's accounts of a device that holds `room` bytes: a trial of n tokens takes n."""

    def __init__(self, monkeypatch, room):
        self.room, self.peak = room, 0
        for name, answer in {
            "empty_cache": lambda: None,
            "reset_peak_memory_stats": lambda _: None,
            "max_memory_reserved": lambda _: self.peak,
            "mem_get_info": lambda _: (0, room),
        }.items():
            monkeypatch.setattr(torch.cuda, name, answer)

    def trial(self, refusal, kept):
        def layer(activations):
            saved = activations * 2
            kept["alive"].append(weakref.ref(saved))
            raise refusal

        def try_size(size):
            activations = torch.zeros(size)
            kept["alive"].append(weakref.ref(activations))
            self.peak = size
            if size > self.room:
                try:
                    layer(activations)
                except RuntimeError as error:
                    kept["log"].append(error)  # as a tool that logs errors would
                    raise

        return try_size


@pytest.mark.parametrize("refusal", REFUSALS, ids=str)
def test_every_refusal_of_memory_is_a_size_that_does_not_fit(monkeypatch, refusal):
    kept = {"alive": [], "log": []}
    device = Device(monkeypatch, room=10)
    assert largest_on_gpu([2, 4, 8, 16, 32], device.trial(refusal, kept), 1, CPU) == 8
    assert [one() for one in kept["alive"]] == [None] * 5  # also where the error is kept
    assert largest_on_gpu([8, 16], device.trial(refusal, kept), 6, CPU) == 8  # tight, but it ran
    assert largest_on_gpu([16, 32], device.trial(refusal, kept), 0, CPU) == 0


def test_another_failure_of_a_trial_ends_the_search(monkeypatch):
    device = Device(monkeypatch, room=10)
    fault = RuntimeError("CUDA error: an illegal memory access was encountered")
    with pytest.raises(RuntimeError, match="illegal"):
        largest_on_gpu([8, 16], device.trial(fault, {"alive": [], "log": []}), 0, CPU)


def test_one_row_that_does_not_fit_is_refused_before_the_first_step(recipe, monkeypatch):
    whole = Recipe.model_validate({**recipe, "train": {**recipe["train"], "micro_batch_tokens": "auto"}})
    monkeypatch.setattr(auto_micro_batch, "find_micro_batch", lambda *_: 0)
    with pytest.raises(UserError, match="out of memory on a micro-batch of one row"):
        with_auto_micro_batch(whole, None, None, before=None, say=print)


def test_the_batch_that_is_tried_is_full():
    batch = full_batch(200, 64, 0.5, 50)
    assert batch.input_ids_BT.shape == (3, 64)
    assert batch.packed
    assert int((batch.labels_BT >= 0).sum()) == 3 * 32
    assert batch.position_ids_BT[0].tolist() == [*range(32), *range(32)]


@pytest.mark.parametrize("checkpointing", [False, True], ids=["plain", "checkpointed before"])
def test_finding_leaves_no_trace(recipe, checkpointing):
    train_section = {**recipe["train"], "micro_batch_tokens": "auto", "gradient_checkpointing": True}
    whole = Recipe.model_validate({**recipe, "train": train_section})
    inputs, model = read_training_inputs(whole), load_for_training(whole)
    if checkpointing:
        model.activation_checkpointing_enable()
    torch.manual_seed(5)
    before = random_state()["torch"]
    size = find_micro_batch(whole, model, inputs)
    assert torch.equal(random_state()["torch"], before)
    assert all(parameter.grad is None for parameter in model.parameters())
    assert model.is_activation_checkpointing == checkpointing
    assert size % 64 == 0
    assert 64 <= size <= 320
    make_plan(whole, inputs.stores)


@pytest.mark.parametrize("packing", [True, *slow(False)])
def test_the_gradient_is_that_of_any_size(recipe, tmp_path, packing):
    found = [first_gradients(recipe, tmp_path, micro_batch_tokens=size, packing=packing) for size in sizes(64, 320)]
    scale = max(float(value.abs().max()) for value in found[0].values())
    for other in found[1:]:
        for name, value in found[0].items():
            torch.testing.assert_close(other[name], value, rtol=1e-4, atol=1e-6 * scale)


def test_a_run_notes_the_size_and_keeps_it(recipe, tmp_path, monkeypatch):
    def auto(folder):
        return recipe_in(recipe, folder, train={"micro_batch_tokens": "auto"}, lora={"r": 4})

    train(auto(tmp_path / "run"), quiet=True, prove=False)
    size = json.loads((tmp_path / "run" / "env.json").read_text())["micro_batch_tokens"]
    assert size in sizes(64, 320)

    def other(pick):
        from mtft.training.memory import auto_micro_batch

        auto_micro_batch.find_micro_batch = lambda *_: pick

    assert run(auto(tmp_path / "broken"), lambda: (other(size), kill_at_step(5)())) == -signal.SIGKILL
    assert run(auto(tmp_path / "broken"), lambda: other(64 if size != 64 else 128)) == 0
    assert json.loads((tmp_path / "broken" / "env.json").read_text())["micro_batch_tokens"] == size
    assert picture(tmp_path / "broken") == picture(tmp_path / "run")
