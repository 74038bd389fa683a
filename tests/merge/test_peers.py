"""Known defects of PEFT 0.21.2 and mergekit 0.1.5: theirs and ours on the same files. One test a row of the list.

Elsewhere: mergekit's SCE weights and breadcrumbs at gamma 0 (test_elementwise.py). KnOTS' absolute singular-value cut
is in no installed package; ours does not share it (test_invariances.py, test_scaling, at 1e-4 of the size).
"""

import json
import os
import subprocess
import sys

import numpy as np
import peft
import pytest
import torch

from mtft.adapters.lora_factors import read_adapter
from mtft.common.errors import MergeError
from mtft.merge.engine.merge import merge_adapters
from mtft.merge.experts.build_experts import export_arrow
from tests.merge.with_peft import deltas, expert, peft_merge, relative


def test_peft_linear_multiplies_mixed_factors_ours_does_not(tmp_path, base):
    """https://github.com/huggingface/peft/issues/1155: theirs is far from the sum of the deltas; ours is the sum."""
    paths = [expert(base, tmp_path / str(i), i, r=4, target_modules=["q_proj"]) for i in range(3)]
    total = {name: sum(deltas(path)[name] for path in paths) for name in deltas(paths[0])}
    assert relative(peft_merge(base, paths, "linear"), total) > 0.5
    merge_adapters(paths, tmp_path / "out", rank="lossless")
    assert relative(deltas(tmp_path / "out"), total) < 1e-6


@pytest.mark.parametrize("kind", ["linear", "ties", "dare_linear"])
def test_peft_refuses_unequal_ranks_ours_does_not(tmp_path, base, kind):
    paths = [expert(base, tmp_path / str(i), i, r=r, target_modules=["q_proj"]) for i, r in enumerate((2, 3, 1))]
    with pytest.raises(ValueError, match="same r"):
        peft_merge(base, paths, kind, **({} if kind == "linear" else {"density": 0.5}))
    merge_adapters(paths, tmp_path / "out", kind.partition("_")[0], rank=8, min_energy=0)


def test_peft_changes_a_single_rslora_adapter_ours_does_not(tmp_path, base):
    """https://github.com/huggingface/peft/issues/3761: one adapter at weight 1 should be itself."""
    path = expert(base, tmp_path / "a", 0, r=16, lora_alpha=16, use_rslora=True, target_modules=["q_proj"])
    assert relative(peft_merge(base, [path], "linear"), deltas(path)) > 0.5
    merge_adapters([path], tmp_path / "out")
    assert relative(deltas(tmp_path / "out"), deltas(path)) < 1e-6


def test_peft_writes_what_it_cannot_load_after_rank_patterns_ours_loads(tmp_path, base):
    """https://github.com/huggingface/peft/issues/3737."""
    from transformers import LlamaForCausalLM

    config = {"r": 4, "rank_pattern": {"v_proj": 2}, "target_modules": ["q_proj", "v_proj"]}
    paths = [expert(base, tmp_path / str(i), i, **config) for i in range(2)]
    model = peft.PeftModel.from_pretrained(LlamaForCausalLM.from_pretrained(base), paths[0], adapter_name="0")
    model.load_adapter(paths[1], "1")
    model.add_weighted_adapter(["0", "1"], [1.0, 1.0], "merged", "linear")
    model.save_pretrained(tmp_path / "theirs", selected_adapters=["merged"])
    with pytest.raises(RuntimeError, match="size mismatch"):
        peft.PeftModel.from_pretrained(LlamaForCausalLM.from_pretrained(base), tmp_path / "theirs" / "merged")
    merge_adapters(paths, tmp_path / "ours")
    peft.PeftModel.from_pretrained(LlamaForCausalLM.from_pretrained(base), tmp_path / "ours")


