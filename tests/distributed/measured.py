"""Runs on every rank of test_surgery.py: python measured.py RECIPE.yaml ... One launch trains them all."""

import sys

import deepspeed

from mtft.recipe.load import load_recipe
from mtft.training.run_training import train

# Its first use would compile it, for 90 CPU-seconds.
deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False

if __name__ == "__main__":
    for recipe in sys.argv[1:]:
        train(load_recipe(recipe), prove=False, quiet=True)
