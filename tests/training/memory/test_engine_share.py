"""What a rank holds under each engine, by hand."""

import json

import pytest

from mtft.distributed.launch import LaunchConfig
from mtft.training.memory.engine_share import engine_share

WHOLE = {"weights": 1000, "uncut": 0, "gradients": 400, "states": 800}


def of(launch, **changes):
    share = engine_share(launch, **{**WHOLE, **changes})
    return share.weights, share.training, share.gradients


def test_by_hand():
    assert of(LaunchConfig()) == (1000, 1200, 400)
    assert of(LaunchConfig(ranks=4)) == (1000, 1600, 400)  # and the buckets
    assert of(LaunchConfig(fsdp=2, ranks=4)) == (250, 300, 100)
    # an fp32 copy of what is trained, as large as its gradients, and a bucket of 10 numbers
    options = {"ranks": 4, "reduce_bucket": 10}
    assert of(LaunchConfig(zero=1, **options)) == (1000, (400 + 800) // 4 + 400 + 40, 400)
    assert of(LaunchConfig(zero=2, **options)) == (1000, (400 + 800 + 400) // 4 + 40, 100)
    assert of(LaunchConfig(zero=2, **options), accumulates=True)[2] == 0
    assert of(LaunchConfig(zero=3, **options)) == (250, (400 + 800 + 400) // 4 + 40, 0)


def test_scales_of_packed_weights_stay_whole():
    assert of(LaunchConfig(fsdp=2, ranks=4), uncut=200)[0] == 800 // 4 + 200


@pytest.mark.parametrize("settings, numbers", [({}, 500_000_000), ({"reduce_bucket_size": 1e6}, 1_000_000)])
@pytest.mark.parametrize("overlap", [False, True])
def test_buckets_of_the_launchers_configuration(tmp_path, settings, numbers, overlap):
    for stage in (2, 3):
        zero = {"stage": stage, "overlap_comm": overlap, **settings}
        config = tmp_path / "zero.json"
        config.write_text(json.dumps({"zero_optimization": zero}))
        environment = {"ACCELERATE_USE_DEEPSPEED": "true", "ACCELERATE_DEEPSPEED_CONFIG_FILE": str(config)}
        found = LaunchConfig.from_environment(environment).reduce_bucket
        assert found == numbers * (2 if overlap and stage == 2 else 1)  # one to fill while the other is summed


def test_what_zero_3_keeps_is_of_the_launchers_configuration(tmp_path):
    config = tmp_path / "zero.json"
    sizes = {"prefetch_bucket_size": 1e6, "max_live_parameters": 2e6, "max_reuse_distance": "auto"}
    zero = {"stage": 3, **{f"stage3_{key}": size for key, size in sizes.items()}}
    config.write_text(json.dumps({"zero_optimization": zero}))
    environment = {"ACCELERATE_USE_DEEPSPEED": "true", "ACCELERATE_DEEPSPEED_CONFIG_FILE": str(config)}
    found = LaunchConfig.from_environment(environment)
    assert (found.prefetch_bucket, found.live_parameters) == (1_000_000, 2_000_000)
    assert found.reuse_distance == LaunchConfig().reuse_distance == 1_000_000_000
