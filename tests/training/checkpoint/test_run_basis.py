"""What a checkpoint needs to be continued stands in it: nothing beside it, deleted or edited, lets another go on."""

import json

import pytest
import torch
from transformers import AutoTokenizer

from mtft.common.errors import UserError
from mtft.common.own_files import write_own
from mtft.recipe.load import dump_recipe
from mtft.recipe.schema.recipe import Recipe
from mtft.training.checkpoint import run_basis as module
from mtft.training.checkpoint.checkpoint import check_identity
from mtft.training.checkpoint.run_basis import (
    check_basis,
    check_digest,
    check_parameters,
    parameters_digest,
    run_basis,
)
from mtft.training.run_files.run_dir import check_recipe
from mtft.training.run_training import train
from mtft.training.trainer import MultiTaskTrainer


@pytest.fixture(scope="module")
def started(recipe, tmp_path_factory):
    """The recipe's values and the folder of a run that has a checkpoint after its second of four steps."""
    folder = tmp_path_factory.mktemp("started") / "run"
    output = {"dir": str(folder), "save_every": 2, "keep": 2}
    values = {**recipe, "train": {**recipe["train"], "steps": 4}, "output": output}
    trainer = MultiTaskTrainer.from_recipe(Recipe.model_validate(values))
    trainer.steps.until = trainer.args.max_steps = 2
    trainer.train()
    return values, folder


def changed(values, key, value):
    *sections, last = key.split(".")
    whole = json.loads(json.dumps(values))
    node = whole
    for name in sections:
        node = node[name]
    node[last] = value
    return Recipe.model_validate(whole)


OTHER = {
    "lora.alpha": (64, "lora.alpha was 8.0, is 64.0"),
    "lora.r": (2, "lora.r was 4, is 2"),
    "lora.targets": (["q_proj"], "lora.targets was "),
    "train.optimizer": ("lion", "train.optimizer was "),
    "seed": (3, "seed was 17, is 3"),
    "lora": (None, "lora"),
}


@pytest.mark.parametrize("beside", ["deleted", "edited"])
@pytest.mark.parametrize("key", OTHER)
def test_another_recipe_is_refused_with_both_values(started, key, beside):
    values, folder = started
    value, told = OTHER[key]
    other = changed(values, key, value)
    if beside == "deleted":
        (folder / "recipe.yaml").unlink(missing_ok=True)
    else:
        (folder / "recipe.yaml").write_text(dump_recipe(other))
    with pytest.raises(UserError) as caught:
        train(other, quiet=True)
    assert told in caught.value.what
    assert "--fresh" in (caught.value.do or "")
    assert (folder / "checkpoint-2").is_dir()


def test_a_checkpoint_of_elsewhere_is_asked_too(started, tmp_path):
    values, folder = started
    other = changed({**values, "output": {"dir": str(tmp_path / "other")}}, "lora.alpha", 64)
    with pytest.raises(UserError, match=r"lora\.alpha was 8\.0, is 64\.0"):
        MultiTaskTrainer.from_recipe(other).train(resume_from_checkpoint=str(folder / "checkpoint-2"))


def test_the_chat_template_and_the_base_are_compared(started, recipe, monkeypatch):
    values, folder = started
    same, tokenizer = Recipe.model_validate(values), AutoTokenizer.from_pretrained(recipe["model"]["path"])
    identity = json.loads((folder / "checkpoint-2" / "state.json").read_text())["identity"]
    check_identity(folder / "checkpoint-2", identity, run_basis(same, tokenizer))
    tokenizer.chat_template = "{{ messages }}"
    with pytest.raises(UserError, match="another state of the chat template"):
        check_identity(folder / "checkpoint-2", identity, run_basis(same, tokenizer))
    tokenizer.chat_template = None
    monkeypatch.setattr(module, "fingerprint", lambda _: "0123456789abcdef")
    with pytest.raises(UserError, match=r"another state of the base's weights.*is 0123456789ab"):
        check_identity(folder / "checkpoint-2", identity, run_basis(same, tokenizer))


