"""PEFT loads what we write, and computes with it what the experts' deltas add up to. vLLM's rules as a checker."""

import json
import subprocess
import sys

import peft
import pytest
import torch

from mtft.adapters.lora_factors import read_adapter
from mtft.common.errors import MergeError
from mtft.merge.engine.merge import merge_adapters
from mtft.merge.experts.build_experts import build_twin, export_arrow
from tests.merge.with_peft import deltas, expert, peft_merge, relative

RELOAD = """
import sys, warnings
import torch
from peft import PeftModel, get_peft_model_state_dict
from transformers import LlamaForCausalLM
from safetensors.torch import load_file
assert not any(name.startswith("mtft") for name in sys.modules)
base, *adapters = sys.argv[1:]
for adapter in adapters:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        model = PeftModel.from_pretrained(LlamaForCausalLM.from_pretrained(base), adapter)
    said = [str(w.message) for w in caught if "missing" in str(w.message) or "unexpected" in str(w.message)]
    assert not said, (adapter, said)
    wrote = load_file(adapter + "/adapter_model.safetensors")
    has = get_peft_model_state_dict(model, save_embedding_layers=False)
    assert wrote.keys() == has.keys(), (adapter, wrote.keys() ^ has.keys())
    assert all(torch.equal(wrote[key], has[key]) for key in wrote), adapter
    torch.save(model(torch.arange(24).reshape(2, 12)).logits.detach(), adapter + ".out")
"""


Q, V, ALL = {"target_modules": ["q_proj"]}, {"target_modules": ["q_proj", "v_proj"]}, {"target_modules": "all-linear"}
PATTERNS = {"rank_pattern": {"q_proj": 2, r"layers\.1\.self_attn\.v_proj": 7}, "alpha_pattern": {"v_proj": 5}}
CASES = {
    "plain": ({"r": 4, "target_modules": ["q_proj", "down_proj"]}, {"r": 2, **V}),
    "rslora": ({"r": 4, "use_rslora": True, "lora_alpha": 3, **ALL}, {"r": 8, **ALL}),
    "patterns": ({"r": 4, **PATTERNS, **V}, {"r": 3, "layers_to_transform": [1], "layers_pattern": "layers", **Q}),
    "bias": ({"r": 4, "lora_bias": True, **Q}, {"r": 4, "target_modules": ["q_proj", "o_proj"]}),
    "embedding": ({"r": 4, "target_modules": ["embed_tokens", "q_proj"]}, {"r": 2, "target_modules": ["embed_tokens"]}),
}


