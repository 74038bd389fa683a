"""Micro-batches of one task, steps of one task, a mixture that changes: two ranks train what one process trains."""

import json

import pytest

from mtft.recipe.load import dump_recipe
from mtft.recipe.schema.recipe import Recipe
from mtft.training.run_training import train

pytestmark = pytest.mark.slow
RAMP = {
    "schedule": [
        {"at": 0, "shares": {"copy": 0.8, "twice": 0.2, "shout": 0}},
        {"at": 1, "shares": {"copy": 0.1, "twice": 0.1, "shout": 0.8}},
    ]
}


@pytest.mark.parametrize("style", ["unmixed", "alternating"])
def test_two_ranks_play_what_one_plays(recipe, launch, tmp_path, style):
    """With one task a micro-batch or a step, ranks often lack a task that another has (R7)."""
    found = {}
    for ranks in (1, 2):
        changes = {"mixture": {"shares": RAMP}, "lora": {"r": 4, "alpha": 8, "dropout": 0.0}}
        settings = {**recipe["train"], "batch_style": style, "learning_rate": 1e-3, "micro_batch_tokens": 64}
        whole = Recipe.model_validate(
            {**recipe, **changes, "train": settings, "output": {"dir": str(tmp_path / str(ranks))}}
        )
        if ranks == 1:
            train(whole, quiet=True, prove=False)
        else:
            (tmp_path / "recipe.yaml").write_text(dump_recipe(whole))
            launch("ddp.yaml", "--num_processes", "2", "-m", "mtft", "train", tmp_path / "recipe.yaml")
        found[ranks] = [json.loads(line) for line in (tmp_path / str(ranks) / "metrics.jsonl").read_text().splitlines()]
    assert len(found[1]) == len(found[2]) == recipe["train"]["steps"]
    for one, two in zip(found[1], found[2]):
        assert two["loss"] == pytest.approx(one["loss"], abs=1e-6)
        for name, task in one["tasks"].items():
            assert two["tasks"][name]["examples"] == task["examples"]
            assert two["tasks"][name]["loss"] == pytest.approx(task["loss"], abs=1e-6)
    if style == "alternating":
        assert {sum(task["examples"] > 0 for task in line["tasks"].values()) for line in found[2]} == {1}
