"""The tiny model, tasks and recipe of tests/train; and one way to launch ranks."""

import json
import os
import subprocess
from pathlib import Path

import pytest
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.utils.launch import prepare_deepspeed_cmd_env, prepare_multi_gpu_env

from tests.training.conftest import model_folder, recipe, task_files  # noqa: F401  (fixtures)
from tests.warm_python.fixture import cold_proofs, warm_proofs  # noqa: F401  (fixtures)

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="session")
def launch(warm_python):
    """launch(config, *program) -> output of `accelerate launch` with a file of recipes/accelerate, on CPUs.

    The launcher, the ranks and the processes that prove their exports have their imports done.
    """

    def start(config, *program):
        command = [warm_python, "-m", "accelerate.commands.launch"]
        command += ["--config_file", str(ROOT / "recipes" / "accelerate" / config), "--main_process_port", "0"]
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": ""}
        done = subprocess.run(
            [*command, *map(str, program)], env=environment, capture_output=True, text=True, timeout=1800
        )
        assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
        return done.stdout + done.stderr

    return start


def launched_environment(config):
    """What `accelerate launch --config_file` gives its ranks beside torchrun's own variables."""
    arguments = launch_command_parser().parse_args(["--config_file", str(config), "-m", "mtft", "train", "r.yaml"])
    arguments, *_ = _validate_launch_command(arguments)
    arguments.deepspeed_fields_from_accelerate_config = ""  # what launch_command sets on its way
    whole = prepare_deepspeed_cmd_env(arguments)[1] if arguments.use_deepspeed else prepare_multi_gpu_env(arguments)
    return {name: value for name, value in whole.items() if name.startswith(("ACCELERATE_", "FSDP_"))}


@pytest.fixture(scope="session")
def launch_in_turn(launch):
    """launch_in_turn(engines, folder): one launch that trains FOLDER/ENGINE/*.yaml under one engine after the other.

    Each engine has a launch of its own in test_engines.py; elsewhere it would be twenty CPU-seconds, mostly of imports.
    """

    def start(engines, folder):
        configs = ROOT / "recipes" / "accelerate"
        variables = {name: launched_environment(configs / f"{name}.yaml") for name in engines}
        (folder / "engines.json").write_text(json.dumps(variables))
        return launch("ddp.yaml", "tests/distributed/in_turn.py", folder)

    return start
