"""`mtft run` of a recipe with a curriculum plays the curriculum, not its mean."""

import numpy as np

from mtft.pipeline.stages.mix import space
from mtft.pipeline.stages.train import RunChoice, joint_labels, planned_runs
from mtft.recipe.schema.mixture import ScheduleShares
from mtft.recipe.schema.recipe import Recipe


class Lengths:
    def __init__(self, task, rows):
        self.task, self.lengths = task, np.full(rows, 10)


def test_the_joint_run_plays_the_schedule(tmp_path):
    stops = [{"at": 0, "shares": {"a": 1, "b": 0}}, {"at": 1, "shares": {"a": 0, "b": 1}}]  # its mean is uniform
    recipe = Recipe.model_validate(
        {
            "name": "toy",
            "model": {"path": "nowhere"},
            "tasks": [{"name": name, "data": "x"} for name in "ab"],
            "mixture": {"shares": {"schedule": stops}},
            "merge": {},
            "fuse": {"strong": {"path": "elsewhere"}},
            "train": {"steps": 50, "batch_tokens": 512},
            "output": {"dir": str(tmp_path)},
        }
    )
    stores = [Lengths("a", 60), Lengths("b", 20)]
    choice = RunChoice(space(recipe, stores).current)
    runs = planned_runs(recipe, choice, stores)
    assert list(runs) == ["joint", "baseline", "single-a", "single-b", "strong"]
    assert isinstance(runs["joint"].mixture.shares, ScheduleShares)
    assert isinstance(runs["strong"].mixture.shares, ScheduleShares)
    assert runs["baseline"].mixture.shares == {"a": 0.5, "b": 0.5}
    assert [runs[f"single-{name}"].train.steps for name in "ab"] == [25, 25]
    assert joint_labels(recipe, choice, stores) == {"joint": "joint as asked", "baseline": "joint uniform"}


def test_the_joint_run_changes_online_and_the_others_do_not(tmp_path):
    recipe = Recipe.model_validate(
        {
            "name": "toy",
            "model": {"path": "nowhere"},
            "tasks": [{"name": name, "data": "x"} for name in "ab"],
            "mixture": {"shares": "uniform", "online": {"name": "bandit", "every": 5}},
            "merge": {},
            "train": {"steps": 50, "batch_tokens": 512},
            "output": {"dir": str(tmp_path)},
        }
    )
    stores = [Lengths("a", 60), Lengths("b", 20)]
    choice = RunChoice(space(recipe, stores).current)
    runs = planned_runs(recipe, choice, stores)
    assert list(runs) == ["joint", "baseline", "single-a", "single-b"]
    assert runs["joint"].mixture == recipe.mixture
    assert runs["baseline"].mixture.shares == {"a": 0.5, "b": 0.5}
    assert [name for name, found in runs.items() if found.mixture.online is not None] == ["joint"]
    assert joint_labels(recipe, choice, stores) == {"joint": "joint as asked", "baseline": "joint uniform"}
