"""Weights that are missing, unused, of another shape or of another base are refused by every command that reads them.

The oracle is what the files hold: each fault is made by taking a tensor out of a good file, putting one in, renaming
one, or tuning the base further.
"""

import json
import os
import shutil
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file

from mtft.adapters.base_identity import BASE, fingerprint
from mtft.adapters.lora_factors import read_adapter
from mtft.common.errors import UserError
from mtft.common.own_files import FORMAT
from mtft.evaluation.evaluate_recipe import evaluate
from mtft.fuse.load_models import load_model, load_weak_model
from mtft.merge.engine.merge import merge_adapters
from mtft.merge.learned.gates import Gates
from mtft.models.adapters import load_adapter
from mtft.models.loading import load_base, load_causal_lm, load_tokenizer
from mtft.models.lora import add_lora, continue_lora
from mtft.recipe.schema.lora import LoraSection
from mtft.recipe.schema.model import ModelSection
from mtft.recipe.schema.recipe import Recipe
from mtft.training.export.export import export_model
from tests.training.conftest import write_model

DOWN = "model.layers.1.mlp.down_proj.weight"


def section(path):
    return ModelSection(path=str(path), dtype="fp32")


def changed(folder, to, change, name="model.safetensors"):
    """A copy of a folder in whose weights `change(tensors)` was done."""
    shutil.copytree(folder, to)
    tensors = load_file(to / name)
    change(tensors)
    save_file(tensors, to / name, metadata={"format": "pt"})
    return to


@pytest.fixture(scope="module")
def adapter(model_folder, tmp_path_factory):
    """An adapter on all linears of the toy model, with a B that is not zero."""
    model = add_lora(load_base(section(model_folder)), LoraSection(r=4, alpha=8), seed=1)
    with torch.no_grad():
        for name, value in model.named_parameters():
            if "lora_B" in name:
                value.normal_(std=0.05, generator=torch.Generator().manual_seed(3))
    return export_model(model, tmp_path_factory.mktemp("run"), tokenizer=load_tokenizer(section(model_folder)))


# --- bases


@pytest.mark.parametrize(
    "change, what",
    [
        (lambda tensors: tensors.pop(DOWN), r"lack 1 weight \(model\.layers\.1\.mlp\.down_proj"),
        (lambda tensors: [tensors.pop(key) for key in list(tensors) if "layers.1" in key], "lack 9 weights"),
        (lambda tensors: tensors.update({"v_head.weight": torch.zeros(1, 32)}), r"hold 1 weight \(v_head\.weight\)"),
        (lambda tensors: tensors.update({DOWN: torch.zeros(3, 3)}), "down_proj|can't be loaded"),
    ],
    ids=["one missing", "a layer missing", "one unused", "another shape"],
)
@pytest.mark.parametrize(
    "read",
    [
        lambda recipe, folder: load_base(section(folder)),
        lambda recipe, folder: evaluate(Recipe.model_validate(recipe), model=section(folder)),
        lambda recipe, folder: load_model(folder, dtype="fp32"),
    ],
    ids=["train", "evaluate", "fuse"],
)
def test_a_base_that_is_not_whole_is_refused(model_folder, recipe, tmp_path, change, what, read):
    broken = changed(model_folder, tmp_path / "broken", change)
    with pytest.raises(UserError, match=what) as caught:
        read(recipe, broken)
    assert str(broken) in caught.value.where
    assert caught.value.do


def test_a_file_that_is_cut_is_an_error_for_people(model_folder, tmp_path):
    folder = shutil.copytree(model_folder, tmp_path / "cut")
    whole = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(whole[:-100])
    with pytest.raises(UserError, match="can't be loaded"):
        load_base(section(folder))


@pytest.mark.parametrize(
    "extra", ["lm_head.weight", "model.rotary_emb.inv_freq", "model.layers.0.self_attn.rotary_emb.inv_freq"]
)
def test_tied_weights_and_buffers_are_not_missed_and_may_be_there(model_folder, tmp_path, extra):
    tensors = load_file(model_folder / "model.safetensors")
    assert "lm_head.weight" not in tensors
    values = tensors["model.embed_tokens.weight"].clone() if extra == "lm_head.weight" else torch.ones(4)
    folder = changed(model_folder, tmp_path / "more", lambda tensors: tensors.update({extra: values}))
    ids = torch.arange(3, 20)[None]
    with torch.no_grad():
        here, there = (load_base(section(path)).eval()(ids).logits for path in (model_folder, folder))
    assert torch.equal(here, there)


# --- adapters


def drop(*parts):
    def change(tensors):
        gone = [key for key in tensors if all(part in key for part in parts)]
        assert gone
        for key in gone:
            del tensors[key]

    return change


def rename(old, new):
    def change(tensors):
        for key in list(tensors):
            tensors[key.replace(old, new)] = tensors.pop(key)

    return change


def add(tensors):
    tensors["base_model.model.model.layers.7.mlp.up_proj.lora_A.weight"] = torch.ones(4, 32)
    tensors["base_model.model.model.layers.7.mlp.up_proj.lora_B.weight"] = torch.ones(64, 4)


