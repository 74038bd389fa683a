"""Cross-entropy in place: torch's values and gradients, however the logits came about; never silently wrong."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from mtft.losses.token_nll import row_nll_in_place

HEADS = {  # how models make logits of [n, H] and [V, H]
    "linear": lambda h, W: h @ W.T,
    "linear of three dimensions": lambda h, W: F.linear(h[None], W)[0],
    "bias": lambda h, W: F.linear(h, W, torch.arange(float(len(W)))),
    "scaled": lambda h, W: (h @ W.T) / 8.0,
    "multiplied": lambda h, W: (h @ W.T) * 0.3,
    "capped": lambda h, W: torch.tanh((h @ W.T) / 5) * 5,
    "capped and nothing after": lambda h, W: torch.tanh(h @ W.T),
    "softmax of its own": lambda h, W: torch.softmax(h @ W.T, dim=-1),
    "16 bit": lambda h, W: h.bfloat16() @ W.T.bfloat16(),
    "rows picked": lambda h, W: (h @ W.T)[torch.tensor([True, False] * 4)],
    "large": lambda h, W: 1e4 * (h @ W.T),
}


@pytest.mark.parametrize("head", HEADS)
def test_values_and_gradients_of_torch(head):
    generator = torch.Generator().manual_seed(0)
    h = torch.randn(8, 5, generator=generator, requires_grad=True)
    W = torch.randn(13, 5, generator=generator, requires_grad=True)
    logits = HEADS[head](h, W)
    labels, c_N = torch.arange(len(logits)), torch.randn(len(logits), generator=generator)
    expected = F.cross_entropy(HEADS[head](h, W).float(), labels, reduction="none")
    got = row_nll_in_place(logits, labels)
    torch.testing.assert_close(got, expected, atol=1e-5, rtol=1e-6)
    reference = torch.autograd.grad((c_N * expected).sum(), (h, W))
    for ours, theirs in zip(torch.autograd.grad((c_N * got).sum(), (h, W)), reference, strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)


def test_no_second_buffer():
    h, W = torch.randn(4, 3, requires_grad=True), torch.randn(7, 3)
    logits = h @ W.T
    row_nll_in_place(logits, torch.zeros(4, dtype=torch.int64))
    assert bool((logits <= 1).all())  # it holds exp(logits - max) now


def test_a_second_backward_is_an_error():
    h, W = torch.randn(4, 3, requires_grad=True), torch.randn(7, 3)
    nll_N = row_nll_in_place(h @ W.T, torch.zeros(4, dtype=torch.int64))
    nll_N.sum().backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="inplace operation"):
        nll_N.sum().backward()


def test_logits_that_someone_else_owns_are_left_alone():
    logits = torch.randn(4, 7, requires_grad=True)
    before = logits.detach().clone()
    row_nll_in_place(logits, torch.zeros(4, dtype=torch.int64)).sum().backward()
    assert torch.equal(logits.detach(), before)


def test_no_rows():
    h, W = torch.zeros(0, 3, requires_grad=True), torch.randn(7, 3, requires_grad=True)
    nll_N = row_nll_in_place(h @ W.T, torch.zeros(0, dtype=torch.int64))
    nll_N.sum().backward()
    assert nll_N.shape == (0,)
    assert not W.grad.any()
