"""What adapted layers keep of their input for the backward pass, by saved-tensor hooks, beside PEFT's own way."""

import pytest
import torch
from peft.tuners.lora import LoraLayer
from transformers import LlamaConfig, LlamaForCausalLM

from mtft.models import lora
from mtft.models.lora import add_lora
from mtft.recipe.schema.lora import LoraSection

IDS = torch.arange(2 * 64).view(2, 64) % 97
SECTION = {"r": 4, "targets": "all-linear"}


def adapted(monkeypatch, *, shared=True, dtype=torch.bfloat16, **section):
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=97,
        hidden_size=64,
        intermediate_size=176,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        pad_token_id=0,
    )
    base = LlamaForCausalLM(config).to(dtype)
    with monkeypatch.context() as patch:
        if not shared:
            patch.setattr(lora, "share_inputs", lambda _: None)
        model = add_lora(base, LoraSection(**SECTION | section), seed=3).train()
    torch.manual_seed(1)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    return model


def step(model, autocast=True):
    """(bytes saved by the forward pass beside parameters, loss, gradients)."""
    held = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    saved = {}

    def keep(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in held:
            saved[storage.data_ptr()] = storage.nbytes()
        return tensor

    torch.manual_seed(2)
    hooks = torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x)
    with hooks, torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
        loss = model(input_ids=IDS, labels=IDS, use_cache=False).loss
    loss.backward()
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return sum(saved.values()), loss.detach(), gradients


def same(one, other):
    assert torch.equal(one[1], other[1])
    assert one[2].keys() == other[2].keys()
    for name, gradient in one[2].items():
        assert torch.equal(gradient, other[2][name]), name


def test_one_input_is_kept_once(monkeypatch):
    ours = step(adapted(monkeypatch))
    theirs = step(adapted(monkeypatch, shared=False))
    assert ours[0] < 0.85 * theirs[0]
    assert all(gradient.dtype == torch.float32 for gradient in ours[2].values())
    same(ours, theirs)


@pytest.mark.parametrize(
    "section",
    [{"dropout": 0.1}, {"dora": True}, {"dtype": torch.float32}, {"autocast": False}],
    ids=lambda section: next(iter(section)),
)
def test_what_is_left_alone(monkeypatch, section):
    """Equal numbers; outside of autocast PEFT's cast is what makes the precisions fit."""
    autocast = section.get("autocast", section.get("dtype") != torch.float32)
    changes = {key: value for key, value in section.items() if key != "autocast"}
    same(*(step(adapted(monkeypatch, shared=shared, **changes), autocast) for shared in (True, False)))


@pytest.mark.parametrize(("dtype", "hooks"), [(torch.float32, 0), (torch.bfloat16, 1)])
def test_a_base_in_fp32_is_not_hooked(monkeypatch, dtype, hooks):
    """It is computed without autocast: nothing would be gained, in every adapted layer of every step."""
    layers = [module for module in adapted(monkeypatch, dtype=dtype).modules() if isinstance(module, LoraLayer)]
    assert layers
    assert {len(layer._forward_pre_hooks) for layer in layers} == {hooks}


def test_a_pass_without_autocast_after_one_with_it(monkeypatch):
    """A check on the exported weights, between two steps."""
    model = adapted(monkeypatch)
    step(model)
    with torch.no_grad():
        logits = model(input_ids=IDS, use_cache=False).logits
    assert torch.isfinite(logits).all()
