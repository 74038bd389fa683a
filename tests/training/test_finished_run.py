"""A finished run is that only while its base, its rows, its held-out rows and its adapter are what they were."""

import json
import shutil
from pathlib import Path

import pytest
from safetensors.numpy import load_file, save_file

from mtft.common.errors import UserError
from mtft.recipe.schema.recipe import Recipe
from mtft.training.run_training import train
from tests.training.test_run_training import recipe_in


@pytest.fixture(scope="module")
def finished(recipe, tmp_path_factory):
    """A world of its own with a finished run in it: model, rows, recipe."""
    home = tmp_path_factory.mktemp("finished")
    shutil.copytree(recipe["model"]["path"], home / "model")
    tasks = []
    for task in recipe["tasks"]:
        files = {which: home / f"{task['name']}.{which}.jsonl" for which in ("data", "eval_data")}
        for which, path in files.items():
            shutil.copy(task[which], path)
        tasks.append({**task, **{which: str(path) for which, path in files.items()}, "limit": 10})
    changed = {**recipe, "model": {**recipe["model"], "path": str(home / "model")}, "tasks": tasks}
    run = recipe_in(changed, home / "run")
    train(run, quiet=True, prove=False)
    return run


@pytest.fixture
def kept(finished):
    """The same, put back after the test."""
    home = Path(finished.output.dir).parent
    shutil.copytree(home, home.with_name("aside"))
    yield finished
    shutil.rmtree(home)
    home.with_name("aside").rename(home)


def test_nothing_changed(kept: Recipe):
    assert train(kept, quiet=True, prove=False).steps == 8


def other_base(home: Path) -> None:
    weights = load_file(home / "model" / "model.safetensors")
    save_file({name: value * 2 for name, value in weights.items()}, home / "model" / "model.safetensors")


def other_rows(home: Path, which: str) -> None:
    path = home / f"copy.{which}.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    path.write_text("".join(json.dumps({**row, "response": "blue"}) + "\n" for row in rows))


CHANGES = {
    "another base": (other_base, "other weights of the base"),
    "other rows": (lambda home: other_rows(home, "data"), "data of copy"),
    "other held-out rows": (lambda home: other_rows(home, "eval_data"), "held-out rows of copy"),
    "no adapter": (lambda home: shutil.rmtree(home / "run" / "adapter"), "adapter/ is gone"),
    "cut scores": (
        lambda home: (home / "run" / "scores" / "copy.jsonl").write_text(
            (home / "run" / "scores" / "copy.jsonl").read_text().splitlines(keepends=True)[0]
        ),
        "damaged scores: 1 examples",
    ),
}


@pytest.mark.parametrize("change", CHANGES)
def test_what_has_changed_is_named(kept: Recipe, change: str):
    make, told = CHANGES[change]
    make(Path(kept.output.dir).parent)
    with pytest.raises(UserError, match=told):
        train(kept, quiet=True, prove=False)
