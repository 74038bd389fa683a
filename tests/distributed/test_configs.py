"""Every launcher configuration that we ship is one that accelerate and DeepSpeed read, and means what its name says."""

import json
from pathlib import Path

import pytest
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.utils import DistributedType

from mtft.distributed.launch import LaunchConfig
from tests.distributed.conftest import launched_environment

ROOT = Path(__file__).parents[2]
ACCELERATE = sorted((ROOT / "recipes" / "accelerate").glob("*.yaml"))
DEEPSPEED = sorted((ROOT / "recipes" / "deepspeed").glob("*.json"))
KINDS = {
    "one": (DistributedType.NO, LaunchConfig(ranks=1)),
    "ddp": (DistributedType.MULTI_GPU, LaunchConfig(ranks=2)),
    "multi-node": (DistributedType.MULTI_GPU, LaunchConfig(ranks=2)),
    "fsdp2": (DistributedType.FSDP, LaunchConfig(fsdp=2, ranks=2)),
    "zero1": (DistributedType.DEEPSPEED, LaunchConfig(zero=1, ranks=2)),
    "zero2": (DistributedType.DEEPSPEED, LaunchConfig(zero=2, ranks=2)),
    "zero3": (DistributedType.DEEPSPEED, LaunchConfig(zero=3, ranks=2)),
    "zero3-offload": (DistributedType.DEEPSPEED, LaunchConfig(zero=3, ranks=2)),
}


def test_no_file_without_a_case():
    assert {path.stem for path in ACCELERATE} == KINDS.keys()
    assert {path.stem for path in DEEPSPEED} == {"zero1", "zero2", "zero3", "zero3-offload"}


@pytest.mark.parametrize("path", ACCELERATE, ids=lambda path: path.stem)
def test_accelerate_reads_it(path, monkeypatch):
    monkeypatch.chdir(ROOT)  # zero3-offload.yaml names its JSON from here
    kind, engine = KINDS[path.stem]
    config = load_config_from_file(str(path))  # refuses unknown keys
    assert config.distributed_type == kind
    # The text above the settings gives the command; it must name this file.
    assert f"--config_file recipes/accelerate/{path.name}" in path.read_text()
    arguments = launch_command_parser().parse_args(["--config_file", str(path), "-m", "mtft", "train", "r.yaml"])
    arguments, *_ = _validate_launch_command(arguments)
    assert arguments.mixed_precision == "no"  # the recipe decides
    environment = {} if kind == DistributedType.NO else launched_environment(path)
    ranks = {"WORLD_SIZE": str(arguments.num_processes)}  # torchrun's own part
    assert LaunchConfig.from_environment({**environment, **ranks}) == engine


@pytest.mark.parametrize("path", DEEPSPEED, ids=lambda path: path.stem)
def test_deepspeed_reads_it(path):
    from deepspeed.runtime.config import DeepSpeedConfig

    content = json.loads(path.read_text())
    # What "auto" stands for is filled in from the recipe by transformers; DeepSpeed itself wants numbers.
    assert content["gradient_clipping"] == "auto"  # left out, accelerate would clip at 1.0 whatever the recipe says
    sizes = {"train_batch_size": 1, "train_micro_batch_size_per_gpu": 1, "gradient_clipping": 0.5}
    found = DeepSpeedConfig({**content, **sizes, "bf16": {"enabled": False}, "fp16": {"enabled": False}})
    assert found.zero_optimization_stage == int(path.stem[4])
    assert found.gradient_accumulation_steps == 1  # an item of our loader is the whole step
    offloads = found.zero_config.offload_param is not None
    assert offloads == path.stem.endswith("-offload")


def test_json_and_yaml_of_a_stage_agree():
    """recipes/deepspeed is for launches without accelerate's files: the same stages, the same accumulation."""
    for name in ("zero1", "zero2", "zero3"):
        yaml = load_config_from_file(str(ROOT / "recipes" / "accelerate" / f"{name}.yaml")).deepspeed_config
        content = json.loads((ROOT / "recipes" / "deepspeed" / f"{name}.json").read_text())
        assert yaml["zero_stage"] == content["zero_optimization"]["stage"]
        assert yaml["gradient_accumulation_steps"] == content["gradient_accumulation_steps"] == 1
