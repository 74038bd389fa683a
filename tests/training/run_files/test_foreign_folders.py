"""A folder that is no run's loses nothing to a run: neither its recipe.yaml, nor rows that --fresh would move away."""

import os
import shutil

import pytest

from mtft.common.errors import UserError
from mtft.pipeline.run_stages import run_recipe
from mtft.recipe.schema.recipe import Recipe
from mtft.training.checkpoint.checkpoint_files import atomic_checkpoint_dir, prune_checkpoints
from mtft.training.run_files.run_dir import move_aside, sole_run
from mtft.training.run_training import train
from tests.training.test_run_training import recipe_in


@pytest.mark.parametrize("name", ["recipe.yaml", "metrics.jsonl", "result.json", "env.json", "adapter", "proof"])
def test_somebodys_own_files_are_not_replaced(recipe, tmp_path, name):
    mine = tmp_path / "project" / name
    mine.parent.mkdir()
    mine.write_text("name: mine  # with my comments\n")
    for fresh in (True, False):
        with pytest.raises(UserError), sole_run(recipe_in(recipe, mine.parent), fresh=fresh):
            pass
    assert mine.read_text() == "name: mine  # with my comments\n"
    assert os.listdir(mine.parent) == [name]


def test_a_folder_with_other_files_is_fine(recipe, tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "log.txt").write_text("of `mtft train ... | tee`")
    with sole_run(recipe_in(recipe, tmp_path / "run"), fresh=False):
        pass


def test_fresh_moves_no_rows_away(recipe, task_files, tmp_path):
    rows = tmp_path / "project" / "rows.jsonl"
    rows.parent.mkdir()
    shutil.copy(next(iter(task_files.values()))[0], rows)
    tasks = [{**recipe["tasks"][0], "data": str(rows)}, *recipe["tasks"][1:]]
    changed = recipe_in({**recipe, "tasks": tasks}, tmp_path / "project")
    with pytest.raises(UserError, match="holds, an input"):
        train(changed, fresh=True, quiet=True)
    assert os.listdir(rows.parent) == ["rows.jsonl"]


def test_run_replaces_no_recipe_of_somebody_else(recipe, tmp_path):
    (tmp_path / "recipe.yaml").write_text("name: mine  # with my comments\n")
    changed = Recipe.model_validate({**recipe, "output": {"dir": str(tmp_path)}})
    with pytest.raises(UserError, match=r"damaged, or not a recipe(.|\n)*recipe\.yaml"):
        run_recipe(changed)
    assert os.listdir(tmp_path) == ["recipe.yaml"]


@pytest.mark.parametrize("place", ["/", "n" * 300, "/".join(["deep" * 20] * 60), "gone/../run"])
def test_places_that_are_none_are_refused_at_once(recipe, place):
    with pytest.raises(UserError) as caught:
        train(recipe_in(recipe, place), quiet=True)
    assert "output.dir" in (caught.value.where or "")


def test_checkpoints_of_another_program_neither_count_nor_go(tmp_path):
    for step in (500, 1000):
        (tmp_path / f"checkpoint-{step}").mkdir()
    for step in (1, 2, 3):
        with atomic_checkpoint_dir(tmp_path / f"checkpoint-{step}") as folder:
            (folder / "state.json").write_text("{}")
    prune_checkpoints(tmp_path, 2)
    assert sorted(path.name for path in tmp_path.iterdir()) == [f"checkpoint-{step}" for step in (1000, 2, 3, 500)]


def test_fresh_behind_a_link_moves_what_it_points_at(tmp_path):
    (tmp_path / "real").mkdir()
    (tmp_path / "real" / "old").touch()
    (tmp_path / "link").symlink_to("real")
    move_aside(tmp_path / "link")
    assert (tmp_path / "link").is_symlink()
    assert not os.listdir(tmp_path / "link")
    assert os.listdir(tmp_path / "real.old-1") == ["old"]
