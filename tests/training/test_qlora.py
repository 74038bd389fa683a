"""QLoRA on the CPU: right gradients also after an evaluation, exact resume, an export that is proved."""

import json
import signal

import bitsandbytes as bnb
import pytest
import torch
from safetensors.torch import load_file

from mtft.evaluation.evaluation_mode import evaluation_mode
from mtft.models.loading import compute_dtype, load_base
from mtft.models.lora import add_lora
from mtft.recipe.schema.lora import LoraSection
from mtft.recipe.schema.model import ModelSection
from mtft.recipe.schema.recipe import Recipe
from mtft.training.run_training import train
from tests.training.conftest import lines, write_model
from tests.training.test_run_training import kill_at_step, run


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_model(tmp_path_factory.mktemp("wide"), hidden=128)  # blocks of 64 need wider layers


def adapted(folder, quantise):
    section = ModelSection(path=str(folder), dtype="fp32", quantise=quantise)
    model = add_lora(load_base(section), LoraSection(r=4), seed=1)
    torch.manual_seed(2)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_(0, 0.02)  # B = 0 would hide the gradients of A
    return model


def gradients(model, ids):
    model.train()
    model.zero_grad()
    model(input_ids=ids, use_cache=False).logits.float().log_softmax(-1)[..., 5].sum().backward()
    return {name: p.grad for name, p in model.named_parameters() if p.requires_grad}


def test_gradients_are_those_of_the_dequantised_base_also_after_an_evaluation(folder):
    quantised, plain = adapted(folder, "nf4"), adapted(folder, "none")
    twins = dict(plain.named_modules())
    for name, module in quantised.named_modules():
        if isinstance(module, bnb.nn.Linear4bit):
            weight = bnb.functional.dequantize_4bit(module.weight.data, module.weight.quant_state)
            twins[name].weight.data.copy_(weight)
    ids = torch.randint(3, 250, (2, 17), generator=torch.Generator().manual_seed(0))
    with evaluation_mode(quantised), torch.no_grad():
        quantised(input_ids=ids, use_cache=False)
    found, expected = gradients(quantised, ids), gradients(plain, ids)
    scale = max(float(value.abs().max()) for value in expected.values())
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=1e-4, atol=1e-5 * scale)


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_fsdp_gets_the_same_bytes_in_tensors_of_floats(folder, monkeypatch, dtype):
    """Of which some read as NaN: the check for damaged files has to let them be."""
    section = ModelSection(path=str(folder), dtype=dtype, quantise="nf4")
    plain = dict(load_base(section).named_parameters())
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    monkeypatch.setenv("FSDP_VERSION", "2")
    found = dict(load_base(section).named_parameters())
    bytewise = [name for name, parameter in plain.items() if parameter.dtype == torch.uint8]
    assert len(bytewise) == 14  # 7 linears in each of two layers
    assert {parameter.dtype for parameter in found.values()} == {compute_dtype(section)}
    for name in bytewise:
        assert torch.equal(found[name].data.view(torch.uint8).flatten(), plain[name].data.flatten())
    assert dtype == "bf16" or any(found[name].isnan().any() for name in bytewise)


@pytest.mark.slow
@pytest.mark.parametrize("quantise", ["nf4", "int8"])
def test_trains_resumes_bit_equal_and_is_proved_also_on_the_unquantised_base(recipe, folder, tmp_path, quantise):
    model = {"path": str(folder), "dtype": "fp32", "quantise": quantise}

    def asked(name):
        output = {"dir": str(tmp_path / name), "save_every": 3}
        return Recipe.model_validate({**recipe, "model": model, "output": output})

    train(asked("run"), quiet=True)
    evals = lines(tmp_path / "run", "eval.jsonl")
    for task, found in evals[-1]["tasks"].items():
        assert found["loss"] < evals[0]["tasks"][task]["loss"]
    result = json.loads((tmp_path / "run" / "result.json").read_text())
    assert result["proof"] < 3e-2
    other = result["unquantised_base"]
    assert result["proof"] < other["logits"] < 0.5  # 4 or 8 bit against 32: seen, and not another model
    assert 0 <= other["same_top_token"] <= 1
    card = (tmp_path / "run" / "adapter" / "README.md").read_text()
    assert f"quantised to {quantise}" in card
    assert f"differ by up to {other['logits']:.1e} of the largest logit" in card

    broken = asked("broken")
    assert run(broken, kill_at_step(5)) == -signal.SIGKILL
    assert (tmp_path / "broken" / "checkpoint-3").is_dir()
    assert run(broken) == 0
    left, right = (load_file(tmp_path / name / "adapter" / "adapter_model.safetensors") for name in ("run", "broken"))
    assert all(torch.equal(right[name], value) for name, value in left.items())
