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


def test_ranks_that_share_a_row_or_a_layer(tmp_path):
    """DeepSpeed's are in its JSON, all others in accelerate's environment, where they count if it is told to look."""
    sizes = {"WORLD_SIZE": "8", "PARALLELISM_CONFIG_CP_SIZE": "2", "PARALLELISM_CONFIG_TP_SIZE": "4"}
    assert LaunchConfig.from_environment(sizes) == LaunchConfig(ranks=8)
    asked = {**sizes, "ACCELERATE_USE_PARALLELISM_CONFIG": "true"}
    assert LaunchConfig.from_environment(asked) == LaunchConfig(ranks=8, sequence_ranks=2, tensor_ranks=4)
    config = tmp_path / "zero.json"
    zero = {"ACCELERATE_USE_DEEPSPEED": "true", "ACCELERATE_DEEPSPEED_CONFIG_FILE": str(config)}
    for section, expected in (
        ({"sequence_parallel_size": 2}, LaunchConfig(zero=3, sequence_ranks=2)),
        ({"tensor_parallel": {"autotp_size": 2}}, LaunchConfig(zero=3, tensor_ranks=2)),
        ({"tensor_parallel": {"autotp_size": 0}}, LaunchConfig(zero=3)),
    ):
        config.write_text(json.dumps({"zero_optimization": {"stage": 3}, **section}))
        assert LaunchConfig.from_environment(zero) == expected
    ulysses = {"ACCELERATE_USE_PARALLELISM_CONFIG": "true", "PARALLELISM_CONFIG_SP_SIZE": "2"}
    assert LaunchConfig.from_environment({**zero, **ulysses}).sequence_ranks == 2


def test_sizes_of_data_parallelism_that_fsdp_can_not_shard_over():
    fsdp = {"WORLD_SIZE": "4", "ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"}
    fsdp |= {"ACCELERATE_USE_PARALLELISM_CONFIG": "true"}

    def launched(replicas, shards):
        sizes = {"DP_REPLICATE": replicas, "DP_SHARD": shards}
        more = {f"PARALLELISM_CONFIG_{axis}_SIZE": str(size) for axis, size in sizes.items()}
        return LaunchConfig.from_environment(fsdp | more)

    assert launched(1, 4) == launched(2, 2) == LaunchConfig(fsdp=2, ranks=4)
    for sizes in ((4, 1), (1, 1), (2, 4)):
        with pytest.raises(UserError, match="dp_replicate_size"):
            launched(*sizes)


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
