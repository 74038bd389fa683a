"""MeZO: the slope along a random direction, exactly that of the step's objective, whatever its split."""

import signal

import pytest
import torch
from transformers.trainer_callback import TrainerCallback

from mtft.distributed.sharding import trainable
from mtft.experimental.mezo import directions
from tests.training.test_run_training import kill_at_step, picture, recipe_in, run
from tests.training.test_trainer import lines, trainer_for

PLAIN = {"optimizer": "sgd", "max_grad_norm": 0, "warmup": 0, "schedule": "constant"}


class FirstStep(TrainerCallback):
    """Gradients, and weights before the optimizer moved them, of the first step."""

    def on_pre_optimizer_step(self, args, state, control, model=None, **_):
        if state.global_step == 0:
            self.weights = {name: p.detach().clone() for name, p in trainable(model).items()}
            self.gradients = {name: p.grad.clone() for name, p in trainable(model).items()}


def first(recipe, folder, lora, **train):
    changes = {"train": {**recipe["train"], **PLAIN, "steps": 1, **train}, "lora": lora}
    trainer, *_ = trainer_for(recipe, folder, **changes)
    start = {name: p.detach().clone() for name, p in trainable(trainer.model).items()}
    seen = FirstStep()
    trainer.add_callback(seen)
    trainer.train()
    assert all(torch.equal(seen.weights[name], value) for name, value in start.items())  # back, bit for bit
    return seen.gradients


def test_is_the_slope_of_the_objective(recipe, tmp_path):
    """g = (gradient . z) z for a small step, with the gradient by backward passes over another split."""
    lora = {"r": 4, "init": "orthogonal"}  # both factors have a gradient
    gradient = first(recipe, tmp_path / "backward", lora, micro_batch_tokens=64)
    found = first(recipe, tmp_path / "mezo", lora, mezo=1e-3)
    z = dict(zip(gradient, directions(list(gradient.values()), 17, 1), strict=True))
    slope = sum(float((gradient[name] * z[name]).sum()) for name in z)
    for name, value in found.items():
        torch.testing.assert_close(value, slope * z[name], rtol=0.02, atol=1e-6)


def test_the_split_does_not_matter(recipe, tmp_path):
    lora = {"r": 4, "init": "orthogonal"}
    one, many = (first(recipe, tmp_path / str(n), lora, mezo=1e-2, micro_batch_tokens=n) for n in (64, 2048))
    for name, value in one.items():
        torch.testing.assert_close(many[name], value, rtol=1e-3, atol=1e-6)


def test_directions_are_normal_and_of_the_step():
    parameters = [torch.zeros(300, 100), torch.zeros(50)]
    one = list(directions(parameters, 3, 1))
    assert float(one[0].mean()) == pytest.approx(0, abs=0.02)
    assert float(one[0].std()) == pytest.approx(1, abs=0.02)
    assert torch.equal(next(directions(parameters, 3, 1)), one[0])
    assert not torch.equal(next(directions(parameters, 3, 2)), one[0])
    assert not torch.equal(next(directions(parameters, 4, 1)), one[0])


@pytest.mark.slow
def test_learns_and_a_broken_run_goes_on_exactly(recipe, tmp_path):
    asked = {**PLAIN, "mezo": 1e-2, "learning_rate": 2e-3, "steps": 40}
    lora = {"r": 2, "init": "orthogonal", "dropout": 0.1}
    assert run(recipe_in(recipe, tmp_path / "run", train=asked, lora=lora)) == 0
    found = [line["loss"] for line in lines(tmp_path / "run")]
    assert sum(found[-5:]) < sum(found[:5])
    assert run(recipe_in(recipe, tmp_path / "broken", train=asked, lora=lora), kill_at_step(20)) == -signal.SIGKILL
    assert run(recipe_in(recipe, tmp_path / "broken", train=asked, lora=lora)) == 0
    assert picture(tmp_path / "broken") == picture(tmp_path / "run")
