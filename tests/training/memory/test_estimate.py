"""The memory estimate against what real models hold and what autograd really keeps."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from mtft.recipe.load import load_recipe
from mtft.training.build_model import load_for_training
from mtft.training.memory.activation_peak import LiveBytes, activation_peak
from mtft.training.memory.estimate import estimate_memory
from mtft.training.memory.memory_estimate import MemoryEstimate

RECIPE = """\
name: memory
model: {path: "quickstart:weak", dtype: fp32}
tasks: [{name: a, data: a.jsonl}]
train: {steps: 1, micro_batch_tokens: 1000, max_length: 100}
output: {dir: runs/memory}
"""


@pytest.fixture
def estimate(tmp_path):
    (tmp_path / "recipe.yaml").write_text(RECIPE)

    def estimate(*overrides: str, **options) -> MemoryEstimate:
        return estimate_memory(load_recipe(tmp_path / "recipe.yaml", overrides, files=False), **options)

    return estimate


@pytest.mark.parametrize(
    "overrides", [["lora.r=4"], ["lora.targets=[q_proj, v_proj]", "lora.init=orthogonal"], ["lora=null"]]
)
def test_parameters_and_their_bytes_are_those_of_the_real_model(tmp_path, estimate, overrides):
    (tmp_path / "recipe.yaml").write_text(RECIPE)
    found = estimate(*overrides)
    model = load_for_training(load_recipe(tmp_path / "recipe.yaml", overrides, files=False))
    assert found.parameters == sum(parameter.numel() for parameter in model.parameters())
    assert found.trainable == sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    assert found.weights == sum(parameter.numel() * parameter.itemsize for parameter in model.parameters())
    assert found.training == found.trainable * 12  # fp32 gradient and Adam's two moments


def tiny(device: str = "meta", **changes) -> LlamaForCausalLM:
    sizes = {
        "hidden_size": 64,
        "intermediate_size": 160,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "vocab_size": 300,
    }
    with torch.device(device):
        return LlamaForCausalLM(LlamaConfig(**sizes | changes))


def test_live_bytes_come_and_go():
    known = torch.ones(1000)
    with LiveBytes([known]) as live:
        assert known.view(10, 100).sum().shape == ()  # a view is nothing new, and the sum is gone
        assert (live.now, live.peak) == (0, 4)
        first = known * 2
        second = first[:10] + 1
        assert (live.now, live.peak) == (4040, 4040)
        del first
        assert live.now == 40
        third = torch.zeros(100, dtype=torch.float64)
        del second, third
    assert (live.now, live.peak) == (0, 4040)


PLAYED = {"rows": 2, "width": 48, "supervised": 40, "packed": True}


def test_what_is_kept_is_what_autograd_keeps_on_data():
    """Counted on a real forward pass with hooks on what is saved: distinct storages that are no parameters."""
    model = tiny("cpu")
    outside = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept = {}

    def keep(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in outside:
            kept[storage.data_ptr()] = storage
        return tensor

    mask = torch.ones(2, 1, 48, 48, dtype=torch.bool)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        hidden = model.model(torch.zeros(2, 48, dtype=torch.long), attention_mask=mask, use_cache=False)[0]
    saved = sum(storage.nbytes() for storage in kept.values())
    found = activation_peak(tiny(), **PLAYED)
    assert saved <= found.kept <= 1.05 * saved + 3 * hidden.nbytes  # and what the caller holds


def test_peak_by_hand_without_layers():
    """Embedding, norm and head alone: the logits and their one buffer are what matters."""
    found = activation_peak(tiny(num_hidden_layers=0, vocab_size=5000), **{**PLAYED, "supervised": 96})
    logits, table = 96 * 5000 * 4, 5000 * 64 * 4
    assert found.logits == pytest.approx(logits, rel=0.02)
    # the gradient of the head's weight joins the logits, then that of the embedding; few small tensors beside them
    assert logits + table <= found.peak <= 1.1 * (logits + 2 * table)


def test_twice_the_layers_keep_twice_as_much():
    one, two = (activation_peak(tiny(num_hidden_layers=layers), **PLAYED).kept for layers in (2, 4))
    assert two == pytest.approx(2 * one, rel=0.1)


def test_gradients_of_an_earlier_micro_batch_count():
    once, again = (activation_peak(tiny(), **PLAYED, accumulates=accumulates).peak for accumulates in (False, True))
    weights = sum(p.numel() * 4 for p in tiny().parameters())
    assert once < again <= once + weights


@pytest.mark.slow
@pytest.mark.parametrize("name", ["LoRA fp32", "full fp32", "LoRA bf16", "LoRA, checkpointing", "LoRA, vocabulary 64k"])
def test_within_15_percent_of_the_measured_peak(name):
    sys.path.insert(0, str(Path(__file__).parents[3] / "scripts"))
    try:
        import check_memory
    finally:
        del sys.path[0]
    found = check_memory.compare(name)
    assert found["estimate"] == pytest.approx(found["peak"], rel=check_memory.BAR)


@pytest.mark.slow
def test_what_makes_it_smaller(estimate):
    plain = estimate()
    assert estimate("train.gradient_checkpointing=true").activations < 0.5 * plain.activations
    assert estimate("train.micro_batch_tokens=500").activations == pytest.approx(plain.activations / 2, rel=0.1)
    assert estimate(learnt_share=0.25).logits < 0.3 * plain.logits
    assert estimate("model.dtype=bf16").weights < plain.weights
    assert estimate("model.quantise=nf4").weights < estimate("model.quantise=int8").weights < plain.weights
    assert estimate("train.optimizer=adamw_8bit").training < plain.training
    assert estimate("train.optimizer=lion").training == plain.training - 4 * plain.trainable
    assert estimate("lora.freeze_a=true").training < 0.8 * plain.training
    assert estimate("lora.freeze_a=true").activations < plain.activations
    assert plain.total == plain.weights + plain.training + plain.activations + plain.logits
    assert "parameters are trained" in plain.text()
