"""Runs on every rank: python in_turn.py FOLDER. Trains FOLDER/ENGINE/*.yaml under one engine after the other.

FOLDER/engines.json: {ENGINE: the variables that its launch gives the ranks} (conftest.launch_in_turn).
"""

import json
import os
import sys
from pathlib import Path

from accelerate.state import AcceleratorState

from mtft.recipe.load import load_recipe
from mtft.training.run_training import train


def main(folder):
    given = json.loads((folder / "engines.json").read_text())
    for engine, variables in given.items():
        for name in [name for name in os.environ if name.startswith(("ACCELERATE_", "FSDP_"))]:
            del os.environ[name]
        os.environ.update(variables)
        if "ACCELERATE_USE_DEEPSPEED" in variables:
            import deepspeed

            # Its first use would compile it, for 90 CPU-seconds.
            deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
        for path in sorted((folder / engine).glob("*.yaml")):
            train(load_recipe(path), quiet=True, prove=False)
        state = AcceleratorState()  # what the last run was, and not only asked for
        stage = f"zero{state.deepspeed_plugin.zero_stage}" if state.distributed_type == "DEEPSPEED" else None
        assert (stage or {"FSDP": "fsdp2", "MULTI_CPU": "ddp"}[state.distributed_type]) == engine


if __name__ == "__main__":
    main(Path(sys.argv[1]))