def test_other_versions_are_said(started, recipe):
    values, folder = started
    basis = run_basis(Recipe.model_validate(values), AutoTokenizer.from_pretrained(recipe["model"]["path"]))
    identity = json.loads((folder / "checkpoint-2" / "state.json").read_text())["identity"]
    said = []
    check_identity(folder / "checkpoint-2", identity, basis, say=said.append)
    assert said == []
    basis["versions"] = {**basis["versions"], "torch": "0.1"}
    check_identity(folder / "checkpoint-2", identity, basis, say=said.append)
    assert len(said) == 1
    assert "here 0.1" in said[0]


def test_a_checkpoint_without_it_goes_on(started, recipe, tmp_path):
    """As every version before wrote it."""
    values, folder = started
    checkpoint = folder / "checkpoint-2"
    basis = run_basis(Recipe.model_validate(values), AutoTokenizer.from_pretrained(recipe["model"]["path"]))
    state = json.loads((checkpoint / "state.json").read_text())
    del state["basis"], state["format"]
    (tmp_path / "state.json").write_text(json.dumps(state))
    check_identity(tmp_path, state["identity"], basis)


def test_parameters_that_differ_are_named_with_both_shapes(tmp_path):
    saved = {"a": torch.zeros(2, 3), "b": torch.zeros(4)}
    check_parameters(saved, {"a": torch.zeros(2, 3), "b": torch.zeros(4)}, tmp_path / "checkpoint-2")
    with pytest.raises(UserError, match=r"a was \[2, 3\], is \[64, 3\]; b was \[4\], is absent"):
        check_parameters(saved, {"a": torch.zeros(64, 3)}, tmp_path / "checkpoint-2")
    check_digest(parameters_digest(saved), saved, tmp_path / "checkpoint-2")
    with pytest.raises(UserError, match="were 2 tensors with 10 numbers, are 1 tensors with 6 numbers"):
        check_digest(parameters_digest(saved), {"a": saved["a"]}, tmp_path / "checkpoint-2")


def test_a_finished_run_says_what_it_was_trained_with(started, tmp_path):
    """recipe.yaml gone: what result.json says counts."""
    values, _ = started
    recipe = Recipe.model_validate(values)
    about = {"steps": 4, "seconds": 1.0, "export": "adapter", "tasks": {}}
    write_own(tmp_path / "result.json", {**about, "basis": {"recipe": recipe.model_dump(mode="json")}})
    check_recipe(tmp_path, recipe)
    with pytest.raises(UserError, match=r"lora\.alpha was 8\.0, is 64\.0"):
        check_recipe(tmp_path, changed(values, "lora.alpha", 64))
    write_own(tmp_path / "result.json", about)  # of an earlier version
    check_recipe(tmp_path, changed(values, "lora.alpha", 64))


def test_damaged_state_is_named(started, tmp_path):
    (tmp_path / "state.json").write_text('{"identity": []')
    with pytest.raises(UserError, match="damaged") as caught:
        check_identity(tmp_path, {})
    assert "state.json:1" in (caught.value.where or "")


def test_other_held_out_rows_are_said_and_refused_where_the_run_decides_by_them(started, recipe):
    values, folder = started
    tokenizer = AutoTokenizer.from_pretrained(recipe["model"]["path"])
    state = json.loads((folder / "checkpoint-2" / "state.json").read_text())
    rows = dict(state["basis"]["held_out"])
    assert rows
    said: list[str] = []
    same = Recipe.model_validate(values)
    check_basis(state["basis"], run_basis(same, tokenizer, rows), folder / "checkpoint-2", say=said.append)
    assert said == []
    other = {**rows, next(iter(rows)): "other"}
    check_basis(state["basis"], run_basis(same, tokenizer, other), folder / "checkpoint-2", say=said.append)
    assert "held-out rows of copy have changed since checkpoint-2" in said[0]
    best = {**values, "output": {**values["output"], "export": "best"}}
    before = {**state["basis"], "recipe": Recipe.model_validate(best).model_dump(mode="json")}
    now = run_basis(Recipe.model_validate(best), tokenizer, other)
    with pytest.raises(UserError, match="the run decides by them"):
        check_basis(before, now, folder / "checkpoint-2", say=said.append)
