"""Task gradients on every model family that may be packed, on a quantised base, and the families that are refused."""

import pytest

from mtft.common.errors import UserError
from mtft.common.packed_families import BY_POSITIONS
from mtft.gradients.capture.task_gradients import TaskGradients
from tests.data.batching.test_packed_attention import attentions
from tests.gradients.tiny import K, batches, captured, distance, k_backwards, lora
from tests.models.tiny_families import EXPERTS, tiny

FUSED_EXPERTS = {"mixtral", "olmoe", "qwen3_moe"}  # PEFT's all-linear puts LoRA on their expert parameters too


@pytest.mark.slow
@pytest.mark.parametrize("family", sorted(BY_POSITIONS - EXPERTS | {"granitemoe"}))
def test_equals_k_backwards(family):
    model = lora(tiny(family, attentions(family)[0]))
    taps, coef_K, _ = captured(model, batches())
    assert distance(taps.jacobian(coef_K), k_backwards(model, batches())) < 1e-5


@pytest.mark.parametrize("family", sorted(FUSED_EXPERTS))
def test_adapters_on_fused_experts_are_refused_and_attention_alone_is_not(family):
    with pytest.raises(UserError, match="experts"):
        TaskGradients(lora(tiny(family)), K, isolated=True)
    model = lora(tiny(family), target_modules=["q_proj", "v_proj"])
    taps, coef_K, _ = captured(model, batches())
    assert distance(taps.jacobian(coef_K), k_backwards(model, batches())) < 1e-5


@pytest.mark.parametrize("full", [False, True], ids=["lora", "full"])
@pytest.mark.parametrize("family", sorted(FUSED_EXPERTS))
def test_around_fused_experts_what_can_be_captured_is_right(family, full):
    """Experts, their routers (and with full fine-tuning embeddings and norms) are left out, all else is not."""
    model = tiny(family) if full else lora(tiny(family))
    taps = TaskGradients(model, K, isolated=True, partial=True)
    taps, coef_K, own = captured(model, batches(), taps=taps)
    expected = k_backwards(model, batches())
    left = [name for name in taps.left_out if "embed" not in name and "norm" not in name]
    assert left
    assert all(".experts." in name or ".gate." in name for name in left)
    assert {*taps.covered, *taps.left_out} == own.keys()
    J = taps.jacobian(coef_K)
    assert distance(J, {name: expected[name] for name in J}) < 1e-5


@pytest.mark.parametrize("quantise", ["nf4", "int8"])
def test_quantised_base(quantise, tmp_path):
    """The adapter's layers are plain ones, and the base's own weights are never looked at."""
    from mtft.models.loading import load_base
    from mtft.recipe.schema.model import ModelSection
    from tests.training.conftest import write_model

    section = ModelSection(path=str(write_model(tmp_path, hidden=128)), dtype="fp32", quantise=quantise)
    model = lora(load_base(section))
    taps = TaskGradients(model, K, isolated=True)
    taps.self_check()
    captured(model, batches(), taps=taps)
    assert taps.check()
    taps, coef_K, _ = captured(model, batches())
    assert distance(taps.jacobian(coef_K), k_backwards(model, batches())) < 1e-5
