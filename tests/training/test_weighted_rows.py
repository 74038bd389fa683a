"""Rows with weights in whole runs: whatever a step does, its split does not matter, and the oracle is written out."""

import json
from pathlib import Path

import pytest
import torch

from mtft.common.errors import UserError
from mtft.losses.token_nll import token_nll
from mtft.recipe.schema.recipe import Recipe
from mtft.training.build_model import load_for_training
from mtft.training.trainer import MultiTaskTrainer
from tests.training.conftest import lines, write_weighted_tasks


@pytest.fixture(scope="module")
def weighted(recipe, tmp_path_factory):
    """The tiny recipe on weighted rows, without what is drawn by row (dropout)."""
    tasks = write_weighted_tasks(tmp_path_factory.mktemp("weighted"))
    train = {**recipe["train"], "steps": 3, "max_length": 128, "batch_tokens": 900, "warmup": 0}
    return {**recipe, "tasks": tasks, "lora": {"r": 4, "alpha": 8}, "train": train}


def trained(recipe, folder, **sections):
    whole = {**recipe, **sections, "output": {"dir": str(folder)}}
    whole["train"] = {**recipe["train"], **sections.get("train", {})}
    trainer = MultiTaskTrainer.from_recipe(Recipe.model_validate(whole))
    trainer.train()
    return trainer, lines(folder)


FLAT = {"aggregator": "cagrad", "flat": {"name": "f_mtl"}}
KINDS = {
    "affinity": {"loss": {"normalise": "token", "gradients": {"every": 1}}},
    "focal": {"loss": {"normalise": "sample", "sample_weights": {"rule": "focal", "burn_in": 0}}},
    "flat": {"loss": {"normalise": "task_sample", "gradients": FLAT}},
    "famo": {"loss": {"balancer": {"name": "famo"}}},
    "mezo": {"train": {"mezo": 1e-2, "optimizer": "sgd", "max_grad_norm": 0}},
}


@pytest.mark.parametrize("kind", KINDS)
def test_the_split_does_not_matter(weighted, tmp_path, kind):
    sections = KINDS[kind]
    found = []
    for name, train in (("one", {"micro_batch_tokens": 2048}), ("many", {"micro_batch_tokens": 128, "packing": False})):
        both = {**sections, "train": {**sections.get("train", {}), **train}}
        found.append(trained(weighted, tmp_path / name, **both)[1])
    for one, many in zip(*found, strict=True):
        rel = 1e-3 if kind == "mezo" else 1e-4  # mezo: a difference of two losses
        assert one["loss"] == pytest.approx(many["loss"], rel=1e-5)
        assert one["grad_norm"] == pytest.approx(many["grad_norm"], rel=rel)
        for task, values in one["tasks"].items():
            for key in ("loss", "weight", "loss_share", "tokens"):
                assert many["tasks"][task][key] == pytest.approx(values[key], rel=1e-4), (task, key)
        if "gradients" in one:
            grams = [torch.tensor(line["gradients"]["gram"]) for line in (one, many)]
            torch.testing.assert_close(*grams, rtol=1e-3, atol=1e-6)


def test_task_gradients_and_losses_are_those_of_the_weighted_means(weighted, tmp_path):
    """Of each task by itself, with autograd: sum r u nll / sum r u over its tokens in the step."""
    trainer, logged = trained(weighted, tmp_path, loss={"gradients": {"every": 1}}, train={"steps": 1})
    model = load_for_training(Recipe.model_validate(weighted)).train()
    parameters = [p for p in model.parameters() if p.requires_grad]
    gradients, losses = [], []
    for k in range(3):
        over, under = torch.zeros(()), 0.0
        for batch in trainer.steps[0]:
            weight_BT = ((batch.labels_BT >= 0) & (batch.task_ids_BT == k)).float()
            for own in (batch.token_weights_BT, batch.row_weights_BT):
                weight_BT = weight_BT if own is None else weight_BT * own
            over, under = over + (weight_BT * token_nll(model, batch)).sum(), under + float(weight_BT.sum())
        gradients.append(torch.cat([g.flatten() for g in torch.autograd.grad(over / under, parameters)]))
        losses.append(float(over.detach() / under))
    J = torch.stack(gradients).double()
    assert [values["loss"] for values in logged[0]["tasks"].values()] == pytest.approx(losses, rel=1e-5)
    found = torch.tensor(logged[0]["gradients"]["gram"], dtype=torch.float64)
    torch.testing.assert_close(found, J @ J.T, rtol=1e-4, atol=1e-6)
    assert any(batch.row_weights_BT is not None and batch.token_weights_BT is not None for batch in trainer.steps[0])


def test_from_objects_with_options_of_tasks(weighted, tmp_path):
    texts = {task["name"]: Path(task["data"]).read_text() for task in weighted["tasks"]}
    rows = {name: list(map(json.loads, text.splitlines())) for name, text in texts.items()}
    options = {name: {"row_weight": "worth", "thinking_weight": 0.25} for name in ("copy", "twice")}
    args = {**weighted["train"], "output_dir": str(tmp_path / "objects"), "seed": 17}
    more = {"shares": weighted["mixture"]["shares"], "args": args, "lora": weighted["lora"]}
    trainer = MultiTaskTrainer.from_datasets(weighted["model"], rows, task_options=options, **more)
    trainer.train()
    tasks = [{key: value for key, value in task.items() if key != "eval_data"} for task in weighted["tasks"]]
    _, expected = trained({**weighted, "tasks": tasks}, tmp_path / "recipe")
    found = lines(tmp_path / "objects")
    assert [line["tasks"] for line in found] == [line["tasks"] for line in expected]
    for bad in ({"sing": {}}, {"copy": {"data": "x"}}, {"copy": {"row_wait": "worth"}}, {"copy": "worth"}):
        with pytest.raises(UserError, match="task_options"):
            MultiTaskTrainer.from_datasets(weighted["model"], rows, task_options=bad, **more)
