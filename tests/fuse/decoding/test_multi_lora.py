"""PEFT's numbers are the oracle: each adapter alone, and `adapter_names`."""

import pytest
import torch
from peft import PeftModel
from transformers import LlamaForCausalLM

from mtft.adapters.lora_factors import read_adapter
from mtft.fuse.alpha.spec import FusionError
from mtft.fuse.decoding.multi_lora import BASE, MultiLoraLayout, MultiLoraLinear
from tests.fuse import tiny

NAMES = ["one", "odd", "few"]  # different ranks, rsLoRA, patterns, few modules


@pytest.fixture(scope="module")
def small(folders):
    return tiny.weak(folders["base"], [folders[name] for name in NAMES], torch.float32)


def run(small, groups, ids):
    small.layout.set(groups, len(ids))
    with torch.no_grad():
        return small.model(ids.repeat(len(groups), 1)).logits.unflatten(0, (len(groups), len(ids)))


def peft_model(folders, name):
    plain = LlamaForCausalLM.from_pretrained(folders["base"], dtype=torch.float32)
    return PeftModel.from_pretrained(plain, folders[name]).eval() if name else plain.eval()


@pytest.mark.parametrize(
    "groups", [(0, 1, 2, BASE), (BASE,), (0,), (2,), (1, 2), (1, BASE), (0, 2, BASE), (2, 0, BASE)]
)
def test_rows_equal_peft_in_any_layout(small, folders, groups):
    ids, _ = tiny.prompts((6, 6))
    logits = run(small, groups, ids)
    for at, group in enumerate(groups):
        with torch.no_grad():
            expected = peft_model(folders, NAMES[group] if group != BASE else None)(ids).logits
        torch.testing.assert_close(logits[at], expected, atol=1e-5, rtol=1e-5)


def test_rows_equal_adapter_names(small, folders):
    model = peft_model(folders, NAMES[0])
    for name in NAMES[1:]:
        model.load_adapter(folders[name], name)
    ids, _ = tiny.prompts((6, 6))
    names = [name for name in ("default", *NAMES[1:], "__base__") for _ in range(2)]
    with torch.no_grad():
        expected = model(ids.repeat(4, 1), adapter_names=names).logits
    torch.testing.assert_close(run(small, (0, 1, 2, BASE), ids).flatten(0, 1), expected, atol=1e-5, rtol=1e-5)


def test_one_copy_of_the_base(small):
    """Every weight of the base is there once, whatever the number of experts."""
    layers = [module for module in small.model.modules() if isinstance(module, MultiLoraLinear)]
    assert len(layers) == 2 * len(tiny.LINEARS)
    assert len({layer.linear.weight.data_ptr() for layer in layers}) == len(layers)
    assert sum(p.numel() for p in small.model.parameters()) == sum(
        p.numel() for p in tiny.model(1, width=16).parameters()
    )
    assert not small.own


def test_wrong_number_of_rows_is_an_error(small):
    small.layout.set((0, BASE), 2)
    with pytest.raises(ValueError, match="3 rows for 2 groups of 2"), torch.no_grad():
        small.model(tiny.prompts((4, 4, 4))[0])


@pytest.mark.parametrize("groups", [(), (BASE, 0), (0, 0), (3,), (BASE, BASE)])
def test_layouts_that_make_no_sense(groups):
    with pytest.raises(ValueError, match="groups"):
        MultiLoraLayout(3).set(groups, 2)


@pytest.mark.parametrize(
    "name, options, reason",
    [
        ("dora", {"use_dora": True}, "use_dora"),
        ("saved", {"modules_to_save": ["lm_head"]}, "lm_head"),
        ("bias", {"lora_bias": True}, "bias"),
        ("embedding", {"target_modules": ["embed_tokens", "v_proj"]}, "embed_tokens"),
    ],
)
def test_other_adapters_run_on_their_own(folders, name, options, reason):
    """DoRA, saved modules, biases and embeddings: a model of its own, with the reason, and PEFT's numbers."""
    folder = tiny.adapter(folders["root"] / name, folders["base"], 21, **options)
    with pytest.warns(UserWarning, match=f"runs as a model of its own.*{reason}"):
        small = tiny.weak(folders["base"], [folders["one"], folder], torch.float32)
    assert small.order == [(-1, 0), (0, 0)]
    ids, _ = tiny.prompts((5,))
    with torch.no_grad():
        expected = peft_model(folders, name if name in folders else None)(ids).logits
        tuned = PeftModel.from_pretrained(peft_model(folders, None), folder).eval()
        torch.testing.assert_close(small.own[0](ids).logits, tuned(ids).logits, atol=1e-5, rtol=1e-4)
        assert (small.own[0](ids).logits - expected).abs().max() > 1e-3


def test_whole_model_as_expert(folders, tmp_path):
    tiny.model(5, width=16, dtype=torch.float32).save_pretrained(tmp_path)
    with pytest.warns(UserWarning, match="whole model"):
        small = tiny.weak(folders["base"], [tmp_path])
    assert small.order == [(0, 0)]
    fused = tiny.fused(small)
    assert fused.forward(tiny.prompts((5,))[0]).logits.shape == (1, 5, tiny.VOCABULARY)


def test_adapter_of_another_base(folders, tmp_path):
    """The weights decide, wherever the folders are and whatever they are called."""
    other = tmp_path / "base"
    tiny.model(5, dtype=torch.float32).save_pretrained(other)
    with pytest.raises(FusionError, match=r"trained on .*base.*, and .*base.* holds other weights"):
        tiny.weak(other, [folders["one"]])
    renamed = tiny.base(tmp_path / "renamed")
    assert tiny.weak(renamed, [folders["one"]]).layout.experts == 1
    wide = tmp_path / "wide"
    tiny.model(3, width=32, dtype=torch.float32).save_pretrained(wide)
    with pytest.raises(FusionError, match="holds other weights"):
        tiny.weak(wide, [folders["one"]])


def test_no_adapter_there(folders, tmp_path):
    with pytest.raises(FusionError, match="no adapter at"):
        tiny.weak(folders["base"], [tmp_path])


def test_scaling_is_read_by_the_merge_room(folders):
    adapter = read_adapter(folders["odd"])
    assert adapter.factors("model.layers.0.self_attn.q_proj").scale == pytest.approx(8 / 6**0.5)
    assert adapter.factors("model.layers.0.self_attn.k_proj").scale == pytest.approx(3 / 3**0.5)
