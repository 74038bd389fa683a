"""Whatever `train` refuses before its first step `check` has said: a table of broken recipes, and all keys' values."""

import copy
import json
import os
import shutil
from typing import Annotated, Literal, get_args, get_origin

import pytest
import torch
from pydantic import BaseModel, ValidationError
from transformers import GptOssConfig, GptOssForCausalLM

from data_mixers.common.errors import MixError
from mtft.common.errors import UserError
from mtft.pipeline.check import check_recipe
from mtft.recipe.schema.recipe import Recipe
from mtft.training.run_training import train
from mtft.training.trainer import MultiTaskTrainer

REFUSED = (UserError, MixError, ValidationError)


class FirstStepError(Exception):
    """The run has come as far as its first step."""


@pytest.fixture(scope="module")
def recipe(whole_recipe):
    """One training run of the tiny model; two rows are evaluated."""
    content = {key: value for key, value in whole_recipe.items() if key not in ("sweep", "merge", "fuse", "run")}
    return {**content, "train": {**content["train"], "eval_on_start": False, "steps": 2}}


def changed(recipe, changes, run_dir):
    """A copy of the recipe with {dotted key: value}."""
    content = copy.deepcopy({**recipe, "output": {"dir": str(run_dir)}})
    for key, value in changes.items():
        *path, last = key.split(".")
        node = content
        for part in path:
            node[part] = {} if node.get(part) is None else node[part]
            node = node[part]
        node[last] = value
    return content


@pytest.fixture
def both(recipe, tmp_path, monkeypatch):
    """(what check says, what train says before its first step) of the recipe with changes; "" where nothing is."""

    def first_step(*_):
        raise FirstStepError

    def said(command, content):
        try:
            command(Recipe.model_validate(content))
        except REFUSED as error:
            return f"refused: {error}"
        except FirstStepError:
            pass
        return ""

    def run(changes):
        content = changed(recipe, changes, tmp_path / "run")
        with monkeypatch.context() as patch:
            patch.setattr(MultiTaskTrainer, "training_step", first_step)
            answers = said(check_recipe, content), said(train, content)
        shutil.rmtree(tmp_path / "run", ignore_errors=True)
        return answers

    return run


@pytest.fixture(scope="module")
def gpt_oss(tmp_path_factory, recipe):
    """A tiny gpt-oss, which has no sdpa."""
    folder = tmp_path_factory.mktemp("gpt_oss")
    config = GptOssConfig(
        vocab_size=300, hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=1, head_dim=16, num_local_experts=2, num_experts_per_tok=1, layer_types=["full_attention"],
    )  # fmt: skip
    GptOssForCausalLM(config).save_pretrained(folder)
    for file in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(f"{recipe['model']['path']}/{file}", folder)
    return folder


@pytest.fixture(scope="module")
def short(tmp_path_factory, recipe):
    """The tiny model with 16 positions."""
    folder = tmp_path_factory.mktemp("short") / "model"
    shutil.copytree(recipe["model"]["path"], folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "max_position_embeddings": 16}))
    return folder


