"""The paths are each other's oracle; the reference is cross-entropy on full fp32 logits."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from mtft.common.errors import UserError
from mtft.data.batching.batch import IGNORE
from mtft.losses.token_nll import add_fused_head, resolve_path, token_nll
from mtft.losses.token_scores import BUFFERS, token_scores
from tests.losses.builders import gradient, isolated_inputs, lay_out, new_llama, random_samples, tiny_llama

SHAPE = [(0, 9, 5), (0, 4, 2), (1, 7, 6), (1, 12, 3), (2, 5, 4), (0, 6, 0)]


def packed_batch():
    samples = random_samples(SHAPE, vocabulary=61)
    return lay_out([samples[:3], samples[3:]])


def full_logits_nll(model, batch, **options):
    logits_BTV = model(**isolated_inputs(batch)).logits.float()
    nll_BT = F.cross_entropy(
        logits_BTV.transpose(1, 2), batch.labels_BT, ignore_index=IGNORE, reduction="none", **options
    )
    return logits_BTV, nll_BT


class OldForward(nn.Module):
    """A causal model whose forward knows no `logits_to_keep`."""

    def __init__(self, inner):
        super().__init__()
        self.inner = [inner]  # a list: not a submodule, so that this is the model

    def forward(self, input_ids, **kwargs):
        return self.inner[0](input_ids=input_ids, **kwargs)


@pytest.mark.parametrize("path", ["gather", "gather, kept", "gather in chunks", "old forward", "chunked", "fused"])
def test_paths_agree(path):
    batch, model = packed_batch(), tiny_llama()
    c_BT = torch.randn(batch.labels_BT.shape, generator=torch.Generator().manual_seed(1))
    _, reference_BT = full_logits_nll(model, batch)
    options = {"inputs": isolated_inputs(batch)}
    if path == "gather, kept":
        options["many_backwards"] = True
    if path == "gather in chunks":
        options["chunk_rows"] = 3
    if path == "chunked":
        options["path"] = "chunked"
    if path == "fused":
        options["path"] = "fused"
        model = new_llama()  # another object with the same weights: the head stays with it
        add_fused_head(model)
    nll_BT = token_nll(OldForward(model) if path == "old forward" else model, batch, **options)
    assert nll_BT.dtype == torch.float32
    torch.testing.assert_close(nll_BT, reference_BT, atol=1e-5, rtol=0)
    expected, got = gradient(tiny_llama(), (c_BT * reference_BT).sum()), gradient(model, (c_BT * nll_BT).sum())
    assert float((got - expected).norm() / expected.norm()) < 2e-6


def test_packed_examples_are_isolated_without_being_told():
    """No `inputs` given: they come from mtft.data.batching.packed_attention, and equal the dense mask of the tests."""
    batch, model = packed_batch(), tiny_llama()
    expected_BT = token_nll(model, batch, inputs=isolated_inputs(batch))
    torch.testing.assert_close(token_nll(model, batch), expected_BT, atol=1e-5, rtol=0)
    torch.testing.assert_close(token_scores(model, batch)[0], expected_BT.detach(), atol=1e-5, rtol=0)


@pytest.mark.parametrize("chunk_rows", [None, 4])
def test_nothing_supervised_is_a_connected_zero(chunk_rows):
    sample = random_samples([(0, 6, 0)], vocabulary=61)
    model, batch = tiny_llama(), lay_out([sample])
    nll_BT = token_nll(model, batch, inputs=isolated_inputs(batch), chunk_rows=chunk_rows)
    assert nll_BT.requires_grad
    assert not nll_BT.any()
    assert not gradient(model, nll_BT.sum()).any()  # also: every parameter has one, none is NaN


def test_scores():
    batch, model = packed_batch(), tiny_llama()
    logits_BTV, reference_BT = full_logits_nll(model, batch)
    supervised_BT = batch.labels_BT != IGNORE
    for rows in (4, 1000):
        bound = rows * BUFFERS * 4 * 61
        nll_BT, hit_BT = token_scores(model, batch, inputs=isolated_inputs(batch), max_logit_bytes=bound)
        torch.testing.assert_close(nll_BT, reference_BT, atol=1e-5, rtol=0)
        assert torch.equal(hit_BT, (logits_BTV.argmax(-1) == batch.labels_BT) & supervised_BT)
        assert not nll_BT.requires_grad
    nll_BT, hit_BT = token_scores(model, lay_out([[]], width=3), inputs=isolated_inputs(lay_out([[]], width=3)))
    assert not nll_BT.any()
    assert not hit_BT.any()


def test_a_hit_is_found():
    batch, model = packed_batch(), tiny_llama()
    best_BT = model(**isolated_inputs(batch)).logits.argmax(-1)
    supervised_BT = batch.labels_BT != IGNORE
    batch.labels_BT[supervised_BT] = best_BT[supervised_BT]
    _, hit_BT = token_scores(model, batch, inputs=isolated_inputs(batch))
    assert torch.equal(hit_BT, supervised_BT)


def test_label_smoothing_and_z_loss():
    batch, model = packed_batch(), tiny_llama()
    logits_BTV, smoothed_BT = full_logits_nll(model, batch, label_smoothing=0.1)
    expected_BT = smoothed_BT + 1e-2 * logits_BTV.logsumexp(-1).square() * (batch.labels_BT != IGNORE)
    nll_BT = token_nll(model, batch, inputs=isolated_inputs(batch), label_smoothing=0.1, z_loss=1e-2)
    torch.testing.assert_close(nll_BT, expected_BT, atol=1e-5, rtol=0)
    with pytest.raises(UserError, match="label smoothing"):
        token_nll(model, batch, inputs=isolated_inputs(batch), path="fused", z_loss=1e-4)


class LargestTensor(TorchDispatchMode):
    """The largest number of elements that any operation returns: counts logits that exist only for a moment too."""

    elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, tuple | list) else [result]:
            if isinstance(tensor, torch.Tensor):
                self.elements = max(self.elements, tensor.numel())
        return result


@pytest.mark.parametrize("score", [token_nll, token_scores])
def test_logits_exist_for_supervised_positions_only(score):
    batch, model = packed_batch(), tiny_llama(vocabulary=4001)
    with LargestTensor() as largest:
        score(model, batch, inputs=isolated_inputs(batch))
    supervised = int((batch.labels_BT != IGNORE).sum())
    weights = max(parameter.numel() for parameter in model.parameters())
    assert largest.elements == max(supervised * 4001, weights) < batch.labels_BT.numel() * 4001


def test_peft_is_seen_through():
    from peft import LoraConfig, get_peft_model

    batch = packed_batch()
    _, reference_BT = full_logits_nll(tiny_llama(4001), batch)
    model = get_peft_model(new_llama(4001), LoraConfig(r=2, target_modules="all-linear"))
    with LargestTensor() as largest:
        nll_BT = token_nll(model, batch, inputs=isolated_inputs(batch))
    torch.testing.assert_close(nll_BT, reference_BT, atol=1e-5, rtol=0)
    assert largest.elements < batch.labels_BT.numel() * 4001


@pytest.mark.parametrize("found", ["1.14.2", "0.29.1"])
def test_an_old_trl_has_no_fused_head(monkeypatch, found):
    monkeypatch.setattr("mtft.losses.token_nll.version", lambda name: found)
    with pytest.raises(UserError, match=r"needs trl 1\.15"):
        resolve_path("fused")


def test_resolve_path():
    for path in ("auto", "gather", "chunked"):
        assert resolve_path(path) == path
    with pytest.raises(UserError, match="unknown loss path 'liger'"):
        resolve_path("liger")