FAULTS = {
    "one B": drop("layers.1.mlp.down_proj", "lora_B"),
    "a module": drop("layers.1.mlp.down_proj"),
    "everything": lambda tensors: tensors.clear(),
    "other names": rename("model.layers", "transformer.h"),
    "other prefix": rename("base_model.model.", ""),
    "a layer too many": add,
    "another shape": lambda tensors: tensors.update(
        {key: torch.ones(4, 8) for key in tensors if "lora_A" in key and "layers.0.mlp" in key}
    ),
}


def by_evaluate(recipe, model_folder, folder, tmp_path):
    evaluate(Recipe.model_validate(recipe), folder)


def by_start(recipe, model_folder, folder, tmp_path):
    continue_lora(load_base(section(model_folder)), LoraSection(r=4, alpha=8, start=str(folder)))


def by_fuse(recipe, model_folder, folder, tmp_path):
    load_weak_model(model_folder, [folder], dtype="fp32")


def by_fuse_strong(recipe, model_folder, folder, tmp_path):
    load_model(model_folder, adapter=folder, dtype="fp32")


def by_gates(recipe, model_folder, folder, tmp_path):
    Gates(load_base(section(model_folder)), [read_adapter(folder)], "cat_gates")


def by_merge(recipe, model_folder, folder, tmp_path):
    merge_adapters([folder], tmp_path / "merged")


COMMANDS = (by_evaluate, by_start, by_fuse, by_fuse_strong, by_gates)


@pytest.mark.filterwarnings("ignore:expert .* runs as a model of its own")
@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize("command", COMMANDS, ids=lambda command: command.__name__)
def test_an_adapter_that_is_not_whole_is_refused(recipe, model_folder, adapter, tmp_path, fault, command):
    broken = changed(adapter, tmp_path / "broken", FAULTS[fault], "adapter_model.safetensors")
    with pytest.raises(UserError) as caught:
        command(recipe, model_folder, broken, tmp_path)
    assert str(broken) in str(caught.value)
    assert caught.value.do


@pytest.mark.parametrize("fault", ["one B", "everything", "other prefix"])
def test_a_merge_refuses_what_it_can_see_without_the_base(recipe, model_folder, adapter, tmp_path, fault):
    broken = changed(adapter, tmp_path / "broken", FAULTS[fault], "adapter_model.safetensors")
    with pytest.raises(UserError):
        by_merge(recipe, model_folder, broken, tmp_path)


@pytest.mark.parametrize("command", COMMANDS, ids=lambda command: command.__name__)
def test_whole_adapters_are_taken_and_count(recipe, model_folder, adapter, tmp_path, command):
    command(recipe, model_folder, adapter, tmp_path)


def test_a_bias_that_is_missing_is_seen(model_folder, tmp_path):
    """PEFT's report says nothing of trained biases: they are no LoRA weights."""
    from peft import LoraConfig, get_peft_model
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(n_embd=16, n_layer=1, n_head=2, vocab_size=40, n_positions=32)
    GPT2LMHeadModel(config).save_pretrained(tmp_path / "base")

    def base():
        return load_causal_lm(tmp_path / "base", dtype=torch.float32)

    lora = LoraConfig(r=2, target_modules=["c_attn"], bias="all", fan_in_fan_out=True)
    get_peft_model(base(), lora).save_pretrained(tmp_path / "adapter")
    load_adapter(base(), tmp_path / "adapter")
    broken = changed(tmp_path / "adapter", tmp_path / "broken", drop("h.0.mlp.c_fc.bias"), "adapter_model.safetensors")
    with pytest.raises(UserError, match=r"c_fc\.bias"):
        load_adapter(base(), broken)


# --- another base


@pytest.fixture(scope="module")
def others(model_folder, tmp_path_factory):
    """Bases on which every name and shape of the adapter fits, and which are another model all the same."""
    folder = tmp_path_factory.mktemp("others")

    def tuned(tensors):
        for value in tensors.values():
            value += 1e-3 * torch.randn(value.shape, generator=torch.Generator().manual_seed(1))

    def grown(tensors):
        embedding = tensors["model.embed_tokens.weight"]
        tensors["model.embed_tokens.weight"] = torch.cat([embedding, embedding[:5]])

    config = json.loads((changed(model_folder, folder / "vocabulary", grown) / "config.json").read_text())
    config["vocab_size"] += 5
    (folder / "vocabulary" / "config.json").write_text(json.dumps(config))
    return SimpleNamespace(
        seed=write_model(folder / "seed", seed=5),
        tuned=changed(model_folder, folder / "tuned", tuned),
        vocabulary=folder / "vocabulary",
    )


