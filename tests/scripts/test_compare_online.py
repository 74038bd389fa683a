"""Every variant of scripts/compare_online.py is a recipe that trains, and its table pairs runs by seed."""

from pathlib import Path

import pytest

from mtft.distributed.launch import LaunchConfig
from mtft.recipe.compatibility import check_compatibility
from mtft.recipe.load import load_recipe
from scripts import compare_online

RECIPE = Path(__file__).parents[2] / "recipes" / "code-tasks.yaml"


@pytest.mark.parametrize("every", [4, 8])
def test_variants_are_recipes(tmp_path, every):
    (tmp_path / "scores").mkdir()
    found = compare_online.variants(every, tmp_path)
    for name, changes in found.items():
        recipe = load_recipe(RECIPE, ["sweep=null", "merge=null", "fuse=null", "train.steps=80", *changes])
        assert check_compatibility(recipe, stage="train", engine=LaunchConfig()) == []
        online = recipe.mixture.online
        assert name.split(",")[0] == (online.name if online else recipe.mixture.shares)


def test_table(capsys):
    def entry(mean):
        return {
            "mean": mean,
            "worst": 3.0,
            "shares": {"a": 0.5, "b": 0.5},
            "last": {"a": 0.1, "b": 0.9},
            "seconds": 1.0,
        }

    found = {"uniform": [entry(2.0), entry(4.0)], "bandit": [entry(1.9), entry(3.7)]}
    compare_online.print_table(found)
    _, uniform, bandit = capsys.readouterr().out.splitlines()
    assert uniform.split()[:4] == ["uniform", "3.0000", "3.0000", "+0.0000"]
    # gaps -0.1 and -0.3: mean -0.2, standard error 0.1, t(0.95, 1) = 6.3138
    assert bandit.split()[:7] == ["bandit", "2.8000", "3.0000", "-0.2000", "-0.8314", "to", "+0.4314"]
    assert bandit.endswith("0.50 0.50 | 0.10 0.90")
