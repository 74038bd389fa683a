"""Lagged surgery follows the direction of direct surgery where nothing moves: frozen weights, all rows in each step."""

import pytest
import torch

from mtft.recipe.schema.recipe import Recipe
from mtft.training.training_inputs import read_training_inputs
from tests.slow import slow
from tests.training.step.test_task_gradients import LORA, Gradients, lines, trainer_for

FROZEN = {"learning_rate": 1e-30, "max_grad_norm": 0, "weight_decay": 0.0}


def whole_set(recipe):
    """Settings under which a step holds every row of every task once."""
    stores = read_training_inputs(Recipe.model_validate({**recipe, "lora": LORA})).stores
    tokens = sum(int(store.lengths.sum()) for store in stores)
    return {"mixture": {"shares": "natural"}, "train": {**FROZEN, "batch_tokens": tokens, "micro_batch_tokens": 2048}}


def steps_of(recipe, folder, loss, steps):
    seen, set_up = Gradients(), whole_set(recipe)
    trainer = trainer_for(recipe, folder, steps=steps, loss=loss, callback=seen, **set_up)
    examples = [trainer.steps.content(step).examples_K.tolist() for step in range(steps)]
    assert examples == [[60, 60, 60]] * steps
    trainer.train()
    return [torch.cat([value.flatten() for value in step.values()]).double() for step in seen.steps], trainer


@pytest.mark.parametrize(
    ("aggregator", "normalise"),
    [("upgrad", "task_token"), *slow(("dualproj", "token"), ("nash_mtl", "sample"), ("cagrad", "task_sample"))],
)
def test_lagged_equals_direct_when_frozen(recipe, tmp_path, aggregator, normalise):
    tasks = [{**task, "weight": weight} for task, weight in zip(recipe["tasks"], (1.0, 3.0, 0.5), strict=True)]
    recipe = {**recipe, "tasks": tasks}
    direct = {"normalise": normalise, "gradients": {"aggregator": aggregator}}
    (expected,), _ = steps_of(recipe, tmp_path / "direct", direct, 1)
    lagged = {"normalise": normalise, "balancer": {"name": "lagged", "aggregator": aggregator, "gram_every": 2}}
    found, trainer = steps_of(recipe, tmp_path / "lagged", lagged, 5)
    assert trainer.balancer.figures() == {"measures": 2, "clamped": 0}
    assert [line["balancer"]["measures"] for line in lines(tmp_path / "lagged")] == [0, 1, 1, 2, 2]
    for gradient in found[2:]:  # measured at steps 2 and 4, so the weights are there from step 3 on
        assert torch.cosine_similarity(gradient, expected, dim=0) > 1 - 1e-6
    if aggregator == "nash_mtl":
        assert torch.cosine_similarity(found[0], expected, dim=0) < 1 - 1e-4  # and the plain gradient is another one


def test_gradnorm_is_wired(recipe, tmp_path):
    """The weights move at measured steps and only there."""
    loss = {"balancer": {"name": "gradnorm", "gram_every": 2}}
    trainer = trainer_for(recipe, tmp_path, steps=5, loss=loss)
    weights = []

    def note(step, step_loss_K=None, plain=trainer.balancer.weights):
        weights.append(plain(step, step_loss_K))
        return weights[-1]

    trainer.balancer.weights = note
    trainer.train()
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[1], weights[2])
    assert torch.equal(weights[2], weights[3])
    assert not torch.equal(weights[3], weights[4])
