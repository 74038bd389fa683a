"""Routed generation: a certain router gives the expert's own model; rows of one batch go to different experts."""

import numpy as np
import pytest
import torch

from mtft.adapters.lora_factors import LoraFactors, read_adapter
from mtft.adapters.routers import CentroidRouter
from mtft.common.errors import MergeError
from mtft.merge.experts.arrow_prototypes import arrow_router
from mtft.merge.experts.build_experts import build_twin, export_arrow
from mtft.merge.experts.routed_model import RoutedModel, load_routed
from tests.merge import golden as g

MODULES = ("model.layers.0.self_attn.q_proj", "model.layers.1.mlp.down_proj")
SHAPES = {MODULES[0]: (16, 16), MODULES[1]: (16, 24)}


@pytest.fixture
def model():
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "vocab_size": 64}
    ends = {"bos_token_id": None, "eos_token_id": None, "pad_token_id": 0}
    return LlamaForCausalLM(LlamaConfig(**sizes, num_attention_heads=2, **ends)).eval()


@pytest.fixture
def paths(tmp_path):
    rng = np.random.default_rng(0)
    make = lambda m, n: LoraFactors(rng.normal(size=(2, n)), rng.normal(size=(m, 2)), 0.7)  # noqa: E731
    return [g.write(tmp_path / "in" / name, {k: make(*SHAPES[k]) for k in MODULES}) for name in ("a", "b")]


def logits_with(model, deltas, ids, **more):
    """The model with deltas in its weights; put back afterwards."""
    before = {name: model.get_submodule(name).weight.data.clone() for name in deltas}
    for name, D in deltas.items():
        model.get_submodule(name).weight.data += torch.tensor(D, dtype=torch.float32)
    with torch.no_grad():
        found = model(input_ids=ids, **more).logits
    for name, value in before.items():
        model.get_submodule(name).weight.data = value
    return found


def deltas(path):
    adapter = read_adapter(path)
    return {name: g.delta(adapter.factors(name)) for name in adapter.modules}


def sure_router(states):
    """Row 0 belongs to a, row 1 to b, beyond doubt."""
    return CentroidRouter(("a", "b"), states.double().numpy(), np.full(states.shape[1], 1e-3), 1.0)


def test_each_row_gets_its_expert_on_top_of_the_shared_one(tmp_path, model, paths):
    ids = torch.tensor([[5, 9, 2, 7], [11, 3, 8, 1]])
    probe = RoutedModel(model, paths, CentroidRouter(("a", "b"), np.zeros((2, 16)), np.ones(16), 1.0))
    states = probe.states(ids)
    probe.remove()
    build_twin(paths, tmp_path / "out", expert_rank=16)  # full rank: S + E_k = D_k
    experts = [tmp_path / "out" / "expert_a", tmp_path / "out" / "expert_b"]
    routed = RoutedModel(model, experts, sure_router(states), shared=tmp_path / "out" / "shared")
    np.testing.assert_allclose(routed.route(ids), np.eye(2), atol=1e-12)
    with torch.no_grad():
        found = model(input_ids=ids).logits
    tokens = routed.generate(input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=3, do_sample=False)
    routed.remove()
    for row, path in enumerate(paths):
        expected = logits_with(model, deltas(path), ids[row : row + 1])
        torch.testing.assert_close(found[row : row + 1], expected, atol=1e-4, rtol=1e-4)
        assert tokens[row, 4] == expected[0, -1].argmax()
    torch.testing.assert_close(model(input_ids=ids).logits, logits_with(model, {}, ids))


def test_padding_does_not_change_the_route(model, paths):
    ids, mask = torch.tensor([[0, 0, 5, 9]]), torch.tensor([[0, 0, 1, 1]])
    routed = RoutedModel(model, paths, CentroidRouter(("a", "b"), np.zeros((2, 16)), np.ones(16), 1.0))
    torch.testing.assert_close(routed.states(ids, mask), routed.states(ids[:, 2:]), atol=1e-5, rtol=1e-5)
    right = torch.tensor([[5, 9, 0, 0]])
    torch.testing.assert_close(routed.states(right, mask.flip(1)), routed.states(ids[:, 2:]), atol=1e-5, rtol=1e-5)


def test_arrow_weighs_every_token_by_its_scores(model, paths):
    """One module, by hand: y + sum_k p_k D_k x with p = softmax |x . v_k|."""
    found = arrow_router(paths)
    routed = RoutedModel(model, paths, found)
    q = model.get_submodule(MODULES[0])
    x = torch.randn(2, 3, 16, generator=torch.Generator().manual_seed(0))
    y = q(x)
    routed.remove()
    scores = np.abs(x.numpy() @ found.prototypes[MODULES[0]].T)
    p = np.exp(scores) / np.exp(scores).sum(-1, keepdims=True)
    extra = sum(p[..., k, None] * (x.numpy() @ deltas(path)[MODULES[0]].T) for k, path in enumerate(paths))
    np.testing.assert_allclose(y.detach().numpy(), q(x).detach().numpy() + extra, atol=1e-4)


@pytest.mark.parametrize("with_shared", [False, True])
def test_a_folder_is_loaded_as_it_was_written(tmp_path, model, paths, with_shared):
    """shared/ and the experts, or experts that hold the shared part: the same model either way."""
    ids = torch.tensor([[5, 9, 2, 7], [11, 3, 8, 1]])
    probe = RoutedModel(model, paths, CentroidRouter(("a", "b"), np.zeros((2, 16)), np.ones(16), 1.0))
    router = sure_router(probe.states(ids))
    probe.remove()
    build_twin(paths, tmp_path / "out", expert_rank=16, router=router, with_shared=with_shared)
    routed = load_routed(model, tmp_path / "out")
    routed.route(ids)
    with torch.no_grad():
        found = model(input_ids=ids).logits
    routed.remove()
    for row, path in enumerate(paths):
        expected = logits_with(model, deltas(path), ids[row : row + 1])
        torch.testing.assert_close(found[row : row + 1], expected, atol=1e-4, rtol=1e-4)


def test_arrow_from_a_folder_generates(tmp_path, model, paths):
    export_arrow(paths, tmp_path / "out", top=1)
    routed = load_routed(model, tmp_path / "out")
    assert routed.top == 1
    ids = torch.tensor([[5, 9, 2, 7]])
    by_hand = RoutedModel(model, paths, arrow_router(paths), top=1)
    routed.remove()
    expected = by_hand.generate(input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=4, do_sample=False)
    by_hand.remove()
    routed = load_routed(model, tmp_path / "out")
    found = routed.generate(input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=4, do_sample=False)
    routed.remove()
    assert torch.equal(found, expected)


def test_folders_without_a_router_are_for_servers(tmp_path, model, paths):
    build_twin(paths, tmp_path / "out")
    with pytest.raises(MergeError, match=r"no router\.safetensors"):
        load_routed(model, tmp_path / "out")
    with pytest.raises(MergeError, match="neither"):
        load_routed(model, paths[0])


def test_mistakes(model, paths):
    router = CentroidRouter(("a", "b"), np.zeros((2, 16)), np.ones(16), 1.0)
    with pytest.raises(MergeError, match="1 experts for a router of 2"):
        RoutedModel(model, paths[:1], router)
    routed = RoutedModel(model, paths, router)
    with pytest.raises(MergeError, match="not been routed"):
        model(input_ids=torch.tensor([[1, 2]]))
    routed.remove()
