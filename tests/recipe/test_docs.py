"""docs/recipe.md is what the schema says, and every example recipe is a valid one."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from mtft.distributed.launch import LaunchConfig
from mtft.recipe.compatibility import check_compatibility
from mtft.recipe.load import load_recipe

ROOT = Path(__file__).parents[2]


def test_the_reference_is_up_to_date():
    command = [sys.executable, str(ROOT / "scripts" / "make_recipe_docs.py"), "--check"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("recipe", sorted((ROOT / "recipes").glob("*.yaml")), ids=lambda path: path.name)
def test_every_shipped_recipe_is_valid(recipe):
    loaded = load_recipe(recipe, files=False)
    check_compatibility(loaded, stage="check", engine=LaunchConfig())
    check_compatibility(loaded, stage="run", engine=LaunchConfig())
