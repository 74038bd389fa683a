"""LoRAs out of whole models, and Twin-Merging of whole models: what they hold, and that nothing is held at a time."""

import json

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from mtft.adapters.lora_factors import read_adapter
from mtft.common.errors import MergeError
from mtft.merge.engine.merge import merge_adapters
from mtft.merge.full_models.extract_lora import extract_adapter, twin_models
from tests.merge import golden as g

SHAPES = {
    "model.embed_tokens.weight": (30, 12),
    "model.layers.0.self_attn.q_proj.weight": (12, 12),
    "model.layers.0.mlp.down_proj.weight": (12, 160),
    "model.layers.0.norm.weight": (12,),
    "lm_head.weight": (30, 12),
}
MATRICES = [key for key in SHAPES if "proj" in key]


@pytest.fixture
def models(tmp_path):
    """A base, and two models that differ from it by rank 3 in the matrices of the block."""
    rng = np.random.default_rng(0)
    base = {key: rng.normal(size=shape).astype(np.float32) for key, shape in SHAPES.items()}
    deltas = [
        {key: rng.normal(size=(SHAPES[key][0], 3)) @ rng.normal(size=(3, SHAPES[key][1])) for key in MATRICES}
        for _ in "ab"
    ]
    for name, delta in (("base", {}), ("a", deltas[0]), ("b", deltas[1])):
        (tmp_path / name).mkdir()
        tensors = {key: (value + delta.get(key, 0)).astype(np.float32) for key, value in base.items()}
        save_file(tensors, tmp_path / name / "model.safetensors")
        (tmp_path / name / "config.json").write_text("{}")
    return tmp_path, base, deltas


def test_a_difference_of_low_rank_comes_out_whole(models):
    root, _, deltas = models
    found = extract_adapter(root / "base", root / "a", root / "out", 3)
    assert found.energy == pytest.approx(1, abs=1e-6)
    assert found.left_out == 0
    adapter = read_adapter(root / "out")
    assert adapter.settings.r == 8
    for key in MATRICES:
        np.testing.assert_allclose(g.delta(adapter.factors(key.removesuffix(".weight"))), deltas[0][key], atol=2e-5)


def test_energy_is_that_of_the_best_rank_and_the_rest_is_reported(models):
    root, base, deltas = models
    tensors = {key: base[key] + deltas[1].get(key, 0) for key in base}
    tensors["model.layers.0.norm.weight"] = base["model.layers.0.norm.weight"] + 2
    save_file({key: np.asarray(value, np.float32) for key, value in tensors.items()}, root / "b" / "model.safetensors")
    found = extract_adapter(root / "base", root / "b", root / "out", 1)
    S = [np.linalg.svd(deltas[1][key], compute_uv=False) for key in MATRICES]
    total = sum(np.sum(s**2) for s in S)
    assert found.energy == pytest.approx(sum(s[0] ** 2 for s in S) / total, rel=1e-5)
    assert found.left_out == pytest.approx(48 / (48 + total), rel=1e-4)
    assert "left out" in found.text()


def test_extracted_adapters_merge_as_any(models):
    root, _, deltas = models
    paths = [extract_adapter(root / "base", root / name, root / f"lora-{name}", 3).out for name in "ab"]
    merge_adapters(paths, root / "out", "tsv", rank="lossless")
    assert len(read_adapter(root / "out").modules) == 2


def test_twin_of_whole_models_is_each_model(models):
    """S + E_k = W_k where the rank allows it: each difference from the mean of two has rank 6."""
    root, base, deltas = models
    found = twin_models(root / "base", [root / "a", root / "b"], root / "out", rank=6, weights=[0.5, 0.5])
    shared = load_file(root / "out" / "shared" / "model.safetensors")
    for k, name in enumerate("ab"):
        assert found[name].energy == pytest.approx(1, abs=1e-6)
        adapter = read_adapter(root / "out" / f"expert_{name}")
        assert adapter.settings.base == str(root / "out" / "shared")
        for key in MATRICES:
            E = g.delta(adapter.factors(key.removesuffix(".weight")))
            np.testing.assert_allclose(shared[key] + E, base[key] + deltas[k][key], atol=3e-5)
    facts = json.loads((root / "out" / "twin.json").read_text())
    assert facts["experts"] == {"a": "expert_a", "b": "expert_b"}


def test_mistakes_leave_nothing(models):
    root, _, _ = models
    with pytest.raises(MergeError, match="no matrix inside a block differs"):
        extract_adapter(root / "base", root / "base", root / "out")
    with pytest.raises(MergeError, match="rank is 0"):
        extract_adapter(root / "base", root / "a", root / "out", 0)
    with pytest.raises(MergeError, match="one name"):
        twin_models(root / "base", [root / "a", root / "a"], root / "out")
    assert not (root / "out").exists()
