"""Gates and routed experts on a quantised base, whose weights are packed: factors keep a precision of numbers."""

import pytest
import torch

from mtft.adapters.lora_factors import read_adapter
from mtft.merge.experts.arrow_prototypes import arrow_router
from mtft.merge.experts.routed_model import RoutedModel
from mtft.merge.learned.gates import GATE_KINDS, Gates
from mtft.merge.linalg.module_factors import module_factors
from mtft.models.loading import load_causal_lm
from tests.fuse import tiny
from tests.merge import golden as g
from tests.training.conftest import write_model

pytest.importorskip("bitsandbytes")
NAME = "model.layers.0.self_attn.q_proj"


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return write_model(tmp_path_factory.mktemp("wide"), hidden=128)  # blocks of 64 need wider layers


@pytest.fixture(scope="module")
def paths(base, tmp_path_factory):
    root = tmp_path_factory.mktemp("adapters")
    return [tiny.adapter(root / name, base, seed, target_modules=["q_proj"]) for name, seed in (("a", 11), ("b", 12))]


@pytest.fixture(params=[("nf4", torch.float32), ("nf4", torch.bfloat16), ("int8", torch.float32)], ids=str)
def model(request, base):
    quantise, dtype = request.param
    return load_causal_lm(base, dtype=dtype, quantise=quantise, device="cpu").eval()


def added(model, build, x):
    """What `build(model)` adds to the output of one linear module."""
    linear = model.get_submodule(NAME)
    with torch.no_grad():
        before = linear(x)
        made = build(model)
        after = linear(x)
        made.remove()
    return (after - before).float()


def by_hand(paths, x, weights):
    deltas = [torch.tensor(g.delta(read_adapter(path).factors(NAME)), dtype=torch.float32) for path in paths]
    return sum(p[..., None] * (x.float() @ D.T) for p, D in zip(weights, deltas, strict=True))


def close(found, expected, dtype):
    assert float(expected.abs().max()) > 0.1
    error = float((found - expected).norm() / expected.norm())
    assert error < (1e-4 if dtype == torch.float32 else 3e-2)


def test_factors_are_in_the_precision_of_the_models_plain_weights(model, paths):
    linear, factors = module_factors(model, NAME, [read_adapter(path) for path in paths])
    assert not linear.weight.is_floating_point()
    assert {x.dtype for f in factors for x in (f.A_RN, f.B_MR)} == {model.model.norm.weight.dtype}


@pytest.mark.parametrize("kind", GATE_KINDS)
def test_gates_add_the_adapters(model, paths, kind):
    dtype = model.model.norm.weight.dtype
    x = torch.randn(2, 3, 128, generator=torch.Generator().manual_seed(0)).to(dtype)
    gates = Gates(model, [read_adapter(path) for path in paths], kind).eval()
    gates.remove()
    with torch.no_grad():
        for value in gates.values.values():
            value.fill_(0.7)
        weights = [gates.of(NAME)[k].flatten()[:1].float() for k in range(2)]

    def attach(network):
        gates.attach(network)
        return gates

    close(added(model, attach, x), by_hand(paths, x, weights), dtype)


def test_routed_experts_add_the_adapters(model, paths):
    dtype = model.model.norm.weight.dtype
    x = torch.randn(2, 3, 128, generator=torch.Generator().manual_seed(0)).to(dtype)
    router = arrow_router(paths)
    p = torch.tensor(router.probabilities(NAME, x.reshape(-1, 128).float().numpy())).float().reshape(2, 3, 2)
    found = added(model, lambda network: RoutedModel(network, paths, router), x)
    close(found, by_hand(paths, x, [p[..., 0], p[..., 1]]), dtype)
