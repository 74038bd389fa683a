"""Whole checkpoints: the papers' task vectors, streamed; files that transformers loads; mistakes write nothing."""

import json

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from mtft.common.atomic_folder import CONTENTS
from mtft.common.errors import MergeError, UserError
from mtft.merge.full_models.merge_checkpoints import merge_checkpoints, read_checkpoint
from mtft.merge.linalg import streamed_delta
from mtft.merge.methods import make_method


def save(folder, tensors):
    folder.mkdir()
    save_file(tensors, folder / "model.safetensors")
    (folder / "config.json").write_text("{}")
    (folder / "train.py").write_text("not ours")
    return folder


@pytest.fixture
def models(tmp_path):
    rng = np.random.default_rng(0)
    shapes = {"embed.weight": (40, 12), "norm.weight": (12,), "conv.weight": (6, 4, 3), "q.weight": (16, 12)}
    base = {key: rng.normal(size=shape).astype(np.float32) for key, shape in shapes.items()}
    tuned = [{key: x + 0.1 * rng.normal(size=x.shape).astype(np.float32) for key, x in base.items()} for _ in range(3)]
    return save(tmp_path / "base", base), [save(tmp_path / f"m{k}", x) for k, x in enumerate(tuned)]


def read(folder):
    found = read_checkpoint(folder)
    return {key: found.files[key].read(key) for key in found.files}


def test_linear_by_hand(tmp_path, models):
    base, tuned = models
    merge_checkpoints(base, tuned, tmp_path / "out", weights=[0.5, 0, -1], scale=2)
    W0, (a, _, c), got = read(base), map(read, tuned), read(tmp_path / "out")
    for key in W0:
        np.testing.assert_allclose(got[key], W0[key] + 2 * (0.5 * (a[key] - W0[key]) - (c[key] - W0[key])), atol=1e-6)
    written = {"model.safetensors", "config.json", "merge.json", CONTENTS}
    assert {path.name for path in (tmp_path / "out").iterdir()} == written


def test_one_model_at_weight_one_is_itself(tmp_path, models):
    base, tuned = models
    for method in ("linear", "tsv"):
        merge_checkpoints(base, tuned[:1], tmp_path / method, method)
        for key, value in read(tuned[0]).items():
            np.testing.assert_allclose(read(tmp_path / method)[key], value, atol=1e-6)


@pytest.mark.parametrize("method", ["ties", "dare", "della", "breadcrumbs", "sce", "pcb", "consensus"])
def test_streamed_equals_whole(tmp_path, models, method, monkeypatch):
    base, tuned = models
    W0 = read(base)["q.weight"]
    D = [(read(m)["q.weight"] - W0).astype(np.float32) for m in tuned]
    labels = {"names": ("m0", "m1", "m2"), "module": "q.weight", "seed": 5}
    expected = W0 + make_method(method).merge_arrays(D, np.array([1, 0.5, 2]), **labels)
    monkeypatch.setattr(streamed_delta, "BLOCK_BYTES", 1)
    merge_checkpoints(base, tuned, tmp_path / "out", method, weights=[1, 0.5, 2], seed=5)
    np.testing.assert_allclose(read(tmp_path / "out")["q.weight"], expected, atol=1e-6)


def test_tsv_on_full_matrices_averages_vectors(tmp_path, models):
    base, tuned = models
    merge_checkpoints(base, tuned, tmp_path / "out", "tsv")
    W0, others, got = read(base), [read(m) for m in tuned], read(tmp_path / "out")
    mean = sum(x["norm.weight"] for x in others) / 3
    np.testing.assert_allclose(got["norm.weight"], mean, atol=1e-6)
    triples = [np.linalg.svd(x["q.weight"] - W0["q.weight"], full_matrices=False) for x in others]
    polar = lambda X: np.linalg.svd(X, full_matrices=False)[0] @ np.linalg.svd(X, full_matrices=False)[2]  # noqa: E731
    U, V = polar(np.hstack([t[0] for t in triples])), polar(np.hstack([t[2].T for t in triples]))
    D = U @ np.diag(np.concatenate([t[1] for t in triples])) @ V.T
    np.testing.assert_allclose(got["q.weight"], W0["q.weight"] + D, atol=1e-5)


def test_shards_in_and_out(tmp_path, models):
    base, tuned = models
    merge_checkpoints(base, tuned, tmp_path / "whole", "ties")
    merge_checkpoints(base, tuned, tmp_path / "cut", "ties", shard_bytes=1000)
    index = json.loads((tmp_path / "cut" / "model.safetensors.index.json").read_text())
    assert len(set(index["weight_map"].values())) == 3
    for key, value in read(tmp_path / "whole").items():
        np.testing.assert_array_equal(read(tmp_path / "cut")[key], value)
    merge_checkpoints(tmp_path / "cut", [tmp_path / "whole"], tmp_path / "again")
    np.testing.assert_array_equal(read(tmp_path / "again")["q.weight"], read(tmp_path / "whole")["q.weight"])


def test_transformers_loads_it(tmp_path):
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "vocab_size": 32}
    folders, states = [], []
    for seed in range(3):
        torch.manual_seed(seed)
        model = LlamaForCausalLM(LlamaConfig(**sizes, num_attention_heads=2)).bfloat16()
        model.save_pretrained(tmp_path / str(seed))
        folders.append(tmp_path / str(seed))
        states.append(model.state_dict())
    merge_checkpoints(folders[0], folders[1:], tmp_path / "out", weights=[0.5, 0.5])
    merged = LlamaForCausalLM.from_pretrained(tmp_path / "out", dtype="auto").state_dict()
    for key, value in merged.items():
        assert value.dtype == torch.bfloat16
        mean = (states[1][key].float() + states[2][key].float()) / 2
        torch.testing.assert_close(value.float(), mean, atol=2e-3, rtol=1e-2)


def test_mistakes_are_named_and_leave_nothing(tmp_path, models):
    base, tuned = models
    other = save(tmp_path / "other", {"q.weight": np.ones((2, 2), np.float32)})
    wide = load_file(base / "model.safetensors")
    wide["q.weight"] = np.ones((16, 13), np.float32)
    wide = save(tmp_path / "wide", wide)
    before = sorted(path.name for path in tmp_path.iterdir())
    for arguments, text in (
        ((base, [other], tmp_path / "out"), "in one only"),
        ((base, [wide], tmp_path / "out"), "16, 13"),
        ((base, [], tmp_path / "out"), "no models"),
        ((base, tuned, tmp_path / "out", "regmean"), "does not merge whole"),
        ((base, tuned, tmp_path / "out", "ties", {"scope": "global"}), "does not merge whole"),
        ((base, tuned, tmp_path / "out", "linear", None, [1]), "1 weights for 3"),
        ((base, tuned, base), "holds, an input"),
    ):
        with pytest.raises(UserError, match=text):
            merge_checkpoints(*arguments)
    poisoned = load_file(tuned[0] / "model.safetensors")
    poisoned["q.weight"] = np.full((16, 12), np.nan, np.float32)
    save_file(poisoned, tuned[0] / "model.safetensors")
    with pytest.raises(MergeError, match="NaN"):
        merge_checkpoints(base, tuned, tmp_path / "out")
    assert sorted(path.name for path in tmp_path.iterdir()) == before
