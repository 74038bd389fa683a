"""Reading: everything in PEFT's format is read exactly, or refused by name."""

import json
import math

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from mtft.adapters.lora_factors import LoraFactors, read_adapter
from mtft.adapters.safetensors_io import TensorFile, TensorWriter, to_disk
from mtft.common.errors import MergeError
from mtft.merge.engine.merge import merge_adapters
from tests.merge import golden as g


def one(folder, **config):
    return g.write(folder, {"layers.0.q": g.factors()[0]}, **config)


@pytest.mark.parametrize("rslora", [False, True])
def test_scale_follows_the_patterns(tmp_path, rslora):
    rng = np.random.default_rng(0)
    make = lambda r: LoraFactors(rng.normal(size=(r, 4)), rng.normal(size=(5, r)), 1.0)  # noqa: E731
    modules = {"layers.0.q_proj": make(2), "layers.1.q_proj": make(3), "layers.0.k_proj": make(2)}
    patterns = {"rank_pattern": {"layers.1.q_proj": 3}, "alpha_pattern": {"q_proj": 6, r"layers.\d.k_proj": 5}}
    adapter = read_adapter(g.write(tmp_path / "a", modules, lora_alpha=4, use_rslora=rslora, **patterns))
    root = math.sqrt if rslora else float
    assert adapter.factors("layers.0.q_proj").scale == pytest.approx(6 / root(2))
    assert adapter.factors("layers.1.q_proj").scale == pytest.approx(6 / root(3))
    assert adapter.factors("layers.0.k_proj").scale == pytest.approx(5 / root(2))
    assert adapter.factors("absent") is None


def test_bfloat16_is_read_and_written_like_torch(tmp_path):
    import torch
    from safetensors.torch import load_file as torch_load
    from safetensors.torch import save_file as torch_save

    values = torch.randn(64, 33, generator=torch.Generator().manual_seed(0)) * torch.logspace(-30, 30, 33)
    torch_save({"x": values.bfloat16()}, tmp_path / "in.safetensors")
    np.testing.assert_array_equal(TensorFile(tmp_path / "in.safetensors").read("x"), values.bfloat16().double().numpy())
    writer = TensorWriter(tmp_path / "out.safetensors", [("x", "BF16", (64, 33)), ("y", "F16", (2,))])
    writer.write("x", values.numpy())
    writer.write("y", np.array([0.1, -3.0]))
    writer.close()
    assert torch.equal(torch_load(tmp_path / "out.safetensors")["x"], values.bfloat16())
    with pytest.raises(OverflowError, match="do not fit F16"):
        to_disk(np.array([1e6]), "F16")


def test_shards(tmp_path):
    folder = one(tmp_path / "a")
    tensors = load_file(folder / "adapter_model.safetensors")
    expected = read_adapter(folder).factors("layers.0.q")
    (folder / "adapter_model.safetensors").unlink()
    weight_map = {key: f"adapter_model-0000{i + 1}-of-00002.safetensors" for i, key in enumerate(sorted(tensors))}
    for key, name in weight_map.items():
        save_file({key: tensors[key]}, folder / name)
    index = folder / "adapter_model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": weight_map}))
    np.testing.assert_array_equal(read_adapter(folder).factors("layers.0.q").A_RN, expected.A_RN)
    index.write_text(json.dumps({"weight_map": dict.fromkeys(weight_map, "../a.safetensors")}))
    with pytest.raises(MergeError, match="plain file name"):
        read_adapter(folder)


REFUSED = {
    "use_dora": True,
    "init_lora_weights": "pissa_niter_16",
    "alora_invocation_tokens": [1, 2],
    "target_parameters": ["mlp.experts"],
    "trainable_token_indices": [5],
    "layer_replication": [[0, 2]],
    "use_qalora": True,
    "use_bdlora": {"x": 1},
    "kasa_config": {"x": 1},
    "arrow_config": {"x": 1},
    "a_field_of_the_future": 3,
    "peft_type": "LOHA",
    "lora_alpha": float("nan"),
    "rank_pattern": {"(": 2},
    "r": -1,
}


@pytest.mark.parametrize("field", REFUSED)
def test_refused_by_name(tmp_path, field):
    with pytest.raises(MergeError, match=field) as caught:
        read_adapter(one(tmp_path / "a", **{field: REFUSED[field]}))
    assert caught.value.do
    assert "adapter_config.json" in caught.value.where


@pytest.mark.parametrize("init", [True, False, "gaussian", "eva", "orthogonal"])
def test_inits_that_leave_the_base_alone_are_fine(tmp_path, init):
    assert read_adapter(one(tmp_path / "a", init_lora_weights=init)).modules


BAD_TENSORS = {
    "base_model.model.layers.0.q.lora_magnitude_vector": (np.ones(12, np.float32), "DoRA"),
    "base_model.model.layers.1.q.lora_A.weight": (np.ones((2, 10), np.float32), "missing"),
    "base_model.model.lm_head.weight": (np.ones((4, 4), np.float32), "modules_to_save"),
    "model.layers.0.q.lora_A.weight": (np.ones((2, 10), np.float32), "unexpected key"),
    "base_model.model.layers.0.q.lora_C.weight": (np.ones((2, 10), np.float32), "unknown tensor"),
    "base_model.model.../../etc.lora_A.weight": (np.ones((2, 10), np.float32), "unexpected key"),
    "base_model.model.layers.0.q.lora_B.bias": (np.ones(3, np.float32), "wrong shape"),
    "base_model.model.layers.0.q.lora_A.weight": (np.ones((3, 10), np.float32), "don't fit"),
    "base_model.model.layers.0.q.lora_B.weight": (np.ones((12, 2, 1, 1), np.float32), "only matrices"),
}


@pytest.mark.parametrize("key", BAD_TENSORS)
def test_bad_tensors_are_refused(tmp_path, key):
    folder = one(tmp_path / "a")
    tensors = load_file(folder / "adapter_model.safetensors")
    value, text = BAD_TENSORS[key]
    save_file({**tensors, key: value}, folder / "adapter_model.safetensors")
    with pytest.raises(MergeError, match=text):
        read_adapter(folder)


def test_rank_of_tensor_and_config_must_agree(tmp_path):
    with pytest.raises(MergeError, match="rank 2 but the config says 4"):
        read_adapter(one(tmp_path / "a", r=4))


def test_nan_is_found_with_file_key_and_count(tmp_path):
    f = g.factors()[0]
    A = f.A_RN.copy()
    A[1, 3:5] = np.nan, np.inf
    folder = g.write(tmp_path / "a", {"q": LoraFactors(A, f.B_MR, 1.0)})
    with pytest.raises(MergeError, match=r"2 of 20 values of 'base_model.model.q.lora_A.weight'") as caught:
        merge_adapters([folder], tmp_path / "out")
    assert str(folder) in caught.value.where
    assert not (tmp_path / "out").exists()


def test_pickles_and_missing_files(tmp_path):
    folder = one(tmp_path / "a")
    (folder / "adapter_model.safetensors").rename(folder / "adapter_model.bin")
    with pytest.raises(MergeError, match="pickle"):
        read_adapter(folder)
    (folder / "adapter_model.bin").unlink()
    with pytest.raises(MergeError, match="no adapter_model"):
        read_adapter(folder)
    with pytest.raises(MergeError, match="no folder"):
        read_adapter(tmp_path / "nowhere")


def test_names(tmp_path):
    assert read_adapter(one(tmp_path / "sql")).name == "sql"
    assert read_adapter(one(tmp_path / "run" / "adapter")).name == "run"
    assert read_adapter(one(tmp_path / "x"), name="y").name == "y"
