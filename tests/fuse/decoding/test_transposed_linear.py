"""The output layer for few rows gives what nn.Linear gives, whatever the number of rows, and shares its weight."""

import pytest
import torch
from torch import nn

from mtft.fuse.alpha.buffers import FusionBuffers
from mtft.fuse.decoding import transposed_linear
from tests.fuse import tiny


@pytest.mark.parametrize("shape", [(1, 1), (2, 1), (1, 5), (2, 4), (3, 3)])
@pytest.mark.parametrize("bias", [False, True])
def test_equal_to_linear(shape, bias):
    linear = nn.Linear(16, 50, bias=bias)
    x = torch.randn(*shape, 16)
    with torch.no_grad():
        y = transposed_linear.TransposedLinear(linear)(x)
        torch.testing.assert_close(y, linear(x), atol=1e-6, rtol=1e-5)
    assert y.is_contiguous()


def test_a_model_keeps_its_weights_and_its_tie(monkeypatch):
    monkeypatch.setattr(transposed_linear, "LARGE", 1)
    model = tiny.model(3, dtype=torch.float32, tie_word_embeddings=True)
    before = {name: value.data_ptr() for name, value in model.state_dict().items()}
    ids = torch.tensor([[5, 6, 7]])
    with torch.no_grad():
        expected = model(ids).logits
        transposed_linear.transpose_lm_head(model)
        assert type(model.get_output_embeddings()) is transposed_linear.TransposedLinear
        torch.testing.assert_close(model(ids).logits, expected, atol=1e-5, rtol=1e-5)
    assert {name: value.data_ptr() for name, value in model.state_dict().items()} == before
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight


def test_a_small_head_is_left_alone():
    model = tiny.model(3)
    head = model.get_output_embeddings()
    transposed_linear.transpose_lm_head(model)
    assert model.get_output_embeddings() is head


def test_a_workspace_gives_the_same_memory_again_also_outside_of_inference_mode():
    buffers = FusionBuffers()
    with torch.inference_mode():
        first = buffers.like("a", torch.zeros(3, 4))
    first.fill_(1)
    assert buffers.like("a", torch.zeros(3, 4)) is first
    assert buffers.like("a", torch.zeros(2, 4)).data_ptr() == first.data_ptr()
    assert buffers.like("b", torch.zeros(3, 4)).data_ptr() != first.data_ptr()
    assert buffers.like("a", torch.zeros(5, 4, dtype=torch.float64)).dtype == torch.float64