@pytest.mark.parametrize("other", ["seed", "tuned", "vocabulary"])
@pytest.mark.parametrize("recorded", [True, False], ids=["recorded", "base still there"])
@pytest.mark.parametrize("command", COMMANDS, ids=lambda command: command.__name__)
def test_an_adapter_of_another_base_is_refused(recipe, others, adapter, tmp_path, other, recorded, command):
    folder, base = adapter, getattr(others, other)
    if not recorded:  # as other programs save it: the base that its config names is compared
        folder = shutil.copytree(adapter, tmp_path / "plain")
        (folder / BASE).unlink()
    asked = {**recipe, "model": {**recipe["model"], "path": str(base)}}
    with pytest.raises(UserError, match="holds other weights"):
        command(asked, base, folder, tmp_path)


@pytest.mark.parametrize("command", COMMANDS, ids=lambda command: command.__name__)
def test_a_base_that_has_moved_is_the_same_base(recipe, model_folder, adapter, tmp_path, command):
    """Compared by content: another path, another name, other shards."""
    moved = tmp_path / "elsewhere" / "renamed"
    model = load_base(section(model_folder))
    model.save_pretrained(moved, max_shard_size="20KB")
    assert len(list(moved.glob("*.safetensors"))) > 1
    assert fingerprint(moved) == fingerprint(model_folder)
    for file in model_folder.glob("tokenizer*"):
        shutil.copy(file, moved)
    asked = {**recipe, "model": {**recipe["model"], "path": str(moved)}}
    command(asked, moved, adapter, tmp_path)


def test_training_on_records_the_base_of_the_recipe(model_folder, adapter, tmp_path):
    """lora.start after the base has moved: what the new adapter names is where the base is now."""
    moved = shutil.copytree(model_folder, tmp_path / "moved")
    model = continue_lora(load_base(section(moved)), LoraSection(r=4, alpha=8, start=str(adapter)))
    exported = export_model(model, tmp_path / "run", tokenizer=load_tokenizer(section(moved)))
    assert json.loads((exported / "adapter_config.json").read_text())["base_model_name_or_path"] == str(moved)
    base = json.loads((exported / BASE).read_text())
    assert base == {"format": FORMAT, "model": str(moved), "revision": None, "fingerprint": fingerprint(model_folder)}


def test_a_base_that_is_away_at_the_end_is_remembered(model_folder, tmp_path):
    """The rehearsal before the first step has asked; an adapter without a fingerprint would fit any base."""
    moved = shutil.copytree(model_folder, tmp_path / "moved")
    model = add_lora(load_base(section(moved)), LoraSection(r=4, alpha=8), seed=1)
    text = load_tokenizer(section(moved))
    export_model(model, tmp_path / "rehearsed", tokenizer=text)
    moved.rename(tmp_path / "away")
    exported = export_model(model, tmp_path / "run", tokenizer=text)
    assert json.loads((exported / BASE).read_text())["fingerprint"] == fingerprint(model_folder)
    assert {path.stat().st_mode & 0o777 for path in exported.iterdir()} == {0o666 & ~_umask()}


def _umask():
    mask = os.umask(0)
    os.umask(mask)
    return mask


@pytest.mark.slow
def test_a_model_of_the_hub_is_known_by_its_weights_in_the_cache(model_folder, tmp_path):
    """The cache of huggingface_hub as it lies on disk; no network."""
    commit = "0123456789abcdef0123456789abcdef01234567"
    repo = tmp_path / "hub" / "models--org--tiny"
    shutil.copytree(model_folder, repo / "snapshots" / commit)
    (repo / "refs").mkdir()
    (repo / "refs" / "main").write_text(commit)
    code = (
        "from mtft.models.adapters import base_of\nfrom mtft.models.loading import load_base\n"
        "from mtft.recipe.schema.model import ModelSection\n"
        "base = base_of(load_base(ModelSection(path='org/tiny', dtype='fp32')))\n"
        "print(base.model, base.revision, base.fingerprint)"
    )
    environment = {**os.environ, "HF_HOME": str(tmp_path), "HF_HUB_OFFLINE": "1"}
    environment.pop("HF_HUB_CACHE", None)
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.split()[-3:] == ["org/tiny", commit, fingerprint(model_folder)]


def test_merging_compares_weights_and_not_paths(model_folder, adapter, others, tmp_path):
    def named(to, path, weights):
        folder = shutil.copytree(adapter, tmp_path / to)
        config = json.loads((folder / "adapter_config.json").read_text())
        (folder / "adapter_config.json").write_text(json.dumps({**config, "base_model_name_or_path": str(path)}))
        base = {"model": str(path), "revision": None, "fingerprint": weights}
        (folder / BASE).write_text(json.dumps(base))
        return folder

    same = named("same", tmp_path / "moved", fingerprint(model_folder))
    report = merge_adapters([adapter, same], tmp_path / "merged")
    assert not [line for line in report.warnings if "base" in line]
    assert json.loads((tmp_path / "merged" / BASE).read_text())["fingerprint"] == fingerprint(model_folder)
    other = named("other", model_folder, fingerprint(others.tuned))
    with pytest.raises(UserError, match="differ in their weights"):
        merge_adapters([adapter, other], tmp_path / "not")
