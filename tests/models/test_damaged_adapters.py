"""Somebody's adapter with one thing wrong: refused with file and key, by what merges it and by what loads it."""

import json

import pytest
from safetensors.torch import load_file, save_file

from mtft.adapters.lora_factors import read_adapter
from mtft.common.errors import UserError
from mtft.models.adapters import load_adapter, read_peft_config
from mtft.models.loading import load_base
from mtft.models.lora import add_lora
from mtft.recipe.schema.lora import LoraSection
from mtft.recipe.schema.model import ModelSection

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
MODEL = ModelSection(path="quickstart:weak", dtype="fp32")


@pytest.fixture
def folder(tmp_path):
    add_lora(load_base(MODEL), LoraSection(r=4), seed=1).save_pretrained(tmp_path / "a")
    return tmp_path / "a"


def load(folder):
    load_adapter(load_base(MODEL), folder, any_base=True)


@pytest.mark.parametrize("use", [read_adapter, load])
@pytest.mark.parametrize(
    ("key", "text"),
    [
        ("r", "0"),
        ("r", "-1"),
        ("r", "1" + "0" * 12),
        ("r", "1" + "0" * 400),
        ("r", '"8"'),
        ("r", "60000"),
        ("lora_alpha", "1" + "0" * 400),
        ("lora_alpha", "1e999"),
        ("lora_alpha", "NaN"),
        ("lora_alpha", "-1"),
        ("lora_alpha", '"x"'),
        ("rank_pattern", '{"(a+)+$": 4}'),
        ("rank_pattern", '{"(.*.*)*x": 4}'),
        ("rank_pattern", '{"q_proj": 100000}'),
        ("rank_pattern", '{"(": 4}'),
        ("rank_pattern", "5"),
        ("alpha_pattern", '{"(a|a)*$": 4}'),
        ("alpha_pattern", '{"q_proj": 1e999}'),
        ("alpha_pattern", "[]"),
    ],
)
def test_values_that_cannot_be(folder, use, key, text):
    config = json.loads((folder / CONFIG).read_text())
    config[key] = "HERE"
    (folder / CONFIG).write_text(json.dumps(config).replace('"HERE"', text))
    with pytest.raises(UserError) as caught:
        use(folder)
    assert key in str(caught.value)
    assert caught.value.do
    assert len(str(caught.value)) < 800
    if text != "60000" or use is load:  # whose file has another rank: that is said with the module
        assert CONFIG in caught.value.where


@pytest.mark.parametrize("use", [read_adapter, load])
def test_a_key_twice(folder, use):
    text = (folder / CONFIG).read_text()
    (folder / CONFIG).write_text(text.replace("{", '{"lora_alpha": 1,', 1))
    with pytest.raises(UserError, match="'lora_alpha' stands twice"):
        use(folder)


@pytest.mark.parametrize("key", ["target_modules", "exclude_modules"])
def test_targets_that_could_take_for_ever(folder, key):
    config = json.loads((folder / CONFIG).read_text())
    (folder / CONFIG).write_text(json.dumps(config | {key: "(.*_?)*!"}))
    with pytest.raises(UserError, match="for ever"):
        load(folder)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_factors_that_are_no_numbers(folder, value):
    tensors = load_file(folder / WEIGHTS)
    name = sorted(tensors)[3]
    tensors[name].view(-1)[0] = value
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})
    with pytest.raises(UserError, match=r"1 of .* NaN or infinite") as caught:
        load(folder)
    assert name.removesuffix(".weight") in str(caught.value)


def test_what_is_whole_is_loaded(folder):
    config = json.loads((folder / CONFIG).read_text())
    patterns = {"rank_pattern": {r"layers\.[01]\..*_proj": 4}, "alpha_pattern": {"q_proj": 16, r".*\.v_proj": 8}}
    (folder / CONFIG).write_text(json.dumps(config | patterns))
    assert read_adapter(folder).settings.scale_of("model.layers.0.self_attn.q_proj") == 4
    load(folder)


@pytest.mark.parametrize("content", [b"", b"5", b"[]", bytes(4096), b"cut"])
@pytest.mark.parametrize("use", [read_adapter, load])
def test_weights_that_are_no_safetensors(folder, use, content):
    whole = (folder / WEIGHTS).read_bytes()
    (folder / WEIGHTS).write_bytes(whole[:-100] if content == b"cut" else content)
    with pytest.raises(UserError, match="not a whole safetensors file") as caught:
        use(folder)
    assert caught.value.where == str(folder / WEIGHTS)


def test_a_folder_that_is_not_there_is_told_with_its_nearest(tmp_path):
    (tmp_path / "joint").mkdir()
    with pytest.raises(UserError, match=r"there is no adapter folder .*/jiont: did you mean 'joint'\?"):
        read_peft_config(tmp_path / "jiont")
    with pytest.raises(UserError, match="there is no adapter folder"):
        read_peft_config(tmp_path / "no" / "such")
