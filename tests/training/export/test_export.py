"""What is handed over loads in a process that knows nothing of mtft, and what is broken is refused."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from mtft.common.errors import UserError
from mtft.evaluation.evaluate_recipe import as_json, evaluate
from mtft.recipe.schema.model import ModelSection
from mtft.recipe.schema.recipe import Recipe
from mtft.training.export.export import check_tensors
from mtft.training.export.export_run import export_run
from mtft.training.export.proof import ReloadResult, probe_logits, write_probe
from mtft.training.run_training import train
from tests.training.export.test_end_faults import NO_ROOM, plant_process


def finished(recipe, folder, *, prove=False, **changes):
    steps = {**recipe["train"], "steps": 4}
    whole = Recipe.model_validate({**recipe, "train": steps, **changes, "output": {"dir": str(folder)}})
    return whole, train(whole, quiet=True, prove=prove)


def logits(model):
    with torch.no_grad():
        return model.eval()(input_ids=torch.arange(3, 40)[None], use_cache=False).logits


@pytest.fixture(scope="module")
def proved(recipe, cold_proofs, tmp_path_factory):
    """(recipe, result) of one run for the tests that only read what it left."""
    return finished(recipe, tmp_path_factory.mktemp("proved") / "run", prove=True)


def test_adapter_is_proved_in_a_fresh_process(proved):
    _, result = proved
    written = json.loads((result.adapter_dir.parent / "result.json").read_text())
    assert written["proof"] <= 1e-5
    assert sorted(path.name for path in result.adapter_dir.iterdir()) == [
        ".mtft_files.json",
        "README.md",
        "adapter_config.json",
        "adapter_model.safetensors",
        "base.json",
        "chat_template.jinja",
        "generation_config.json",
        "tokenizer.json",
        "tokenizer_config.json",
    ]
    card = (result.adapter_dir / "README.md").read_text()
    assert all(text in card for text in ("| copy | 0.500 |", "exact_match", "torch ", "learning_rate: 0.005"))
    assert "User: What is the capital of Italy?\n\nAssistant:" in card  # the base has no template: the default one


def test_a_replaced_export_with_files_of_the_user_is_kept(recipe, tmp_path, monkeypatch):
    plant_process(monkeypatch, NO_ROOM)
    _, result = finished(recipe, tmp_path / "run")
    assert result.adapter_dir is not None
    own = result.adapter_dir / "notes" / "mine.txt"
    (result.adapter_dir.parent / "result.json").unlink()
    export_run(tmp_path / "run", quiet=True)  # nothing of another: replaced
    assert not list((tmp_path / "run").glob("adapter.*"))

    own.parent.mkdir()
    own.write_text("where I tried it")
    for number in (1, 2):
        (result.adapter_dir.parent / "result.json").unlink()
        with pytest.warns(UserWarning, match=rf"notes/mine.txt'.*kept as adapter\.before-{number}"):
            export_run(tmp_path / "run", quiet=True)
        kept = tmp_path / "run" / f"adapter.before-{number}"
        assert (kept / "notes" / "mine.txt").read_text() == "where I tried it"
        assert (kept / "adapter_model.safetensors").is_file()
        assert not own.exists()
        (kept / "notes").rename(own.parent)


@pytest.mark.slow
def test_the_script_of_the_card_runs_as_it_stands(proved, tmp_path):
    card = (proved[1].adapter_dir / "README.md").read_text()
    (tmp_path / "script.py").write_text(card.split("```python\n")[1].split("```")[0])
    done = subprocess.run([sys.executable, "script.py"], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.slow
def test_plain_script_without_mtft_loads_it(proved, tmp_path):
    whole, result = proved
    code = (
        "import sys; from transformers import AutoModelForCausalLM; from peft import PeftModel\n"
        "model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(sys.argv[1]), sys.argv[2])\n"
        "assert not any(name.startswith('mtft') for name in sys.modules)\n"
        "print(sum(p.numel() for n, p in model.named_parameters() if 'lora_' in n))\n"
    )
    command = [sys.executable, "-c", code, whole.model.path, str(result.adapter_dir)]
    found = subprocess.run(command, capture_output=True, text=True, check=True, cwd=tmp_path)
    saved = load_file(result.adapter_dir / "adapter_model.safetensors")
    assert int(found.stdout) == sum(value.numel() for value in saved.values())


def test_evaluation_of_the_export_equals_the_run_s_own(proved):
    whole, result = proved
    again = evaluate(whole, result.adapter_dir)
    for task, scores in result.scores.items():
        assert again[task].summary() == pytest.approx(scores.summary(), rel=1e-6)
    only = evaluate(whole, None, ModelSection(path=whole.model.path, dtype="fp32"), tasks=["shout"])
    assert list(only) == ["shout"]
    assert only["shout"].summary()["loss"] > scores.summary()["loss"]
    found = as_json(again, whole)["copy"]
    assert found["interval"]["loss"][0] < found["loss"] < found["interval"]["loss"][1]


def test_adapter_of_another_shape_is_refused(proved, tmp_path):
    from tests.training.conftest import write_model

    whole, result = proved
    other = write_model(tmp_path / "wide", hidden=64)
    with pytest.raises(UserError, match="does not fit"):
        evaluate(whole, result.adapter_dir, ModelSection(path=str(other), dtype="fp32"))
    with pytest.raises(UserError, match=r"adapter_config\.json"):
        evaluate(whole, tmp_path)


def test_full_fine_tuning_exports_a_whole_model(recipe, tmp_path):
    _, result = finished(recipe, tmp_path / "run", lora=None)
    assert result.adapter_dir == tmp_path / "run" / "model"
    saved = {path.name for path in result.adapter_dir.iterdir()}
    assert {"config.json", "model.safetensors", "tokenizer.json", "README.md"} <= saved
    base = AutoModelForCausalLM.from_pretrained(recipe["model"]["path"])
    assert not torch.equal(logits(AutoModelForCausalLM.from_pretrained(result.adapter_dir)), logits(base))


@pytest.mark.parametrize("init", ["pissa", pytest.param("olora", marks=pytest.mark.slow)])
def test_adapter_that_changes_the_base_is_converted_for_the_unchanged_base(recipe, tmp_path, init):
    whole, result = finished(recipe, tmp_path / "run", lora={"r": 4, "alpha": 8, "init": init})
    config = json.loads((result.adapter_dir / "adapter_config.json").read_text())
    assert config["r"] == 8
    assert config["init_lora_weights"] is True
    before, after = evaluate(whole), evaluate(whole, result.adapter_dir)
    for task, scores in result.scores.items():
        assert after[task].summary()["loss"] == pytest.approx(scores.summary()["loss"], rel=1e-5)
        assert after[task].summary()["loss"] < before[task].summary()["loss"]


def test_empty_or_missing_tensors_are_refused(tmp_path):
    save_file({"lora_A.weight": torch.zeros(0)}, tmp_path / "adapter_model.safetensors")
    with pytest.raises(ValueError, match="is empty"):
        check_tensors(tmp_path, must="lora_")
    save_file({"other.weight": torch.zeros(2)}, tmp_path / "adapter_model.safetensors")
    with pytest.raises(ValueError, match="holds no tensor"):
        check_tensors(tmp_path, must="lora_")
    save_file({"lora_A.weight": torch.full((2,), torch.nan)}, tmp_path / "adapter_model.safetensors")
    with pytest.raises(UserError, match="not finite"):
        check_tensors(tmp_path, must="lora_")


@pytest.mark.slow
def test_proof_fails_when_the_export_is_not_what_was_trained(recipe, proved, tmp_path):
    whole, result = proved
    adapter = shutil.copytree(result.adapter_dir, tmp_path / "adapter")
    base = AutoModelForCausalLM.from_pretrained(recipe["model"]["path"], dtype=torch.float32)
    model, device = PeftModel.from_pretrained(base, adapter), torch.device("cpu")
    file = adapter / "adapter_model.safetensors"
    save_file({name: value * 2 for name, value in load_file(file).items()}, file, metadata={"format": "pt"})
    write_probe(model, probe_logits(model, device), whole, tmp_path / "proof")
    with (
        ReloadResult(adapter, tmp_path / "proof", device) as proof,
        pytest.raises(RuntimeError, match="differ from the trained model's"),
    ):
        proof.result()


def test_a_kill_while_the_old_export_is_removed_leaves_it_no_stranger(recipe, tmp_path, monkeypatch):
    """Half of an export, without its list, would pass for somebody's own folder."""
    plant_process(monkeypatch, NO_ROOM)
    _, result = finished(recipe, tmp_path / "run")
    assert result.adapter_dir is not None
    (tmp_path / "run" / "result.json").unlink()
    really, removed = shutil.rmtree, []

    def killed(path, *arguments, **options):
        if (Path(path) / ".mtft_files.json").is_file():
            removed.append(path)
            (Path(path) / ".mtft_files.json").unlink()
            raise KeyboardInterrupt
        really(path, *arguments, **options)

    monkeypatch.setattr(shutil, "rmtree", killed)
    with pytest.raises(KeyboardInterrupt):
        export_run(tmp_path / "run", quiet=True)
    monkeypatch.setattr(shutil, "rmtree", really)
    assert removed
    export_run(tmp_path / "run", quiet=True)
    assert [path.name for path in sorted((tmp_path / "run").glob("adapter*"))] == ["adapter"]
