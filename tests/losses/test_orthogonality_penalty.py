"""OrthoReg: by hand, and against the D^T D that it avoids."""

from __future__ import annotations

import pytest
import torch

from mtft.losses.orthogonality_penalty import adapter_orthogonality, orthogonality
from tests.losses.builders import new_llama, tiny_llama


def dense(A, B, scale, form):
    gram = (scale * B @ A).T @ (scale * B @ A)
    return (
        ((gram - torch.diag(gram.diagonal())) if form == "off_diagonal" else gram - torch.eye(len(gram))).square().sum()
    )


def test_golden():
    A, B = torch.tensor([[1.0, 1], [0, 1]]), torch.tensor([[1.0, 0], [0, 2], [0, 0]])  # D^T D = [[1, 1], [1, 5]]
    assert float(orthogonality(A, B, 1.0, "full")) == 18
    assert float(orthogonality(A, B, 1.0)) == 2


@pytest.mark.parametrize("form", ["off_diagonal", "full"])
def test_value_and_gradient_of_the_dense_form(form):
    generator = torch.Generator().manual_seed(0)
    A = torch.randn(3, 7, generator=generator, dtype=torch.float64, requires_grad=True)
    B = torch.randn(5, 3, generator=generator, dtype=torch.float64, requires_grad=True)
    ours, reference = orthogonality(A, B, 0.7, form), dense(A, B, 0.7, form)
    torch.testing.assert_close(ours, reference)
    for got, expected in zip(torch.autograd.grad(ours, (A, B)), torch.autograd.grad(reference, (A, B)), strict=True):
        torch.testing.assert_close(got, expected)


def test_over_a_peft_model():
    from peft import LoraConfig, get_peft_model

    with pytest.raises(ValueError, match="no LoRA linear"):
        adapter_orthogonality(tiny_llama())
    config = LoraConfig(r=2, lora_alpha=6, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    model = get_peft_model(new_llama(), config)
    layers = [(m.lora_A["default"].weight, m.lora_B["default"].weight) for m in model.modules() if hasattr(m, "lora_A")]
    assert len(layers) == 4
    expected = sum(dense(A, B, 3.0, "off_diagonal") for A, B in layers)
    torch.testing.assert_close(adapter_orthogonality(model), expected, rtol=1e-4, atol=1e-4)
