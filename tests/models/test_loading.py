"""What may be loaded, what is refused before anything is read, and what an adapter starts as."""

import json

import pytest
import torch
from pydantic import ValidationError

from mtft.common.errors import UserError
from mtft.models.loading import compute_dtype, load_base, load_tokenizer, model_location, pad_id, resolve_dtype
from mtft.models.lora import add_lora
from mtft.recipe.schema.lora import LoraSection
from mtft.recipe.schema.model import ModelSection
from mtft.recipe.schema.recipe import Recipe
from tests.warm_python.fixture import warm_proofs  # noqa: F401  (a fixture)


def section(path, **values):
    return ModelSection(path=str(path), **{"dtype": "fp32", **values})


def test_base_and_tokenizer(model_folder):
    model = load_base(section(model_folder))
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert not model.config.use_cache
    assert pad_id(load_tokenizer(section(model_folder))) == 0


def test_bf16_base_has_an_fp32_adapter_and_full_fine_tuning_keeps_fp32_weights(model_folder):
    half = section(model_folder, dtype="bf16")
    assert compute_dtype(half) == torch.bfloat16
    model = add_lora(load_base(half), LoraSection(), seed=1)
    trained = {p.dtype for p in model.parameters() if p.requires_grad}
    frozen = {p.dtype for p in model.parameters() if not p.requires_grad}
    assert trained == {torch.float32}
    assert frozen == {torch.bfloat16}
    assert {p.dtype for p in load_base(half, full=True).parameters()} == {torch.float32}


def test_adapter_starts_from_the_seed_and_changes_nothing(model_folder):
    def fresh(seed):
        return add_lora(load_base(section(model_folder)), LoraSection(r=4), seed=seed).eval()

    def factors(model):
        return torch.cat([p.flatten() for name, p in model.named_parameters() if "lora_A" in name])

    ids = torch.arange(3, 20)[None]
    with torch.no_grad():
        assert torch.equal(fresh(1)(ids).logits, load_base(section(model_folder)).eval()(ids).logits)
    assert torch.equal(factors(fresh(1)), factors(fresh(1)))
    assert not torch.equal(factors(fresh(1)), factors(fresh(2)))


def test_targets_that_fit_nothing_are_refused_with_those_that_would(model_folder):
    with pytest.raises(UserError) as caught:
        add_lora(load_base(section(model_folder)), LoraSection(targets=("query",)), seed=1)
    assert "query" in caught.value.what
    assert "q_proj" in caught.value.do


@pytest.mark.parametrize(
    "files, what",
    [
        (None, "no model folder"),
        ({"notes.txt": ""}, "no config.json"),
        ({"adapter_config.json": "{}"}, "adapter, not a model"),
        ({"config.json": "{}"}, "no *.safetensors"),
        ({"config.json": "{}", "pytorch_model.bin": ""}, "pickles (pytorch_model.bin)"),
    ],
)
def test_folders_that_are_refused(tmp_path, files, what):
    folder = tmp_path / "model"
    if files is not None:
        folder.mkdir()
        for name, text in files.items():
            (folder / name).write_text(text)
    with pytest.raises(UserError) as caught:
        model_location(folder)
    assert what in caught.value.what
    assert str(folder) in caught.value.where
    assert caught.value.do


def test_broken_folder_is_an_error_for_people(tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "nothing-known"}')
    (tmp_path / "model.safetensors").write_bytes(b"")
    with pytest.raises(UserError, match="can't be loaded"):
        load_base(section(tmp_path))


def test_hub_name_is_left_to_the_hub():
    assert model_location("org/name") == "org/name"


def test_quantised_weights_cannot_be_trained_themselves(model_folder):
    with pytest.raises(UserError, match="nf4"):
        load_base(section(model_folder, quantise="nf4"), full=True)


def test_frozen_a_is_shared_by_all_runs_with_one_seed_and_exported(recipe, tmp_path):
    """Single-task runs of one recipe: their adapters have A in common, and differ in B."""
    from safetensors.torch import load_file

    from mtft.training.run_training import train

    adapters = []
    for task in recipe["tasks"][:2]:
        alone = {**recipe, "tasks": [task], "mixture": {"shares": {task["name"]: 1.0}}}
        alone |= {"lora": {"r": 4, "freeze_a": True}, "output": {"dir": str(tmp_path / task["name"]), "save_every": 4}}
        result = train(Recipe.model_validate(alone), quiet=True, prove=False)
        adapters.append(load_file(result.adapter_dir / "adapter_model.safetensors"))
        saved = load_file(tmp_path / task["name"] / "checkpoint-8" / "weights.safetensors")
        assert all("lora_B" in name for name in saved)  # only what is trained
    one, two = adapters
    assert one.keys() == two.keys()
    for name in one:
        assert torch.equal(one[name], two[name]) == ("lora_A" in name)


@pytest.mark.slow
@pytest.mark.parametrize(
    "lora", [{"init": "mica"}, {"init": "olora"}, {"dora": True}, {"rslora": True}, {"freeze_a": True, "r": 8}]
)
def test_variants_of_lora_train_and_are_proved(recipe, tmp_path, lora):
    from mtft.training.run_training import train

    asked = {**recipe, "lora": {"r": 4, **lora}, "output": {"dir": str(tmp_path / "run")}}
    asked["train"] = {**recipe["train"], "steps": 4, "warmup": 0, "learning_rate": 2e-3}
    train(Recipe.model_validate(asked), quiet=True)
    evals = [json.loads(line) for line in (tmp_path / "run" / "eval.jsonl").read_text().splitlines()]
    before, after = (sum(task["loss"] for task in line["tasks"].values()) for line in evals)
    assert after < before


def test_variants_that_want_data_are_refused(tmp_path):
    with pytest.raises(ValidationError, match="mica"):
        LoraSection(init="eva")


@pytest.mark.parametrize(("native", "expected"), [(True, torch.bfloat16), (False, torch.float32)])
def test_auto_is_bf16_on_a_gpu_that_computes_in_it_and_not_where_it_is_emulated(monkeypatch, native, expected):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: including_emulation or native)
    assert resolve_dtype("auto") == expected
