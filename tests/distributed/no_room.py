"""Runs on every rank of test_no_room.py: python no_room.py RECIPE.yaml ... What loads the export is out of memory.

The recipe's name says how: `class`, torch's own error, or `text`, as other allocators say it.
"""

import subprocess
import sys

from mtft.recipe.load import load_recipe
from mtft.training.export import proof
from mtft.training.run_training import train

ERRORS = {
    "class": "torch.OutOfMemoryError('planted')",
    "text": "RuntimeError('DefaultCPUAllocator: can\\'t allocate memory')",
}
FRESH = """
import runpy, sys, torch
from transformers import AutoModelForCausalLM
def load(*_, **__):
    raise {error}
AutoModelForCausalLM.from_pretrained = load
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def popen(error):
    def start(command, **options):
        return subprocess.Popen([command[0], "-c", FRESH.format(error=error), *command[1:]], **options)

    return start


if __name__ == "__main__":
    for file in sys.argv[1:]:
        recipe = load_recipe(file)
        others = {"PIPE": subprocess.PIPE, "TimeoutExpired": subprocess.TimeoutExpired}
        proof.subprocess = type("subprocess", (), {"Popen": staticmethod(popen(ERRORS[recipe.name])), **others})
        train(recipe, quiet=True)
