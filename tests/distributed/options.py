"""Runs on every rank of test_options.py: python options.py FOLDER. Trains every recipe of the folder."""

import sys
from pathlib import Path

from mtft.recipe.load import load_recipe
from mtft.training.run_training import train

if __name__ == "__main__":
    for path in sorted(Path(sys.argv[1]).glob("*.yaml")):
        train(load_recipe(path), quiet=True, prove=False)
