"""The recipe of one task alone means the same rows in the same prompts as in the joint one."""

import pytest

from mtft.data.store.token_store import open_stores
from mtft.pipeline.stages.derived_recipes import single_task_recipe
from mtft.recipe.load import dump_recipe, load_recipe
from mtft.recipe.schema.recipe import Recipe
from tests.data.toy_examples import TEMPLATES, tokenizer, write_jsonl


@pytest.mark.parametrize("shots", [None, {"n": 2}, {"n": 2, "from": "a"}, {"n": 2, "from": "b"}])
def test_a_task_alone_keeps_its_demonstrations(tmp_path, shots):
    tasks = []
    for name in "ab":
        rows = [{"prompt": f"{name} asks {i}", "response": f"{name} says"} for i in range(12)]
        path = str(write_jsonl(tmp_path / f"{name}.jsonl", rows))
        tasks.append({"name": name, "data": path, "eval_data": path, "template": ["{{ prompt }}", "Q {{ prompt }}"]})
    tasks[0] |= {"shots": shots, "auxiliary": True, "system": "be brief"}
    recipe = Recipe.model_validate({
        "name": "two", "model": {"path": "m"}, "tasks": tasks, "train": {"steps": 9, "max_length": 300},
        "output": {"dir": str(tmp_path / "run")},
    })  # fmt: skip
    alone = single_task_recipe(recipe, "a", 0.5, tmp_path / "single")
    assert alone.counted_tasks == ("a",), "what is alone counts"
    made = tokenizer(TEMPLATES["chatml"])
    for which in ("train", "eval"):
        joint, single = (open_stores(one, made, which, cache_dir=tmp_path / "c")[0] for one in (recipe, alone))
        assert joint.fingerprint == single.fingerprint
    written = tmp_path / "alone.yaml"
    written.write_text(dump_recipe(alone), encoding="utf-8")
    assert load_recipe(written) == alone
