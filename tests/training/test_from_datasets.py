"""A trainer from Python objects is the trainer of the recipe that names files with the same rows."""

import json
from pathlib import Path

import pytest

from mtft.common.errors import UserError
from mtft.recipe.schema.recipe import Recipe
from mtft.training.trainer import MultiTaskTrainer


def lines_of(run_dir):
    lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    return [(line["loss"], line["grad_norm"], line["tasks"]) for line in lines]


def test_same_losses_as_the_recipe(recipe, task_files, tmp_path):
    args = {**recipe["train"], "max_steps": 4, "output_dir": str(tmp_path / "objects"), "seed": 17}
    args.pop("steps")
    rows = {
        task: [json.loads(line) for line in Path(train).read_text().splitlines()]
        for task, (train, _) in task_files.items()
    }
    trainer = MultiTaskTrainer.from_datasets(
        recipe["model"]["path"], rows, shares=recipe["mixture"]["shares"], args=args, lora=recipe["lora"]
    )
    trainer.train()
    trainer.save_model(str(tmp_path / "saved"))
    assert (tmp_path / "saved" / "adapter_model.safetensors").is_file()
    tasks = [{"name": task, "data": train} for task, (train, _) in task_files.items()]
    train = {**recipe["train"], "steps": 4}
    whole = {**recipe, "tasks": tasks, "train": train, "output": {"dir": str(tmp_path / "files")}}
    MultiTaskTrainer.from_recipe(Recipe.model_validate(whole)).train()
    assert lines_of(tmp_path / "objects") == lines_of(tmp_path / "files")
    assert len(lines_of(tmp_path / "files")) == 4


@pytest.mark.parametrize(
    ("rows", "args", "says"),
    [
        ({}, {"max_steps": 1}, "datasets must be"),
        ({"sql": []}, {"max_steps": 1}, "no rows"),
        ({"sql": ["text"]}, {"max_steps": 1}, "not a dict"),
        ({"sql": [{"prompt": object()}]}, {"max_steps": 1}, "JSON"),
        ({"sql": [{"prompt": "a", "response": "b"}]}, {}, "how long"),
        ({"sql": [{"prompt": "a", "response": "b"}]}, {"max_steps": 1, "learning_rat": 1.0}, "no valid recipe"),
    ],
)
def test_errors_for_people(rows, args, says, tmp_path):
    with pytest.raises(UserError, match=says):
        MultiTaskTrainer.from_datasets("model", rows, args={**args, "output_dir": str(tmp_path)})
