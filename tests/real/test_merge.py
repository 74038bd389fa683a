"""Two adapters of a real model, merged by five methods, against sums of dense matrices written out here."""

import json

import numpy as np
import peft
import pytest
import torch
from safetensors.numpy import load_file

from mtft.merge.engine.merge import merge_adapters
from tests.real.conftest import load

pytestmark = [pytest.mark.real, pytest.mark.slow]

WEIGHTS = (0.7, 0.5)
DENSITY = 0.3
RANKS = (4, 6)


def write_adapters(folder, base):
    """Written by PEFT itself, of two ranks; B is drawn too, as after a training."""
    paths = []
    for seed, r in enumerate(RANKS):
        torch.manual_seed(seed)
        config = peft.LoraConfig(r=r, lora_alpha=8, target_modules=["q_proj", "down_proj"], task_type="CAUSAL_LM")
        model = peft.get_peft_model(base, config)
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.data.normal_(std=0.02)
        paths.append(folder / str(seed))
        model.save_pretrained(paths[-1])
        base = model.unload()
    return paths


def deltas(folder):
    """{module: alpha / r B A}, float64."""
    tensors = load_file(folder / "adapter_model.safetensors")
    config = json.loads((folder / "adapter_config.json").read_text())
    found = {}
    for name in tensors:
        if name.endswith("lora_A.weight"):
            module = name.removesuffix(".lora_A.weight")
            scale = config["alpha_pattern"].get(module, config["lora_alpha"]) / len(tensors[name])
            B, A = tensors[f"{module}.lora_B.weight"], tensors[name]
            found[module] = scale * B.astype(np.float64) @ A.astype(np.float64)
    return found


def weighted_sum(D):
    return sum(w * d for w, d in zip(WEIGHTS, D, strict=True))


def cut(X, rank):
    U, S, Vt = np.linalg.svd(X, full_matrices=False)
    return (U[:, :rank] * S[:rank]) @ Vt[:rank]


def ties(D):
    """Trim, elect the sign of the sum, mean of the entries that agree (arXiv 2306.01708)."""
    trimmed = []
    for w, d in zip(WEIGHTS, D, strict=True):
        least = np.sort(np.abs(d).ravel())[-int(DENSITY * d.size)]
        trimmed.append(w * np.where(np.abs(d) >= least, d, 0))
    sign = np.sign(sum(trimmed))
    agree = [np.where(np.sign(x) == sign, x, 0) for x in trimmed]
    return sum(agree) / np.maximum(sum((x != 0).astype(int) for x in agree), 1)


def orthonormal(X):
    U, _, Vt = np.linalg.svd(X, full_matrices=False)
    return U @ Vt


def tsv(D):
    """Singular vectors of the tasks, whitened against each other (arXiv 2412.00081)."""
    parts = [np.linalg.svd(w * d, full_matrices=False) for w, d in zip(WEIGHTS, D, strict=True)]
    U = orthonormal(np.hstack([U[:, :r] for (U, _, _), r in zip(parts, RANKS, strict=True)]))
    V = orthonormal(np.hstack([Vt[:r].T for (_, _, Vt), r in zip(parts, RANKS, strict=True)]))
    return (U * np.concatenate([S[:r] for (_, S, _), r in zip(parts, RANKS, strict=True)])) @ V.T


def iso_c(D):
    """Every direction of the sum as strong as their mean (arXiv 2502.04959)."""
    U, S, Vt = np.linalg.svd(weighted_sum(D), full_matrices=False)
    r = sum(RANKS)
    return S[:r].mean() * (U[:, :r] @ Vt[:r])


# method, options, rank, the dense matrix that it stands for, and how near: a dense sum is cut by subspace iteration
METHODS = [
    ("cat", {}, "lossless", weighted_sum, 1e-5),
    ("svd", {}, 5, lambda D: cut(weighted_sum(D), 5), 1e-5),
    ("ties", {"density": DENSITY}, 8, lambda D: cut(ties(D), 8), 2e-3),
    ("tsv", {}, "lossless", tsv, 1e-5),
    ("iso_c", {}, "lossless", iso_c, 1e-5),
]


@pytest.fixture(scope="module")
def base(smollm2):
    return load(smollm2)


@pytest.fixture(scope="module")
def adapters(base, tmp_path_factory):
    return write_adapters(tmp_path_factory.mktemp("adapters"), base)


@pytest.fixture(scope="module")
def merged(adapters, tmp_path_factory):
    """{method: folder}."""
    folder = tmp_path_factory.mktemp("merged")
    for method, options, rank, *_ in METHODS:
        merge_adapters(adapters, folder / method, method, options, weights=WEIGHTS, rank=rank, min_energy=0.0)
    return {method: folder / method for method, *_ in METHODS}


@pytest.mark.parametrize(("method", "dense", "near"), [(method, *last) for method, _, _, *last in METHODS])
def test_a_merge_is_the_dense_matrix_of_its_formula(adapters, merged, method, dense, near):
    parts, found = [deltas(adapter) for adapter in adapters], deltas(merged[method])
    assert found.keys() == parts[0].keys()
    modules = [module for module in found if ".layers.0." in module or ".layers.29." in module]
    assert len(modules) == 4
    for module in modules:
        expected = dense([part[module] for part in parts])
        assert np.linalg.norm(found[module] - expected) < near * np.linalg.norm(expected)


def test_the_model_with_a_merge_is_the_base_plus_the_dense_sum(base, adapters, merged):
    """In plain PEFT, against weights that are changed by hand."""
    ids = torch.arange(100, 140)[None]
    parts = [deltas(adapter) for adapter in adapters]
    moved = {
        f"{module.removeprefix('base_model.model.')}.weight": weighted_sum([part[module] for part in parts])
        for module in parts[0]
    }
    weights = base.state_dict()
    model = peft.PeftModel.from_pretrained(base, merged["cat"])
    with torch.no_grad():
        found = model(ids).logits
        plain = model.unload()
        untouched = plain(ids).logits
        for name, delta in moved.items():
            weights[name] += torch.from_numpy(delta).float()
        expected = plain(ids).logits
    assert (expected - untouched).abs().max() > 0.3  # the adapters do something
    assert torch.allclose(found, expected, atol=1e-3)