def test_peft_linear_moves_with_the_gauge_ours_does_not(tmp_path, base):
    """The same adapter written as (B G, G^-1 A): PEFT's linear merge becomes another matrix."""
    from safetensors.numpy import load_file, save_file

    paths = [expert(base, tmp_path / str(i), i, r=4, target_modules=["q_proj"]) for i in range(2)]
    before = peft_merge(base, paths, "linear")
    merge_adapters(paths, tmp_path / "before", rank="lossless")
    file = paths[0] / "adapter_model.safetensors"
    tensors = load_file(file)
    G = np.random.default_rng(0).normal(size=(4, 4)).astype(np.float32) + 3 * np.eye(4, dtype=np.float32)
    for key in tensors:
        tensors[key] = np.linalg.solve(G, tensors[key]) if "lora_A" in key else tensors[key] @ G
    save_file(tensors, file, {"format": "pt"})
    assert relative(peft_merge(base, paths, "linear"), before) > 0.3
    merge_adapters(paths, tmp_path / "after", rank="lossless")
    assert relative(deltas(tmp_path / "after"), deltas(tmp_path / "before")) < 1e-5


def logits_of(model):
    with torch.no_grad():
        return model(torch.arange(24).reshape(2, 12)).logits


def add_weighted(base, path, kind="linear", **options):
    """(logits with the adapter as it was saved, logits with PEFT's merge of it alone at weight 1)."""
    from transformers import LlamaForCausalLM

    model = peft.PeftModel.from_pretrained(LlamaForCausalLM.from_pretrained(base), path, adapter_name="one").eval()
    alone = logits_of(model)
    model.add_weighted_adapter(["one"], [1.0], "merged", kind, **options)
    model.set_adapter("merged")
    return alone, logits_of(model)


def moved(base, alone, merged):
    """How far the merge is from the adapter, as a share of what the adapter does."""
    from transformers import LlamaForCausalLM

    plain = logits_of(LlamaForCausalLM.from_pretrained(base).eval())
    return float((merged - alone).norm() / (alone - plain).norm())


@pytest.mark.parametrize("kind", ["linear", "cat", "svd"])
def test_peft_drops_the_bias_of_a_single_adapter_ours_keeps_it(tmp_path, base, kind):
    """https://github.com/huggingface/peft/issues/3761, lora_bias: B's bias is not merged, and nothing is said."""
    path = expert(base, tmp_path / "a", 0, r=4, lora_alpha=4, lora_bias=True, target_modules=["q_proj", "o_proj"])
    assert moved(base, *add_weighted(base, path, kind)) > 0.3
    merge_adapters([path], tmp_path / "out")
    before, after = read_adapter(path), read_adapter(tmp_path / "out")
    for name in before.modules:
        a, b = before.factors(name), after.factors(name)
        np.testing.assert_allclose(b.scale * b.bias_M, a.scale * a.bias_M, rtol=1e-6)
    alone, _ = add_weighted(base, path)
    from transformers import LlamaForCausalLM

    ours = peft.PeftModel.from_pretrained(LlamaForCausalLM.from_pretrained(base), tmp_path / "out").eval()
    torch.testing.assert_close(logits_of(ours), alone, atol=2e-5, rtol=1e-5)


