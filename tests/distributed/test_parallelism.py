"""accelerate's parallelism_config: what it can be, on four gloo ranks, and what is refused before a model is loaded."""

import pytest
import yaml
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.utils.launch import prepare_multi_gpu_env

from mtft.common.errors import UserError
from mtft.distributed.launch import LaunchConfig
from mtft.recipe.compatibility import check_compatibility
from mtft.recipe.schema.recipe import Recipe
from mtft.training.run_training import train
from tests.distributed.conftest import ROOT
from tests.distributed.test_engines import distance, lines, weights, write_recipes


def config_file(folder, *, ranks=2, **sizes):
    """fsdp2.yaml with a parallelism_config; accelerate takes one for FSDP2 alone."""
    content = yaml.safe_load((ROOT / "recipes" / "accelerate" / "fsdp2.yaml").read_text())
    content["parallelism_config"] = {f"parallelism_config_{axis}_size": size for axis, size in sizes.items()}
    path = folder / "parallel.yaml"
    path.write_text(yaml.safe_dump({**content, "num_processes": ranks}))
    return path


def environment(path):
    """What `accelerate launch --config_file` gives each rank."""
    arguments = launch_command_parser().parse_args(["--config_file", str(path), "-m", "mtft"])
    arguments, *_ = _validate_launch_command(arguments)
    return {**prepare_multi_gpu_env(arguments), "WORLD_SIZE": str(arguments.num_processes)}


@pytest.mark.parametrize("axis", ["cp", "sp", "tp"])
def test_rows_and_layers_in_parts_are_refused_by_name(recipe, tmp_path, axis):
    launch = LaunchConfig.from_environment(environment(config_file(tmp_path, **{axis: 2})))
    for stage in ("check", "train", "run"):
        with pytest.raises(UserError, match="its own") as caught:
            check_compatibility(Recipe.model_validate(recipe), stage=stage, engine=launch)
        assert f"parallelism_config_{axis}_size" in caught.value.where


@pytest.mark.slow
def test_context_parallelism_ends_before_the_model_is_loaded(recipe, tmp_path, launch):
    """It would train: accelerate takes the mask away from packed rows, so examples read each other."""
    write_recipes(recipe, tmp_path, ["sgd"], steps=1)
    config = config_file(tmp_path, cp=2)
    with pytest.raises(AssertionError, match="parallelism_config_cp_size"):
        launch(config, "-m", "mtft", "train", tmp_path / "sgd.yaml")
    assert not (tmp_path / "sgd").exists()


@pytest.mark.slow
def test_shards_with_replicas_train_what_one_process_trains(recipe, tmp_path, launch):
    """Two copies, each in two parts."""
    for name in ("alone", "together"):
        whole = write_recipes(recipe, tmp_path / name, ["sgd"], steps=3, eval_every=3, batch_tokens=800)["sgd"]
        if name == "alone":
            train(whole, quiet=True, prove=False)
    config = config_file(tmp_path, ranks=4, dp_replicate=2, dp_shard=2)
    launch(config, "-m", "mtft", "train", tmp_path / "together" / "sgd.yaml")
    found = [[line["loss"] for line in lines(tmp_path / name / "sgd")] for name in ("alone", "together")]
    assert found[1] == pytest.approx(found[0], rel=1e-6)
    assert distance(*(weights(tmp_path / name / "sgd") for name in ("alone", "together"))) <= 1e-6