@pytest.mark.slow
def test_reload_in_peft_is_the_sum_of_the_experts(tmp_path, base):
    """One fresh process that never imports mtft loads every case; the reference adds PEFT's own deltas to the base."""
    weights_K, expected = (1.0, -0.5), {}
    for case, configs in CASES.items():
        paths = [expert(base, tmp_path / f"{case}-{i}", i, **config) for i, config in enumerate(configs)]
        merge_adapters(paths, tmp_path / case, weights=weights_K, rank="lossless")
        expected[case] = by_hand(base, paths, weights_K)
    command = [sys.executable, "-c", RELOAD, base, *(tmp_path / case for case in CASES)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    for case, logits in expected.items():
        got = torch.load(tmp_path / f"{case}.out")
        torch.testing.assert_close(got, logits, atol=3e-5, rtol=1e-4, msg=lambda text, case=case: f"{case}: {text}")


def by_hand(base, paths, weights_K):
    from transformers import LlamaForCausalLM

    model = LlamaForCausalLM.from_pretrained(base)
    weights, biases = dict(model.named_parameters()), {}
    for path, weight in zip(paths, weights_K, strict=True):
        loaded = peft.PeftModel.from_pretrained(LlamaForCausalLM.from_pretrained(base), path)
        for name, layer in loaded.base_model.model.named_modules():
            if isinstance(layer, peft.tuners.lora.LoraLayer):
                weights[name + ".weight"].data += weight * layer.get_delta_weight("default").detach()
                if layer.lora_bias.get("default"):
                    biases[name] = weight * layer.scaling["default"] * layer.lora_B["default"].bias.detach()
    for name, bias in biases.items():
        model.get_submodule(name).bias = torch.nn.Parameter(bias)
    return model(torch.arange(24).reshape(2, 12)).logits.detach()


def check_vllm(folder) -> None:
    """The rules of vLLM's PEFTHelper and LoRAModel, as far as a file can break them."""
    assert {"adapter_config.json", "adapter_model.safetensors"} <= {path.name for path in folder.iterdir()}
    config = json.loads((folder / "adapter_config.json").read_text())
    assert config["r"] in (8, 16, 32, 64, 128, 256, 320, 512)
    assert config["bias"] == "none"
    assert not config["use_dora"]
    assert not config["modules_to_save"]
    assert not config["rank_pattern"]
    assert not config["alpha_pattern"]
    assert not config["lora_bias"]
    assert isinstance(config["target_modules"], list)
    assert config["lora_alpha"] == config["r"]
    adapter = read_adapter(folder)
    assert not adapter.saved
    assert {layout.r for layout in adapter.modules.values()} == {config["r"]}
    assert all(key.endswith((".lora_A.weight", ".lora_B.weight")) for key in adapter.files)


def test_vllm_rules(tmp_path, base):
    a = expert(base, tmp_path / "a", 1, r=4, target_modules=["q_proj", "v_proj"])
    b = expert(base, tmp_path / "b", 2, r=3, use_rslora=True, target_modules=["q_proj", "up_proj"])
    merge_adapters([a, b], tmp_path / "out", vllm=True)
    check_vllm(tmp_path / "out")
    merge_adapters([a, b], tmp_path / "ties", "ties", rank=16, min_energy=0, vllm=True)
    check_vllm(tmp_path / "ties")
    build_twin([a, b], tmp_path / "twin", expert_rank=5, rank=8, with_shared=True)
    export_arrow([a, b], tmp_path / "arrow")
    for folder in (*(tmp_path / "twin").glob("expert_*"), tmp_path / "twin" / "shared"):
        check_vllm(folder)
    for folder in (tmp_path / "arrow").glob("expert_*"):
        check_vllm(folder)
    assert len(list(tmp_path.glob("*/expert_*"))) == 4
    biased = expert(base, tmp_path / "c", 3, r=4, lora_bias=True, target_modules=["q_proj"])
    with pytest.raises(MergeError, match="vLLM"):
        merge_adapters([a, biased], tmp_path / "out2", vllm=True)


def test_linear_is_peft_cat_and_svd_is_peft_svd(tmp_path, base):
    targets = ["q_proj", "up_proj"]
    paths = [expert(base, tmp_path / str(i), i, r=r, target_modules=targets) for i, r in enumerate((2, 3, 1))]
    merge_adapters(paths, tmp_path / "cat", method="cat")
    assert relative(deltas(tmp_path / "cat"), peft_merge(base, paths, "cat")) < 1e-6
    merge_adapters(paths, tmp_path / "svd", method="svd", rank=4)
    assert relative(deltas(tmp_path / "svd"), peft_merge(base, paths, "svd", svd_rank=4)) < 1e-5


def test_dora_is_refused(tmp_path, base):
    with pytest.raises(MergeError, match="use_dora"):
        merge_adapters(
            [expert(base, tmp_path / "a", 0, r=2, use_dora=True, target_modules=["q_proj"])], tmp_path / "out"
        )


def test_pissa_is_refused(tmp_path, base):
    folder = expert(base, tmp_path / "a", 0, r=2, init_lora_weights="pissa", target_modules=["q_proj"])
    with pytest.raises(MergeError, match="pissa"):
        merge_adapters([folder], tmp_path / "out")
