"""The fused loss path multiplies with the output head's weight and never calls its layer: what is captured then."""

import pytest

from mtft.common.errors import UserError
from mtft.gradients.capture.task_gradients import TaskGradients
from mtft.losses.token_nll import add_fused_head
from tests.gradients.tiny import K, base, batches, captured, distance, k_backwards, lora

HEAD = "lm_head.weight"


def fused(**changes):
    model = base(**changes)
    add_fused_head(model)
    return model


SETTINGS = {
    "LoRA, untied head": (lambda: lora(fused()), {}, False),
    "LoRA, tied head": (lambda: lora(fused(tie_word_embeddings=True)), {}, False),
    "full fine-tuning, untied head": (fused, {"partial": True}, True),
    "full fine-tuning, tied head": (lambda: fused(tie_word_embeddings=True), {"partial": True}, False),
}


@pytest.mark.parametrize("setting", SETTINGS)
def test_equals_k_backwards_of_the_other_path(setting):
    make, options, head_is_left_out = SETTINGS[setting]
    model, parts = make(), batches()
    expected = k_backwards(model, parts)  # gather
    taps = TaskGradients(model, K, isolated=True, fused_head=True, **options)
    taps.self_check()
    taps, coef_K, _ = captured(model, parts, taps=taps, path="fused")
    assert taps.check()
    assert distance(taps.jacobian(coef_K), expected) < 1e-5
    assert (HEAD in taps.left_out) == head_is_left_out


def test_trained_head_is_refused_with_its_reason():
    with pytest.raises(UserError, match=r"loss\.path is fused"):
        TaskGradients(fused(), K, isolated=True, fused_head=True)


def test_self_check_finds_a_layer_that_is_never_called():
    model, parts = fused(), batches()
    taps = TaskGradients(model, K, isolated=True, partial=True)
    taps.self_check()
    captured(model, parts, taps=taps, path="fused")
    with pytest.raises(UserError, match=r"lm_head\.weight first"):
        taps.check()
