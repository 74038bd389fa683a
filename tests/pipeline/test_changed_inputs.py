"""`mtft run` on another model or other held-out rows at the same paths: refused; --fresh compares like with like."""

import json
import shutil
from pathlib import Path

import pytest
from safetensors.numpy import load_file, save_file

from mtft.common.errors import UserError
from mtft.pipeline.run_stages import run_recipe
from mtft.recipe.schema.recipe import Recipe

pytestmark = pytest.mark.slow


@pytest.fixture
def world(whole_recipe, tmp_path):
    """A finished run without sweep and fusion, with a model and rows of its own."""
    shutil.copytree(whole_recipe["model"]["path"], tmp_path / "model")
    tasks = []
    for task in whole_recipe["tasks"][:2]:
        files = {which: tmp_path / f"{task['name']}.{which}.jsonl" for which in ("data", "eval_data")}
        for which, path in files.items():
            shutil.copy(task[which], path)
        tasks.append({"name": task["name"], **{which: str(path) for which, path in files.items()}})
    content = {key: whole_recipe[key] for key in ("name", "lora", "train", "merge")}
    content |= {"model": {"path": str(tmp_path / "model"), "dtype": "fp32"}, "tasks": tasks}
    recipe = Recipe.model_validate({**content, "output": {"dir": str(tmp_path / "run")}})
    run_recipe(recipe)
    return recipe, tmp_path


def losses(home: Path) -> dict[str, float]:
    results = json.loads((home / "run" / "results.json").read_text())
    return {stage: scores["copy"]["loss"] for stage, scores in results.items()}


def test_another_model_at_the_same_path(world):
    recipe, home = world
    before = losses(home)
    weights = load_file(home / "model" / "model.safetensors")
    save_file({name: value * 1.5 for name, value in weights.items()}, home / "model" / "model.safetensors")
    with pytest.raises(UserError, match="other weights of the base"):
        run_recipe(recipe)
    run_recipe(recipe, fresh=True)
    after = losses(home)
    assert all(after[stage] != before[stage] for stage in before)


def test_other_held_out_rows(world):
    recipe, home = world
    before = losses(home)
    rows = [json.loads(line) for line in (home / "copy.eval_data.jsonl").read_text().splitlines()]
    changed = [{**row, "response": "blue"} for row in rows[: len(rows) // 2]]
    (home / "copy.eval_data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in changed))
    with pytest.raises(UserError, match="held-out rows of copy"):
        run_recipe(recipe)
    run_recipe(recipe, fresh=True)
    after = losses(home)
    assert all(after[stage] != before[stage] for stage in before)


def test_the_same_again_runs_nothing(world, capsys):
    recipe, home = world
    before = losses(home)
    capsys.readouterr()
    run_recipe(recipe)
    assert losses(home) == before
    assert "train: " not in capsys.readouterr().err


def test_scores_that_lost_lines_are_no_scores(world):
    recipe, home = world
    scores = home / "run" / "merge" / "scores" / "copy.jsonl"
    scores.write_text(scores.read_text().splitlines(keepends=True)[0])
    with pytest.raises(UserError, match="the scores of copy are of other examples"):
        run_recipe(recipe)
