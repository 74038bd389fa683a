"""Packed examples never see each other (R9): bit-equal losses, equal gradients, for every family that may be packed.

The models are tiny and random; what is tested is how transformers treats positions and masks for the family.
"""

import dataclasses

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from mtft.common.packed_families import BY_BORDERS, BY_POSITIONS
from mtft.data.batching.batches import collate
from mtft.data.batching.packed_attention import model_inputs, packing_refusal
from tests.models.tiny_families import EXPERTS, EXTRA, SIZE, examples, tiny


def losses(model, batch, attention="sdpa", **extra):
    logits = model(**(model_inputs(batch, attention) | extra)).logits
    nll = torch.nn.functional.cross_entropy(logits.transpose(1, 2), batch.labels_BT, reduction="none")
    return nll


EAGER_ONLY = ("gemma2",)  # what transformers offers for it on CPU


def attentions(family):
    ours = ["segments"] if family in BY_BORDERS else []
    return ["eager"] if family in EAGER_ONLY else ["sdpa", "eager", *ours]


CASES = [(family, attention) for family in sorted(BY_POSITIONS) for attention in attentions(family)]
# flex attention has one mask builder for all families, and compiles for half a minute on CPU
FLEX = [pytest.param(family, "flex_attention", marks=pytest.mark.slow) for family in ("llama", "qwen3")]


@pytest.mark.parametrize("family, attention", CASES + FLEX)
def test_other_examples_never_matter(family, attention):
    model = tiny(family, attention)
    row = examples([9, 14, 7])
    other = [examples([9, 14, 7], seed=1)[0], row[1], examples([9, 14, 7], seed=2)[2]]
    with torch.no_grad():
        before = losses(model, collate([row], 0), attention)
        after = losses(model, collate([other], 0), attention)
        alone = losses(model, collate([[row[1]]], 0), attention)
    middle = slice(9, 23)
    if family in EXPERTS:  # the rows of an expert's product depend on who else chose it: rounding, not leaking
        torch.testing.assert_close(before[0, middle], after[0, middle], atol=1e-6, rtol=0)
    else:
        assert torch.equal(before[0, middle], after[0, middle])
    assert not torch.equal(before[0, :8], after[0, :8])
    torch.testing.assert_close(before[0, middle], alone[0], atol=1e-5, rtol=0)


@pytest.mark.parametrize("family", sorted(BY_POSITIONS))
def test_packed_gradients_are_unpacked_gradients(family):
    row = examples([9, 14, 7, 3])
    gradients = []
    for rows in ([row], [row[:2], row[2:]], [[one] for one in row]):
        model = tiny(family, attentions(family)[0])
        losses(model, collate(rows, 0), attentions(family)[0]).sum().div(29).backward()
        gradients.append(torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None]))
    for other in gradients[1:]:
        torch.testing.assert_close(other, gradients[0], atol=1e-6, rtol=0)


def test_padding_never_matters():
    model = tiny("llama")
    short, long = examples([6]), examples([20], seed=3)
    batch = collate([short, long], 0)
    ids = batch.input_ids_BT.clone()
    ids[0, 6:] = 33
    with torch.no_grad():
        before = losses(model, batch)
        after = losses(model, dataclasses.replace(batch, input_ids_BT=ids))
    assert torch.equal(before[0, :6], after[0, :6])


def test_a_batch_of_padding_only_is_finite():
    for attention in ("sdpa", "eager"):
        model = tiny("llama", attention)
        logits = model(**model_inputs(collate([], 0), attention)).logits
        assert logits.isfinite().all()


@pytest.mark.parametrize("trap", [{"attention_mask": torch.ones(1, 30, dtype=torch.long)}, {"use_cache": True}])
def test_the_traps_are_real(trap):
    """If transformers mends these, isolation.py can become simpler."""
    model = tiny("llama")
    row = examples([9, 14, 7])
    other = [examples([9, 14, 7], seed=1)[0], *row[1:]]
    with torch.no_grad():
        before, after = (losses(model, collate([r], 0), **trap) for r in (row, other))
    assert (before - after)[0, 9:].abs().max() > 1e-3


def test_the_guard_is_needed():
    """A state-space model carries its state over the borders: such a family must not be in the list."""
    model = tiny("falcon_h1")
    row = examples([9, 14, 7])
    other = [examples([9, 14, 7], seed=1)[0], *row[1:]]
    with torch.no_grad():
        before, after = (losses(model, collate([r], 0)) for r in (row, other))
    assert (before - after)[0, 9:].abs().max() > 1e-5
    assert "not proven" in packing_refusal(model.config, "sdpa")


def test_guard():
    assert packing_refusal(tiny("llama").config, "sdpa") is None
    assert packing_refusal(tiny("gemma3_text").config, "flash_attention_2") is None
    assert packing_refusal(tiny("gpt2").config, "sdpa") is None
    assert "'paged_sdpa'" in packing_refusal(tiny("llama").config, "paged_sdpa")
    yarn = AutoConfig.for_model(
        "llama", **SIZE, rope_parameters={"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}
    )
    assert "dynamic" in packing_refusal(yarn, "sdpa")
    packed = collate([examples([3, 4])], 0)
    with pytest.raises(ValueError, match="several examples"):
        model_inputs(packed, "sdpa", packed_ok=False)
    with pytest.raises(ValueError, match="not isolated"):
        model_inputs(packed, "something_else")
    single = collate([examples([3]), examples([4])], 0)
    assert "attention_mask" not in model_inputs(single, "something_else", packed_ok=False)


@pytest.mark.parametrize("family", ["bloom", "mamba", "gpt_oss", "falcon_h1"])
def test_other_families_get_what_every_causal_model_does(family):
    """bloom and mamba take no position_ids at all; padding on the right is nothing that a causal model can see."""
    extra = {"n_head": 4} if family == "bloom" else EXTRA.get(family, {})
    size = {key: value for key, value in SIZE.items() if family != "bloom" or key != "num_attention_heads"}
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **size, **extra)).eval()
    both, (short,) = [examples([12]), examples([7], seed=1)], examples([7], seed=1)
    with torch.no_grad():
        together, alone = (
            model(**model_inputs(collate(rows, 0), "eager", packed_ok=False)).logits for rows in (both, [[short]])
        )
    torch.testing.assert_close(together[1, :7], alone[0], atol=1e-5, rtol=0)


def test_varlen_borders_for_flash_attention():
    """With more than one row transformers leaks unless the borders are passed; padding joins what it follows."""
    row = examples([4, 3, 5])
    inputs = model_inputs(collate([row[:2], row[2:]], 0), "flash_attention_2")
    assert inputs["cu_seq_lens_q"].tolist() == [0, 4, 7, 14]
    assert inputs["cu_seq_lens_q"].dtype == torch.int32
    assert (inputs["max_length_q"], inputs["max_length_k"]) == (7, 7)
