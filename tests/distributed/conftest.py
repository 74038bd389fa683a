"""The tiny model, tasks and recipe of tests/train; and one way to launch ranks."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.training.conftest import model_folder, recipe, task_files  # noqa: F401  (fixtures)

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="session")
def launch():
    """launch(config, *program) -> output of `accelerate launch` with a file of recipes/accelerate, on CPUs."""

    def start(config, *program):
        command = [sys.executable, "-m", "accelerate.commands.launch"]
        command += ["--config_file", str(ROOT / "recipes" / "accelerate" / config), "--main_process_port", "0"]
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": ""}
        done = subprocess.run(
            [*command, *map(str, program)], env=environment, capture_output=True, text=True, timeout=1800
        )
        assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
        return done.stdout + done.stderr

    return start
