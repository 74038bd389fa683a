"""Head and cross-entropy in chunks: whole logits are the oracle, for values and all gradients; what is in memory."""

import pytest
import torch
import torch.nn.functional as F
from peft import LoraConfig, get_peft_model
from torch import nn

from mtft.common.errors import UserError
from mtft.data.batching.batches import collate
from mtft.losses import token_nll as token_nll_module
from mtft.losses.chunked_nll import MIN_ROWS, Head, chunk_rows, chunked_nll
from mtft.losses.token_nll import row_nll, takes_chunks, token_nll
from tests.losses.test_token_nll import LargestTensor
from tests.models.tiny_families import examples, tiny

N, D, V = 23, 16, 301


def problem(dtype=torch.float32, seed=0):
    """States, weight, bias, labels, and a factor for each token's loss."""
    draw = torch.Generator().manual_seed(seed)
    h, w, b = (torch.randn(*shape, generator=draw).to(dtype) for shape in ((N, D), (V, D), (V,)))
    return h, w, b, torch.randint(0, V, (N,), generator=draw), torch.randn(N, generator=draw)


def of_whole_logits(h, w, b, labels, factor, eps=0.0, z=0.0):
    return row_nll(F.linear(h, w, b) * factor, labels, eps, z)


@pytest.mark.parametrize("frozen", [(), ("weight", "bias"), ("hidden",), ("weight",)], ids=str)
@pytest.mark.parametrize("eps, z, factor", [(0.0, 0.0, 1.0), (0.1, 1e-2, 0.125)])
@pytest.mark.parametrize("rows", [1, 7, 23, 1000])
def test_values_and_gradients(frozen, eps, z, factor, rows):
    found = []
    for chunks in (False, True):
        h, w, b, labels, g = problem()
        tensors = {"hidden": h, "weight": w, "bias": b}
        for name, tensor in tensors.items():
            tensor.requires_grad_(name not in frozen)
        if chunks:
            nll = chunked_nll(h, Head(w, b, factor), labels, rows=rows, label_smoothing=eps, z_loss=z)
        else:
            nll = of_whole_logits(h, w, b, labels, factor, eps, z)
        (nll * g).sum().backward()
        found.append((nll.detach(), {name: tensor.grad for name, tensor in tensors.items()}))
    torch.testing.assert_close(found[1][0], found[0][0], atol=1e-5, rtol=1e-6)
    for name, gradient in found[0][1].items():
        assert (gradient is None) == (name in frozen)
        torch.testing.assert_close(found[1][1][name], gradient, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("trained", [False, True])
def test_in_16_bit_the_error_is_that_of_whole_logits(trained):
    """Up to one rounding more: a state's gradient is rounded before it is multiplied by its token's factor."""
    h, w, b, labels, g = problem(torch.bfloat16)
    exact = problem()
    gradients = []
    for hidden, weight, bias, nll_of in (
        (exact[0], exact[1], exact[2], lambda *x: of_whole_logits(*x, labels, 1.0)),
        (h, w, b, lambda *x: of_whole_logits(*x, labels, 1.0)),
        (h, w, b, lambda x, y, z: chunked_nll(x, Head(y, z), labels, rows=3)),
    ):
        parts = [hidden.clone().requires_grad_(), weight.clone().requires_grad_(trained), bias.clone()]
        (nll_of(*parts) * g).sum().backward()
        gradients.append([part.grad.float() for part in parts if part.grad is not None])
    for reference, whole, chunked in zip(*gradients, strict=True):
        assert (chunked - reference).norm() <= 1.3 * (whole - reference).norm()


def test_several_backward_passes():
    h, w, b, labels, g = problem()
    nll = chunked_nll(h.requires_grad_(), Head(w, b), labels, rows=5)
    first, second = (torch.autograd.grad((nll * x).sum(), h, retain_graph=True)[0] for x in (g, 2 * g))
    torch.testing.assert_close(second, 2 * first)


def test_no_rows():
    h, w, b, _, _ = problem()
    h = h[:0].requires_grad_()
    nll = chunked_nll(h, Head(w, b), torch.empty(0, dtype=torch.long))
    nll.sum().backward()
    assert nll.shape == (0,)
    assert h.grad.shape == (0, D)


def test_a_chunk_of_logits_is_all_there_ever_is():
    vocabulary, n = 150_000, 8 * chunk_rows(150_000, "cpu")
    h, w = torch.randn(n, 8, requires_grad=True), torch.randn(vocabulary, 8)
    with LargestTensor() as largest:
        chunked_nll(h, Head(w), torch.zeros(n, dtype=torch.long)).sum().backward()
    assert largest.elements <= max(n * vocabulary / 8, w.numel())


def test_rows_of_a_chunk():
    assert chunk_rows(10**9, "cpu") == MIN_ROWS
    assert chunk_rows(50_000, "cuda") > chunk_rows(50_000, "cpu") > chunk_rows(150_000, "cpu")


# Through a model: its family's factor, its head, its wrappers.


def packed():
    return collate([examples([9, 14, 7]), examples([21, 5], seed=1)], 0)


def through(model, path, **options):
    nll_BT = token_nll(model, packed(), path=path, **options)
    nll_BT.sum().backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return nll_BT.detach(), gradients


def assert_same(found, expected):
    torch.testing.assert_close(found[0], expected[0], atol=2e-5, rtol=1e-5)
    assert found[1].keys() == expected[1].keys()
    for name, gradient in expected[1].items():
        torch.testing.assert_close(found[1][name], gradient, atol=2e-5, rtol=1e-4)


# cohere and granite multiply, phi has a bias, the others do nothing
@pytest.mark.parametrize(
    "family", ["llama", "cohere", "granite", "granitemoe", "gemma3_text", "phi", "gpt2", "qwen3_moe"]
)
def test_families(family):
    model = tiny(family)
    assert_same(through(model, "chunked"), through(model, "gather"))
    assert_same(
        through(model, "chunked", label_smoothing=0.1, z_loss=1e-3),
        through(model, "gather", label_smoothing=0.1, z_loss=1e-3),
    )


def test_logits_that_are_capped_stay_whole(monkeypatch):
    model = tiny("gemma2", "eager")
    with pytest.raises(UserError, match="caps them"):
        token_nll(model, packed(), path="chunked")
    expected = through(model, "gather")
    model.get_output_embeddings().weight.requires_grad_(False)
    monkeypatch.setattr(token_nll_module, "AUTO_VOCABULARY", 10)
    assert takes_chunks(model, "auto")
    found = through(model, "auto")
    torch.testing.assert_close(found[0], expected[0], atol=1e-5, rtol=0)
    assert "forward" not in vars(model.get_output_embeddings())


def test_lora_and_checkpointing(monkeypatch):
    monkeypatch.setattr(token_nll_module, "AUTO_VOCABULARY", 10)
    model = get_peft_model(tiny("llama"), LoraConfig(r=4, init_lora_weights=False, target_modules="all-linear")).train()
    expected = through(model, "gather")
    for checkpointing in (False, True):
        if checkpointing:
            model.activation_checkpointing_enable(activation_checkpointing_kwargs={"use_reentrant": False})
        assert takes_chunks(model, "auto")
        assert_same(through(model, "auto"), expected)


def test_a_head_with_an_adapter_is_not_multiplied_past_it(monkeypatch):
    monkeypatch.setattr(token_nll_module, "AUTO_VOCABULARY", 10)
    model = get_peft_model(tiny("llama"), LoraConfig(r=4, init_lora_weights=False, target_modules=["lm_head"]))
    assert not takes_chunks(model, "auto")
    with pytest.raises(UserError, match="not a plain linear layer"):
        token_nll(model, packed(), path="chunked")


def test_auto_is_for_large_vocabularies_and_frozen_heads(monkeypatch):
    model = tiny("llama")
    assert not takes_chunks(model, "auto"), "a small one"
    monkeypatch.setattr(token_nll_module, "AUTO_VOCABULARY", 10)
    assert not takes_chunks(model, "auto"), "a head that is trained costs a product more"
    model.get_output_embeddings().weight.requires_grad_(False)
    assert takes_chunks(model, "auto")
    with torch.no_grad():
        assert not takes_chunks(model, "auto")
    assert not takes_chunks(nn.Linear(3, 3), "auto")


def test_an_error_on_the_way_leaves_the_head_as_it_was():
    model = tiny("llama")
    batch = packed()
    batch.labels_BT[batch.labels_BT != -100] = 10**6
    with pytest.raises((RuntimeError, IndexError)):
        token_nll(model, batch, path="chunked")
    assert "forward" not in vars(model.get_output_embeddings())
    assert_same(through(model, "chunked"), through(model, "gather"))
