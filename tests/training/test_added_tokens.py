"""R18: tokens that were added to the tokenizer. The adapter of a resized model loads and says the same; a model that
was not resized is refused before a weight is read, instead of ending in an index error (or in a broken adapter).
"""

import json
import shutil

import pytest
import torch
from peft import PeftModel
from safetensors import safe_open
from transformers import AutoModelForCausalLM, AutoTokenizer

from mtft.common.errors import UserError
from mtft.models.loading import pad_id
from mtft.pipeline.check import check_recipe
from mtft.recipe.schema.recipe import Recipe
from mtft.training.run_training import train

ADDED = ["<|tool|>", "<|answer|>"]


@pytest.fixture
def grown(model_folder, tmp_path):
    """(recipe dict, model folder): the tokenizer knows two tokens more than the model, and the data use them."""
    folder = tmp_path / "model"
    shutil.copytree(model_folder, folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.add_special_tokens({"extra_special_tokens": ADDED})
    tokenizer.save_pretrained(folder)
    rows = [{"prompt": f"<|tool|> count {n}", "response": f"<|answer|> {n}"} for n in range(30)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return {
        "name": "grown",
        "model": {"path": str(folder), "dtype": "fp32"},
        "tasks": [{"name": "a", "data": str(tmp_path / "rows.jsonl"), "eval_data": str(tmp_path / "rows.jsonl")}],
        "lora": {"r": 4, "alpha": 8},
        "train": {"steps": 3, "batch_tokens": 256, "micro_batch_tokens": 128, "max_length": 64, "learning_rate": 1e-2},
        "output": {"dir": str(tmp_path / "run")},
    }, folder


@pytest.mark.slow
def test_adapter_of_a_resized_model_loads_and_says_the_same(grown, tmp_path):
    recipe, folder = grown
    model = AutoModelForCausalLM.from_pretrained(folder)
    torch.manual_seed(0)
    model.resize_token_embeddings(len(AutoTokenizer.from_pretrained(folder)))
    model.save_pretrained(folder)
    result = train(Recipe.model_validate(recipe), quiet=True)  # proved: a fresh process compares the logits
    with safe_open(result.adapter_dir / "adapter_model.safetensors", "pt") as file:
        names = list(file.keys())
    assert all("lora_" in name for name in names)  # PEFT's own guess would add a copy of the embedding

    ids = AutoTokenizer.from_pretrained(folder)("<|tool|> count 3", return_tensors="pt")["input_ids"]
    assert int(ids.max()) >= 259  # the added ones are in it
    plain = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(folder), str(result.adapter_dir))
    base = AutoModelForCausalLM.from_pretrained(folder)
    with torch.no_grad():
        assert (plain.eval()(ids).logits - base.eval()(ids).logits).abs().max() > 1e-3
    assert result.scores["a"].summary()["loss"] < 6


def test_a_model_that_was_not_resized_is_refused(grown):
    recipe = Recipe.model_validate(grown[0])
    for refuse in (lambda: train(recipe, quiet=True), lambda: check_recipe(recipe)):
        with pytest.raises(UserError, match=r"holds the token .* model has rows for 259 tokens only") as caught:
            refuse()
        assert "resize_token_embeddings(261)" in str(caught.value)
    # the naive way: it is found out in the middle of the first step, as an index that is out of range
    model = AutoModelForCausalLM.from_pretrained(grown[1])
    ids = AutoTokenizer.from_pretrained(grown[1])("<|tool|> count 3", return_tensors="pt")["input_ids"]
    with pytest.raises(IndexError):
        model(ids)


def test_added_tokens_that_do_not_occur_are_no_matter(grown, tmp_path):
    """Many tokenizers got a padding token that their model has no row for."""
    recipe, folder = grown
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.add_special_tokens({"pad_token": "<|padding|>"})
    tokenizer.save_pretrained(folder)
    assert pad_id(AutoTokenizer.from_pretrained(folder)) < 259
    (tmp_path / "rows.jsonl").write_text('{"prompt": "a", "response": "b"}\n{"prompt": "a b c", "response": "b"}\n')
    assert train(Recipe.model_validate(recipe), quiet=True, prove=False).steps == 3
