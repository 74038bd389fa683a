"""Mixture-of-experts models: the router loss is refused where asked for, and missed where routers are trained."""

import pytest
import torch
from transformers import LlamaConfig, MixtralConfig, MixtralForCausalLM

from mtft.common.errors import UserError
from mtft.losses.moe_router_loss import check_router_loss, router_warning

SIZES = {"vocab_size": 31, "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2,
         "num_key_value_heads": 2, "num_local_experts": 4}  # fmt: skip


def test_a_config_that_asks_for_it_is_refused():
    """Only with output_router_logits does transformers add it: the model's own loss shows both."""
    torch.manual_seed(0)
    asked = MixtralConfig(**SIZES, output_router_logits=True, router_aux_loss_coef=0.02)
    model, ids = MixtralForCausalLM(asked), torch.randint(0, 31, (2, 9))
    with torch.no_grad():
        with_it, without = model(ids, labels=ids), model(ids, labels=ids, output_router_logits=False)
    assert float(with_it.loss - without.loss) == pytest.approx(0.02 * float(with_it.aux_loss), rel=1e-4)
    assert without.aux_loss is None
    with pytest.raises(UserError, match=r"asks for a router loss \(output_router_logits, weight 0\.02\)"):
        check_router_loss(asked)
    check_router_loss(MixtralConfig(**SIZES))
    check_router_loss(MixtralConfig(**SIZES, output_router_logits=True, router_aux_loss_coef=0.0))
    check_router_loss(LlamaConfig())


def test_trained_routers_are_told():
    model = MixtralForCausalLM(MixtralConfig(**SIZES))
    names = [name for name, _ in model.named_parameters()]
    assert "1 routers" in router_warning(model.config, names)
    assert router_warning(model.config, [name for name in names if "gate.w" not in name]) is None
    factors = [f"base_model.model.model.layers.0.mlp.gate.lora_{factor}.default.weight" for factor in "AB"]
    assert "1 routers" in router_warning(model.config, factors)
    assert router_warning(LlamaConfig(), ["model.layers.0.mlp.gate_proj.weight", "x.gate.weight"]) is None
