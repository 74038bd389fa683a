"""Every precision of a CPU runs under every engine that is there without a GPU; fp16, which none has, is refused."""

import json

import pytest

from mtft.common.errors import UserError
from mtft.recipe.load import dump_recipe
from mtft.recipe.schema.recipe import Recipe
from mtft.training.run_training import train
from tests.distributed.conftest import ROOT
from tests.distributed.test_engines import lines, write_recipes

FP16 = {"dtype": "fp16"}
LAUNCHES = {
    "ddp": {},
    "fsdp2": {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"},
    "zero1": {"ACCELERATE_USE_DEEPSPEED": "true", "ACCELERATE_DEEPSPEED_ZERO_STAGE": "1"},
}


@pytest.mark.slow
def test_bf16_under_deepspeed_without_a_gpu(recipe, launch, tmp_path):
    whole = {name: write_recipes(recipe, tmp_path / name, ["bf16"], steps=4)["bf16"] for name in ("one", "two")}
    launch("zero2.yaml", "tests/distributed/measured.py", tmp_path / "two" / "bf16.yaml")
    train(whole["one"], quiet=True, prove=False)
    expected, found = (lines(tmp_path / name / "bf16") for name in ("one", "two"))
    assert len(found) == 4
    assert [line["loss"] for line in found] == pytest.approx([line["loss"] for line in expected], rel=1e-2)


@pytest.mark.parametrize("engine", LAUNCHES)
def test_fp16_without_a_gpu_is_refused_before_the_ranks_meet(recipe, tmp_path, monkeypatch, engine):
    """Nobody answers at this address: a rank that went to meet the others would wait."""
    for name, value in {**LAUNCHES[engine], "WORLD_SIZE": "2", "RANK": "0", "TORCH_EXTENSIONS_DIR": tmp_path}.items():
        monkeypatch.setenv(name, str(value))
    asked = {**recipe, "model": {**recipe["model"], **FP16}, "output": {"dir": str(tmp_path / "run")}}
    with pytest.raises(UserError, match="fp16 needs a GPU") as caught:
        train(Recipe.model_validate(asked), quiet=True)
    assert caught.value.where == "model.dtype"


@pytest.mark.slow
def test_fp16_under_deepspeed_skips_overflows(recipe, launch, tmp_path):
    """Its fp16 mode, which is for GPUs, made to run here: the first loss scales are too large, and the run goes on."""
    folder = tmp_path / "fp16"
    whole = write_recipes(recipe, folder, ["adamw"])["adamw"]
    halved = whole.model_copy(update={"model": whole.model.model_copy(update=FP16)})
    (folder / "adamw.yaml").write_text(dump_recipe(halved))
    config = json.loads((ROOT / "recipes" / "deepspeed" / "zero1.json").read_text())
    config["fp16"] |= {"initial_scale_power": 20, "hysteresis": 1}
    (folder / "zero1.json").write_text(json.dumps(config))
    launched = (ROOT / "recipes" / "accelerate" / "zero3-offload.yaml").read_text()
    (folder / "zero1.yml").write_text(launched.replace("recipes/deepspeed/zero3-offload.json", f"{folder}/zero1.json"))
    launch(folder / "zero1.yml", "tests/distributed/in_fp16.py", folder / "adamw.yaml")
    skipped = [line.get("skipped") for line in lines(folder / "adamw")]
    assert len(skipped) == 8
    assert skipped[0] == "non-finite"
    assert set(skipped) == {"non-finite", None}
    result = json.loads((folder / "adamw" / "result.json").read_text())
    assert result["skipped_steps"] == {"non-finite": skipped.count("non-finite"), "empty": 0}
    rates = [line["learning_rate"] for line in lines(folder / "adamw")]
    (tmp_path / "fp32").mkdir()
    train(write_recipes(recipe, tmp_path / "fp32", ["adamw"])["adamw"], quiet=True, prove=False)
    expected = lines(tmp_path / "fp32" / "adamw")
    assert rates == [line["learning_rate"] for line in expected]  # the schedule goes on
    assert [line["loss"] for line in lines(folder / "adamw")] == pytest.approx(
        [line["loss"] for line in expected], rel=1e-2
    )
