"""A mixture of experts whose experts are one tensor a layer, on two gloo ranks: trains what one process trains."""

import pytest

from mtft.recipe.load import dump_recipe
from mtft.recipe.schema.recipe import Recipe
from mtft.training.run_training import train
from tests.distributed.test_engines import SGD, distance, lines, weights
from tests.models.tiny_architectures import write_architecture

pytestmark = pytest.mark.slow
ENGINES = ("ddp", "fsdp2", "zero2", "zero3")

LORA = {"experts": {"r": 4, "alpha": 8}, "full": None}  # all-linear adapts experts and routers; full trains them


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return write_architecture(tmp_path_factory.mktemp("base"), "qwen3_moe")


def write_recipes(recipe, base, folder):
    model, settings = {**recipe["model"], "path": str(base)}, {**SGD, "steps": 4, "batch_tokens": 470, "eval_every": 4}
    for name, lora in LORA.items():
        output = {"dir": str(folder / name)}
        values = {**recipe, "model": model, "lora": lora, "train": settings, "output": output}
        (folder / f"{name}.yaml").write_text(dump_recipe(Recipe.model_validate(values)))
        yield Recipe.model_validate(values)


@pytest.fixture(scope="module")
def alone(recipe, base, tmp_path_factory):
    folder = tmp_path_factory.mktemp("alone")
    for whole in write_recipes(recipe, base, folder):
        train(whole, quiet=True, prove=False)
    return folder


@pytest.fixture(scope="module")
def launched(recipe, base, launch_in_turn, tmp_path_factory):
    folder = tmp_path_factory.mktemp("launched")
    for engine in ENGINES:
        (folder / engine).mkdir()
        assert len(list(write_recipes(recipe, base, folder / engine))) == 2
    launch_in_turn(ENGINES, folder)
    return folder


@pytest.mark.parametrize("engine", ENGINES)
def test_equals_one_process(alone, launched, engine):
    adapter = weights(launched / engine / "experts")
    assert any(".experts." in name for name in adapter)
    assert any(".gate." in name for name in adapter)
    for name in LORA:
        losses = [[line["loss"] for line in lines(folder / name)] for folder in (alone, launched / engine)]
        assert losses[1] == pytest.approx(losses[0], rel=1e-6)
        assert distance(weights(alone / name), weights(launched / engine / name)) <= 1e-6
