"""The memory estimate against what real models hold and what autograd really keeps."""

from __future__ import annotations

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from mtft.recipe.load import load_recipe
from mtft.train.memory import MemoryEstimate, estimate_memory, kept_per_token
from mtft.train.model import load_for_training

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


def tiny(device: str = "cpu", **changes) -> LlamaForCausalLM:
    sizes = {
        "hidden_size": 64,
        "intermediate_size": 160,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "vocab_size": 300,
    }
    with torch.device(device):
        return LlamaForCausalLM(LlamaConfig(**sizes | changes))


def test_what_is_counted_on_shapes_is_what_autograd_keeps_on_data():
    """Equal but for attention's own buffers, which differ between the meta device and the CPU."""
    assert kept_per_token(tiny("meta")) == pytest.approx(kept_per_token(tiny()), rel=0.15)


def test_twice_the_layers_keep_twice_as_much():
    one, two = (kept_per_token(tiny("meta", num_hidden_layers=layers)) for layers in (2, 4))
    assert two == pytest.approx(2 * one, rel=0.1)


def test_what_makes_it_smaller(estimate):
    plain = estimate()
    assert estimate("train.gradient_checkpointing=true").activations < 0.5 * plain.activations
    assert estimate("train.micro_batch_tokens=500").activations == plain.activations // 2
    assert estimate(learnt_share=0.25).logits == plain.logits // 4
    assert estimate("model.dtype=bf16").weights < plain.weights
    assert estimate("model.quantise=nf4").weights < estimate("model.quantise=int8").weights < plain.weights
    assert estimate("train.optimizer=adamw_8bit").training == plain.training // 2
    assert plain.total == plain.weights + plain.training + plain.activations + plain.logits
    assert "parameters are trained" in plain.text()
