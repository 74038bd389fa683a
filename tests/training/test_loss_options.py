"""The recipe's loss options reach the objective: sample weights, label smoothing, z-loss, OrthoReg."""

import pytest
import torch

from mtft.losses.orthogonality_penalty import adapter_orthogonality
from mtft.losses.sample_weights import SampleWeights
from mtft.losses.task_reduction import coefficients, step_counts
from mtft.losses.token_nll import token_nll
from mtft.recipe.schema.recipe import Recipe
from mtft.training.build_model import load_for_training
from tests.training.conftest import lines
from tests.training.test_trainer import Gradients, trainer_for

ONES = torch.ones(3, dtype=torch.float64)


def first_step(recipe, tmp_path, **loss):
    """Gradients and loss of the first step, and its micro-batches."""
    train = {**recipe["train"], "steps": 1, "max_grad_norm": 0}
    trainer, *_ = trainer_for(recipe, tmp_path, train=train, lora=None, loss=loss)
    seen = Gradients()
    trainer.add_callback(seen)
    trainer.train()
    return seen.found, lines(tmp_path)[0]["loss"], trainer.steps[0]


@pytest.mark.parametrize(
    ("loss", "token_options"),
    [
        ({"label_smoothing": 0.1, "z_loss": 0.01}, {"label_smoothing": 0.1, "z_loss": 0.01}),
        ({"sample_weights": {"rule": "focal", "burn_in": 0}}, {}),
        ({"sample_weights": {"rule": "extremes", "burn_in": 0, "sharpness": 0.2, "group": "all"}}, {}),
    ],
)
def test_equals_the_objective_by_hand(recipe, tmp_path, loss, token_options):
    found, reported, batches = first_step(recipe, tmp_path, **loss)
    model = load_for_training(Recipe.model_validate({**recipe, "lora": None})).train()
    counts, plain, total = step_counts(batches, 3), 0.0, torch.zeros(())
    for batch in batches:
        nll_BT = token_nll(model, batch, **token_options)
        c_BT = coefficients(batch, counts, ONES, "task_token")
        plain += float((c_BT * nll_BT).sum().detach())
        if "sample_weights" in loss:
            c_BT = c_BT * SampleWeights(**loss["sample_weights"]).factors(1, nll_BT, batch, 3)
        total = total + (c_BT * nll_BT).sum()
    total.backward()
    assert reported == pytest.approx(plain, rel=1e-5)
    expected = {name: p.grad for name, p in model.named_parameters() if p.requires_grad}
    for name, value in found.items():
        torch.testing.assert_close(value, expected[name], rtol=1e-4, atol=1e-6)


def test_fused_path_trains_and_evaluates_as_gather(recipe, tmp_path):
    losses, scores = {}, {}
    for path in ("gather", "fused"):
        (tmp_path / path).mkdir()
        trainer, *_ = trainer_for(recipe, tmp_path / path, loss={"path": path}, train={**recipe["train"], "steps": 3})
        trainer.train()
        losses[path] = [line["loss"] for line in lines(tmp_path / path)]
        scores[path] = trainer.evaluate()
    assert losses["fused"] == pytest.approx(losses["gather"], rel=1e-5)
    assert scores["fused"] == pytest.approx(scores["gather"], rel=1e-4)


def test_orthogonal_keeps_the_columns_of_the_update_apart(recipe, tmp_path):
    ends = []
    for weight in (0.0, 10.0):
        trainer, *_ = trainer_for(recipe, tmp_path, loss={"orthogonal": weight})
        trainer.train()
        ends.append(float(adapter_orthogonality(trainer.model).detach()))
    assert 0 < ends[1] < 0.7 * ends[0]