BROKEN = {
    "attention that the model has not": ({"model.path": "GPT_OSS", "model.attention": "sdpa"}, "sdpa"),
    "attention whose package or device is missing": (
        {"model.attention": "flash_attention_2", "model.dtype": "bf16"},
        "needs a GPU",
    ),
    "a router loss that the model's config asks for": ({"model.path": "ROUTED"}, "router loss"),
    "examples beyond the positions": ({"model.path": "SHORT"}, "positions"),
    "a tracker misspelt": ({"output.trackers": ["tensorbord"]}, "did you mean tensorboard?"),
    "a tracker that is not installed": ({"output.trackers": ["neptune"]}, "the tracker neptune is not installed"),
    "a seed that no generator takes": ({"seed": 2**32}, "seed"),
    "fp16 without a GPU": ({"model.dtype": "fp16"}, "fp16 needs a GPU"),
    "no such optimizer": ({"train.optimizer": "adamv"}, "did you mean adamw"),
    "an optimizer that is not installed": ({"train.optimizer": "grokadamw"}, "grokadamw"),
    "an adapter to go on from that is not there": ({"lora.start": "nowhere"}, "there is no adapter folder"),
    "targets that match nothing": ({"lora.targets": ["nothing_proj"]}, "nothing_proj"),
    "a run folder that is a file": ({"output.dir": "FILE"}, "no folder"),
    "a share beyond the epochs": ({"train.steps": 5000, "mixture.max_epochs": 1}, "epochs"),
    "rows longer than a micro-batch": ({"train.micro_batch_tokens": 8}, "micro_batch_tokens"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_check_says_what_train_refuses(both, name, gpt_oss, short, tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    changes, words = BROKEN[name]
    (tmp_path / "file").write_text("")
    routed = shutil.copytree(gpt_oss, tmp_path / "routed")
    config = json.loads((routed / "config.json").read_text())
    (routed / "config.json").write_text(json.dumps({**config, "output_router_logits": True}))
    places = {"ROUTED": routed, "GPT_OSS": gpt_oss, "SHORT": short, "FILE": tmp_path / "file" / "run"}
    checked, trained = both({key: str(places.get(str(value), "")) or value for key, value in changes.items()})
    assert trained.startswith("refused"), "the table is out of date: this is no longer refused"
    assert words in trained
    assert checked == trained


def test_max_length_beyond_the_positions_is_said_where_no_example_is_so_long(recipe, tmp_path):
    warnings = check_recipe(
        Recipe.model_validate(changed(recipe, {"train.max_length": 600}, tmp_path / "run"))
    ).warnings
    assert any("train.max_length is 600, and the model has 512 positions" in line for line in warnings)


def values(annotation):
    """Values of a key that are worth a try: each word of a choice, both truths, small and large numbers."""
    origin, inner = get_origin(annotation), get_args(annotation)
    if origin is Literal:
        yield from inner
    elif annotation is bool:
        yield from (True, False)
    elif annotation is int:
        yield from (1, 1000)
    elif annotation is float:
        yield from (1e-6, 0.5, 30.0)
    elif origin is Annotated:
        yield from values(inner[0])
    elif inner and origin not in (tuple, list, dict):
        for part in inner:
            yield from values(part)


def keys(section, prefix=""):
    """(dotted key, value) of every key below a section of the schema."""
    for name, field in section.model_fields.items():
        inner = [part for part in (field.annotation, *get_args(field.annotation)) if isinstance(part, type)]
        models = [part for part in inner if issubclass(part, BaseModel)]
        for value in dict.fromkeys(values(field.annotation)):
            yield f"{prefix}{name}", value
        for model in models:
            yield from keys(model, f"{prefix}{name}.")


TRAINED = ("seed", "model", "mixture", "lora", "loss", "train", "output")
EVERY = [case for case in keys(Recipe) if case[0].split(".")[0] in TRAINED]


@pytest.mark.slow
@pytest.mark.parametrize("section", TRAINED)
def test_no_value_of_any_key_is_let_through_by_check_and_refused_by_train(both, section):
    """Finds the next refusal by itself: a new key, or a new value, is tried as soon as the schema has it."""
    cases = [case for case in EVERY if case[0].split(".")[0] == section]
    assert cases
    surprises = {}
    for key, value in cases:
        checked, trained = both({key: value})
        if trained and not checked:
            surprises[key, value] = trained
    assert surprises == {}


def test_the_folder_of_another_run_is_said_and_other_rows_are_refused(recipe, tmp_path):
    mine = tmp_path / "data"
    mine.mkdir()
    content = changed(recipe, {"train.steps": 1}, tmp_path / "run")
    for task in content["tasks"]:
        task |= {which: str(shutil.copy(task[which], mine)) for which in ("data", "eval_data")}
    whole = Recipe.model_validate(content)

    def refusals(of):
        return [line for line in check_recipe(of).warnings if "`mtft train` will refuse" in line]

    train(whole, prove=False)
    assert refusals(whole) == []
    train(whole, prove=False)  # finished already
    rows = content["tasks"][0]["data"]
    with open(rows, "a") as file:
        file.write('{"prompt": "copy: new", "response": "new"}\n')
    with pytest.raises(UserError, match="data of copy changed since"):
        train(whole, prove=False)
    assert "data of copy changed since" in refusals(whole)[0]
    other = Recipe.model_validate({**content, "seed": 5})
    with pytest.raises(UserError, match="run of another recipe"):
        train(other, prove=False)
    assert "run of another recipe" in refusals(other)[0]
    os.remove(rows)  # rows that are gone are no other rows
    train(whole, prove=False)
