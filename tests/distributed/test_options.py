"""The options of training on two ranks: what one process trains, exports, drops and stops, to rounding."""

import json

import pytest
import torch
from safetensors.torch import load_file

from mtft.recipe.load import dump_recipe
from mtft.recipe.schema.recipe import Recipe
from mtft.training.run_training import train
from tests.distributed.conftest import ROOT

pytestmark = pytest.mark.slow

RUNS = {
    "decides": {
        "train": {
            "neftune": 5.0,
            "eval_every": 1,
            "task_patience": 1,
            "patience": 4,
            "steps": 8,
            "learning_rate": 2e-2,
        },
        "lora": {"r": 4, "plus": 4.0},
        "output": {"export": "best"},
    },
    "free": {"train": {"optimizer": "schedule_free", "schedule": "constant", "eval_every": 3}},
    "auto": {"train": {"micro_batch_tokens": "auto"}, "lora": {"r": 4, "freeze_a": True}},
    "mezo": {"train": {"mezo": 1e-2, "optimizer": "sgd", "max_grad_norm": 0}, "lora": {"r": 4, "init": "orthogonal"}},
}


def write(recipe, folder, name):
    changes = RUNS[name]
    whole = {**recipe, "lora": changes.get("lora", {"r": 4}), "seed": 2}
    whole["train"] = {**recipe["train"], "warmup": 0, "learning_rate": 1e-3, **changes["train"]}
    whole["output"] = {"dir": str(folder / name), **changes.get("output", {})}
    made = Recipe.model_validate(whole)
    (folder / f"{name}.yaml").write_text(dump_recipe(made))
    return made


def test_two_ranks_are_one_process(recipe, tmp_path, launch):
    (tmp_path / "one").mkdir()
    (tmp_path / "two").mkdir()
    for name in RUNS:
        train(write(recipe, tmp_path / "one", name), quiet=True, prove=False)
        write(recipe, tmp_path / "two", name)
    launch("ddp.yaml", ROOT / "tests" / "distributed" / "options.py", tmp_path / "two")
    for name in RUNS:
        results = [json.loads((tmp_path / n / name / "result.json").read_text()) for n in ("one", "two")]
        for key in ("steps", "exported_step", "ended", "dropped_tasks"):
            assert results[0][key] == results[1][key], (name, key)
        one, two = (load_file(tmp_path / n / name / "adapter" / "adapter_model.safetensors") for n in ("one", "two"))
        scale = max(float(value.abs().max()) for value in one.values())
        for key, value in one.items():
            # AdamW magnifies rounding where a gradient is next to nothing (test_engines.py)
            torch.testing.assert_close(two[key], value, rtol=0, atol=2e-4 * scale, msg=f"{name}: {key}")
    assert results[0]["steps"] == 8
    size = json.loads((tmp_path / "two" / "auto" / "env.json").read_text())["micro_batch_tokens"]
    assert size in (64, 128, 192)