def test_peft_changes_a_single_dora_adapter_ours_refuses_it(tmp_path, base):
    """https://github.com/huggingface/peft/issues/3761, DoRA: the magnitudes of the merged adapter are made up anew."""
    path = expert(base, tmp_path / "a", 0, r=4, lora_alpha=4, use_dora=True, target_modules=["q_proj", "o_proj"])
    file = path / "adapter_model.safetensors"
    from safetensors.torch import load_file, save_file

    tensors = {k: 2 * v if "magnitude" in k else v for k, v in load_file(file).items()}  # as training moves them
    save_file(tensors, file, {"format": "pt"})
    assert moved(base, *add_weighted(base, path)) > 0.3
    with pytest.raises(MergeError, match="use_dora"):
        merge_adapters([path], tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_peft_arrow_subtracts_factors_ours_the_delta(tmp_path, base):
    """General knowledge is a delta; A - mean A and B - mean B apart are another matrix, full of cross terms."""
    from peft.tuners.lora.arrow import ArrowLoraLinearLayer

    targets = {"r": 4, "lora_alpha": 4, "target_modules": ["q_proj"]}
    paths = [expert(base, tmp_path / name, i, **targets) for i, name in enumerate(("one", "two", "common"))]
    exact = {name: D - deltas(paths[2])[name] for name, D in deltas(paths[0]).items()}
    from safetensors.torch import load_file

    files = [load_file(path / "adapter_model.safetensors") for path in paths]
    for name, D in exact.items():
        weights = [torch.nn.ModuleDict(), torch.nn.ModuleDict()]
        for side, letter in zip(weights, "AB", strict=True):
            for key, file in zip(("task_0", "task_1", "gks_0"), files, strict=True):
                value = file[f"base_model.model.{name}.lora_{letter}.weight"].clone()
                side[key] = torch.nn.Linear(value.shape[1], value.shape[0], bias=False)
                side[key].weight.data = value
        config = peft.ArrowConfig(top_k=1, use_gks=True)
        config.task_adapter_names, config.gks_adapter_names = ["task_0", "task_1"], ["gks_0"]
        layer = ArrowLoraLinearLayer(in_features=D.shape[1], arrow_config=config)
        layer.gen_know_sub(*weights)
        theirs = (weights[1]["task_0"].weight @ weights[0]["task_0"].weight).detach().numpy()
        assert np.linalg.norm(theirs - D) > 0.5 * np.linalg.norm(D)
    export_arrow(paths[:2], tmp_path / "out", general=[paths[2]])
    assert relative(deltas(tmp_path / "out" / "expert_one"), exact) < 1e-6


def test_masks_of_the_peers_hang_on_the_global_seed_ours_on_their_own(tmp_path, base):
    """DARE twice: theirs differ, and take numbers from everybody's generator; ours are the same bytes."""
    from mergekit.sparsify import bernoulli
    from peft.utils.merge_utils import dare_linear

    paths = [expert(base, tmp_path / str(i), i, r=4, target_modules=["q_proj"]) for i in range(2)]
    D = [torch.tensor(next(iter(deltas(path).values()))) for path in paths]
    for draw in (lambda: dare_linear(D, torch.ones(2), 0.5), lambda: bernoulli(D[0], 0.5)):
        before = torch.get_rng_state()
        assert not torch.equal(draw(), draw())
        assert not torch.equal(torch.get_rng_state(), before)
    before, state = torch.get_rng_state(), np.random.get_state()[1].copy()
    files = []
    for name in ("a", "b"):
        merge_adapters(paths, tmp_path / name, "dare", rank=8, min_energy=0)
        files.append((tmp_path / name / "adapter_model.safetensors").read_bytes())
    assert files[0] == files[1]
    assert torch.equal(torch.get_rng_state(), before)
    np.testing.assert_array_equal(np.random.get_state()[1], state)


@pytest.mark.slow
def test_mergekit_wants_the_base_and_writes_whole_models_ours_neither(tmp_path, base):
    """https://github.com/arcee-ai/mergekit/issues/470: adapters alone fail; with the base, whole models come out."""
    paths = [expert(base, tmp_path / name, i, r=4, target_modules=["q_proj"]) for i, name in enumerate("ab")]

    def mergekit(name, models):
        config = {
            "merge_method": "task_arithmetic",
            "base_model": str(base),
            "dtype": "float32",
            "models": [{"model": model, "parameters": {"weight": 1.0}} for model in models],
        }
        (tmp_path / f"{name}.yml").write_text(json.dumps(config))
        command = [sys.executable, "-m", "mergekit.scripts.run_yaml", tmp_path / f"{name}.yml", tmp_path / name]
        command += ["--lora-merge-cache", tmp_path / "cache"]
        env = {**os.environ, "HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": ""}
        return subprocess.run(command, capture_output=True, text=True, env=env, cwd=tmp_path)

    assert mergekit("alone", map(str, paths)).returncode != 0
    done = mergekit("whole", [f"{base}+{path}" for path in paths])
    assert done.returncode == 0, done.stderr[-2000:]
    whole = (base / "model.safetensors").stat().st_size
    on_disk = [file.stat().st_size for file in (tmp_path / "cache").rglob("*.safetensors")]
    assert len(on_disk) == 2  # one whole model an adapter, and then the result
    assert min(on_disk) > 0.9 * whole
    assert sum(file.stat().st_size for file in (tmp_path / "whole").glob("*.safetensors")) > 0.9 * whole
    merge_adapters(paths, tmp_path / "ours", rank=8)
    weights = tmp_path / "ours" / "adapter_model.safetensors"
    assert weights.stat().st_size < 1.2 * sum((path / weights.name).stat().st_size for path in paths)
    assert sorted(path.name for path in tmp_path.iterdir() if "ours" in path.name) == ["ours"]
