"""`mtft check` as a function: what it warns of, beside what the rooms' own tests hold."""

from __future__ import annotations

import json

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from mtft.common.errors import UserError
from mtft.pipeline.check import check_recipe
from mtft.pipeline.run_stages import run_recipe
from mtft.quickstart import model_path
from mtft.recipe.load import load_recipe

RECIPE = """\
name: check
model: {path: MODEL, dtype: fp32}
tasks:
  - {name: a, data: rows.jsonl, eval_data: rows.jsonl}
train: {steps: 2, batch_tokens: 512, micro_batch_tokens: 512, max_length: 128}
output: {dir: out}
"""


@pytest.fixture
def recipe(tmp_path, monkeypatch):
    monkeypatch.setenv("MTFT_CACHE", str(tmp_path / "cache"))
    rows = [{"prompt": f"count to {n}", "response": " ".join(map(str, range(n)))} for n in range(1, 20)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))

    def load(*overrides: str, model: str = "quickstart:weak"):
        (tmp_path / "recipe.yaml").write_text(RECIPE.replace("MODEL", model))
        return load_recipe(tmp_path / "recipe.yaml", overrides)

    return load


def test_a_good_recipe_has_no_warnings_beyond_its_data(recipe):
    found = check_recipe(recipe())
    assert found.warnings == ()
    assert found.as_dict()["memory"]["total"] == found.memory.total > 0
    assert found.memory.text() in found.text()


def test_a_model_that_may_not_be_packed_is_said(recipe, tmp_path):
    """The same model with rotary positions that depend on the whole batch."""
    folder = tmp_path / "model"
    folder.mkdir()
    source = model_path("weak")
    for file in source.iterdir():
        (folder / file.name).symlink_to(file)
    config = AutoConfig.from_pretrained(source).to_dict()
    config["rope_parameters"] = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0}
    (folder / "config.json").unlink()
    (folder / "config.json").write_text(json.dumps(config))
    found = check_recipe(recipe(model="./model"))
    assert len(found.warnings) == 1
    assert "rotary positions depend on the whole batch" in found.warnings[0]
    # Nor can its activations be counted on shapes alone: its code looks at the positions.
    assert found.memory.activations is None
    assert "activations unknown, not in the sum" in found.text()
    assert check_recipe(recipe("train.packing=false", model="./model")).warnings == ()


def test_a_model_whose_packed_rows_keep_a_mask_is_said(recipe, tmp_path):
    torch.manual_seed(0)
    size = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = AutoConfig.for_model("nemotron", vocab_size=2048, num_key_value_heads=2, **size)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "model")
    AutoTokenizer.from_pretrained(model_path("weak")).save_pretrained(tmp_path / "model")
    [said] = check_recipe(recipe(model="./model")).warnings
    assert "'nemotron'" in said
    assert "keep a mask" in said
    assert check_recipe(recipe("train.packing=false", model="./model")).warnings == ()


def test_an_unknown_model_type(recipe, tmp_path):
    folder = tmp_path / "model"
    folder.mkdir()
    for file in model_path("weak").iterdir():
        (folder / file.name).symlink_to(file)
    (folder / "config.json").unlink()
    (folder / "config.json").write_text(json.dumps({"model_type": "from_the_future"}))
    with pytest.raises(UserError, match=r"can't be (used|loaded)"):
        check_recipe(recipe(model="./model"))


def test_a_balancer_that_reads_validation_losses_needs_them(recipe):
    assert check_recipe(recipe("loss.balancer.name=coba")).warnings == ()
    with pytest.raises(UserError, match="validation losses"):
        check_recipe(recipe("loss.balancer.name=coba", "tasks.a.eval_data="))


def test_one_fact_is_one_warning(recipe):
    loaded = recipe("tasks.a.eval_data=", "train.batch_tokens=256")
    warnings = check_recipe(loaded).warnings
    both = [*warnings, *check_recipe(loaded).data.warnings]
    assert len([line for line in both if "eval_data" in line]) == 1
    assert len([line for line in both if "train.batch_tokens" in line]) == 1


def test_epoch_caps_are_named_only_where_one_binds(recipe, tmp_path):
    rows = (tmp_path / "rows.jsonl").read_text()
    (tmp_path / "more.jsonl").write_text(rows * 3)
    tasks = "tasks=[{name: a, data: rows.jsonl}, {name: b, data: more.jsonl}]"
    for caps, named in (([], False), (["mixture.max_epochs=1", "mixture.on_cap=redistribute"], True)):
        shares = "mixture.shares={a: 0.57, b: 0.43}"
        size = ["train.steps=1", "train.batch_tokens=512"] if not named else ["train.steps=3"]
        loaded = recipe(tasks, shares, *caps, *size)
        (line, *_) = [line for line in check_recipe(loaded).data.warnings if "played (" in line]
        assert ("epoch caps" in line) == named


def test_models_that_cannot_be_fused_are_found_before_the_training(recipe, tmp_path, monkeypatch):
    """Two tokenizers without a token map: known from their files, and refused by the fuse stage after hours."""
    monkeypatch.chdir(tmp_path)
    strong = tmp_path / "strong"
    strong.mkdir()
    source = model_path("strong")
    for file in source.iterdir():
        if file.name != "tokenizer.json":
            (strong / file.name).symlink_to(file)
    core = json.loads((source / "tokenizer.json").read_text())
    vocabulary = core["model"]["vocab"]
    one, other = list(vocabulary)[500:502]
    vocabulary[one], vocabulary[other] = vocabulary[other], vocabulary[one]
    (strong / "tokenizer.json").write_text(json.dumps(core))
    fused = recipe("fuse={strong: {path: ./strong}, tokens: strict}")
    for command in (check_recipe, run_recipe):
        with pytest.raises(UserError, match="tokenizer"):
            command(fused)
    assert not (tmp_path / "out").exists(), "found before anything is written"
