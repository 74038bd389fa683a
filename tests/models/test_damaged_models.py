"""Folders of models with one thing wrong: refused before training, with the file and the key."""

import json
import logging
import os
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from mtft.common.errors import UserError
from mtft.models.loading import load_base, load_tokenizer, load_without_weights
from mtft.quickstart import model_path
from mtft.recipe.schema.model import ModelSection

WEIGHTS = "model.safetensors"


@pytest.fixture
def folder(tmp_path):
    return shutil.copytree(model_path("weak"), tmp_path / "model")


def load(folder):
    """All that a run loads, in the order in which `mtft check` and `mtft train` do."""
    section = ModelSection(path=str(folder), dtype="fp32")
    load_tokenizer(section)
    load_without_weights(section, dtype=torch.float32)
    return load_base(section)


def refused(folder) -> UserError:
    with pytest.raises(UserError) as caught:
        load(folder)
    assert caught.value.do
    assert len(str(caught.value)) < 1500
    return caught.value


SIZES = ("hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "vocab_size", "head_dim")
VALUES = (0, -1, 10**12, 10**30, "big", 1.5, True, [1], {})
KEYS = [(key, value) for key in (*SIZES, "max_position_embeddings", "intermediate_size") for value in VALUES]
KEYS.remove(("intermediate_size", 0))  # there are models without
KEYS += [
    ("hidden_act", "nope"),
    ("hidden_act", 5),
    ("dtype", "float99"),
    ("dtype", 5),
    ("rope_parameters.rope_type", "nope"),
    ("rope_parameters.rope_theta", 0.0),
    ("rope_parameters.rope_theta", "x"),
    ("rope_parameters", "x"),
    ("rms_norm_eps", -1),
    ("rms_norm_eps", float("nan")),
    ("rms_norm_eps", float("inf")),
    ("attention_dropout", 2),
    ("num_labels", 10**12),
    ("quantization_config", 5),
    ("tie_word_embeddings", "x"),
    ("eos_token_id", "x"),
    ("model_type", "nope"),
]


@pytest.mark.parametrize(("key", "value"), KEYS)
def test_values_that_cannot_be(folder, key, value):
    config = json.loads((folder / "config.json").read_text())
    node, last = config, key.split(".")[-1]
    for part in key.split(".")[:-1]:
        node = node[part]
    node[last] = value
    (folder / "config.json").write_text(json.dumps(config))
    error = refused(folder)
    assert f"{folder}/config.json" in error.where
    assert last in str(error)


@pytest.mark.parametrize("level", [logging.WARNING, logging.CRITICAL])
def test_sizes_of_another_model_are_named_with_the_first_weight(folder, caplog, level):
    caplog.set_level(level, logger="transformers.modeling_utils")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"intermediate_size": 300}))
    error = refused(folder)
    # the first of a set: one of three weights
    assert "[400, 144], and [300, 144] by the config" in error.what or "[144, 400], and [144, 300]" in error.what


JSON = {"empty": b"", "list": b"[]", "null": b"null", "number": b"5", "deep": b"[" * 100_000, "bytes": b"\xff\xfe{}"}


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json", "tokenizer_config.json", "generation_config.json"])
@pytest.mark.parametrize("damage", [*JSON, "cut", "twice", "pipe", "folder"])
def test_damaged_json(folder, name, damage):
    path = folder / name
    whole = path.read_bytes()
    path.unlink()
    if damage == "pipe":
        os.mkfifo(path)
    elif damage == "folder":
        path.mkdir()
    elif damage == "twice":
        path.write_bytes(b'{"model": 1, ' + whole.lstrip()[1:].replace(b"{", b'{"model": 2, ', 1))
    else:
        path.write_bytes(whole[: len(whole) // 2] if damage == "cut" else JSON[damage])
    if damage == "twice" and name != "tokenizer.json":
        path.write_bytes(b'{"model_type": "llama", ' + whole.lstrip()[1:-1] + b', "model_type": "x"}')
    assert name in str(refused(folder))


def test_an_empty_tokenizer(folder):
    (folder / "tokenizer.json").write_text("{}")
    error = refused(folder)
    assert error.where == f"{folder}/tokenizer.json, key model"


DAMAGES = {
    "empty": lambda whole: b"",
    "cut": lambda whole: whole[: len(whole) // 2],
    "last byte": lambda whole: whole[:-1],
    "one more": lambda whole: whole + b"x",
    "garbage": lambda whole: bytes(range(256)) * 20,
    "huge header": lambda whole: (2**62).to_bytes(8, "little") + whole[8:],
    "pointer": lambda whole: b"version https://git-lfs.github.com/spec/v1\noid sha256:abc\nsize 5\n",
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_weights(folder, damage):
    whole = (folder / WEIGHTS).read_bytes()
    (folder / WEIGHTS).write_bytes(DAMAGES[damage](whole))
    assert refused(folder).where == f"{folder}/{WEIGHTS}"


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize(
    "name", ["model.embed_tokens.weight", "model.norm.weight", "model.layers.4.mlp.up_proj.weight"]
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_weights_that_are_no_numbers(folder, value, name, dtype):
    tensors = {key: tensor.to(dtype) for key, tensor in load_file(folder / WEIGHTS).items()}
    tensors[name].view(-1)[7] = value
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})
    error = refused(folder)
    assert f"1 of {tensors[name].numel()} values of {name}" in error.what
    assert WEIGHTS in error.where


def test_of_a_whole_model_nothing_is_said(folder, caplog):
    load(folder)
    assert caplog.messages == []


@pytest.mark.parametrize("kind", ["another type", "a list"])
def test_classes_of_errors_are_not_named(folder, kind):
    config = json.loads((folder / "config.json").read_text())
    config["attention_dropout"] = [] if kind == "a list" else {"a": 1}
    (folder / "config.json").write_text(json.dumps(config))
    assert not any(name in refused(folder).what for name in ("TypeError", "NoneType", "<class"))


def test_large_numbers_are_numbers(folder):
    """Their sum overflows in fp16."""
    tensors = {key: tensor.to(torch.float16) for key, tensor in load_file(folder / WEIGHTS).items()}
    tensors["model.embed_tokens.weight"].fill_(60_000)
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})
    load_base(ModelSection(path=str(folder), dtype="fp32"))
    tensors["model.embed_tokens.weight"] = torch.full_like(
        tensors["model.embed_tokens.weight"], 3e38, dtype=torch.float32
    )
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})
    load_base(ModelSection(path=str(folder), dtype="fp32"))
