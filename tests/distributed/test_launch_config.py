"""How a run was launched, read from the environment."""

import json

import pytest

from mtft.common.errors import UserError
from mtft.distributed.launch import LaunchConfig, engine, world_size


def test_engine_from_the_environment_of_accelerate(tmp_path):
    assert LaunchConfig.from_environment({}) == LaunchConfig(0, 0, 1)
    fsdp = {"WORLD_SIZE": "4", "ACCELERATE_USE_FSDP": "true"}
    assert LaunchConfig.from_environment(fsdp) == LaunchConfig(0, 1, 4)
    assert LaunchConfig.from_environment({**fsdp, "FSDP_VERSION": "2"}) == LaunchConfig(0, 2, 4)
    zero = {"ACCELERATE_USE_DEEPSPEED": "true", "WORLD_SIZE": "2"}
    assert LaunchConfig.from_environment({**zero, "ACCELERATE_DEEPSPEED_ZERO_STAGE": "3"}) == LaunchConfig(
        zero=3, ranks=2
    )
    config = tmp_path / "zero.json"
    config.write_text(json.dumps({"zero_optimization": {"stage": 3}}))
    assert LaunchConfig.from_environment({**zero, "ACCELERATE_DEEPSPEED_CONFIG_FILE": str(config)}) == LaunchConfig(
        zero=3, ranks=2
    )


@pytest.mark.parametrize("value, on", [("true", True), ("yes", True), ("1", True), ("no", False), ("", False)])
def test_switches_by_the_rule_of_accelerate(monkeypatch, value, on):
    monkeypatch.setenv("ACCELERATE_USE_FSDP", value)
    monkeypatch.setenv("WORLD_SIZE", "")  # as some schedulers leave it
    assert LaunchConfig.from_environment() == LaunchConfig(fsdp=int(on), ranks=1)
    assert (engine(), world_size()) == ("fsdp" if on else "ddp", 1)


def test_nonsense_in_the_environment_is_an_error_for_people():
    for name, value in (("WORLD_SIZE", "two"), ("ACCELERATE_USE_FSDP", "perhaps")):
        with pytest.raises(UserError, match=value) as caught:
            LaunchConfig.from_environment({name: value})
        assert name in caught.value.where
