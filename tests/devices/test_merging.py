"""What a merge does on a loaded model, on the simulated device: gates, routed experts, Gram matrices, states."""

import pytest
import torch

from mtft.adapters.lora_factors import read_adapter
from mtft.adapters.mlp_router import MlpRouter
from mtft.adapters.routers import CentroidRouter
from mtft.merge.engine.input_grams import collect_grams
from mtft.merge.experts.arrow_prototypes import arrow_router
from mtft.merge.experts.routed_model import RoutedModel
from mtft.merge.learned.gates import GATE_KINDS
from mtft.merge.learned.train_gates import GateBatch, fold_gates, train_gates
from mtft.models.hidden_states import last_token_states
from tests.devices.simulated_device import Simulation, simulated_device, to_cpu, to_device
from tests.fuse import tiny

IDS, MASK = tiny.prompts()


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return tiny.base(tmp_path_factory.mktemp("base") / "base")


@pytest.fixture(scope="module")
def adapters(base, tmp_path_factory):
    root = tmp_path_factory.mktemp("adapters")
    # small: a large update would only measure how far rounding is carried on
    return [tiny.adapter(root / name, base, seed, r=r, std=0.05) for name, seed, r in (("a", 11, 4), ("b", 12, 3))]


def model():
    return tiny.model(1, width=16, dtype=torch.float32)


def on_both(work):
    """`work(model, ids, mask)` on the CPU and on the device, and the simulation."""
    expected = work(model(), IDS, MASK)
    with Simulation() as seen:
        there = to_device(model()), IDS.to(simulated_device()), MASK.to(simulated_device())
        seen.waits.clear()
        found = to_cpu(work(*there))
    return found, expected, seen


@pytest.mark.parametrize("kind", GATE_KINDS)
def test_gates_train_and_fold_as_on_the_cpu(adapters, kind, tmp_path):
    def work(network, ids, mask):
        labels = torch.where(mask > 0, ids, -100)
        batches = [GateBatch({"input_ids": ids, "attention_mask": mask}, labels, task) for task in ("a", "b")]
        trained = train_gates(network, adapters, batches, kind, steps=3)
        folder = tmp_path / str(ids.device).partition(":")[0]
        fold_gates(adapters, trained.gates, folder)
        return trained.history, dict(trained.gates.values.items()), folder

    (history, values, folder), (expected_history, expected, on_cpu), _ = on_both(work)
    assert len(history) == 3
    assert history == pytest.approx(expected_history, rel=1e-4)
    for name, value in expected.items():
        torch.testing.assert_close(values[name], value.detach(), rtol=1e-3, atol=1e-5)
    folded, as_on_cpu = read_adapter(folder), read_adapter(on_cpu)
    for name in as_on_cpu.modules:
        one, other = (f.scale * f.B_MR @ f.A_RN for f in (folded.factors(name), as_on_cpu.factors(name)))
        torch.testing.assert_close(torch.from_numpy(one), torch.from_numpy(other), rtol=1e-2, atol=1e-5)


@pytest.mark.parametrize("kind", GATE_KINDS)
def test_a_step_of_gates_waits_for_nothing_but_the_entropy_it_is_stopped_by(adapters, kind):
    with Simulation() as seen:
        network, ids = to_device(model()), IDS.to(simulated_device())
        batches = [GateBatch({"input_ids": ids, "use_cache": False}, ids, task) for task in ("a", "b")]
        waits = []
        for steps in (2, 4):
            seen.waits.clear()
            train_gates(network, adapters, batches, kind, steps=steps)
            waits.append(list(map(str, seen.waits)))
    assert len(waits[1]) - len(waits[0]) <= 2 * GATE_KINDS[kind].entropy, waits[1][-20:]


def router(kind, adapters):
    if kind == "arrow":
        return arrow_router(adapters)
    states = {name: last_token_states(model(), IDS + k).double().numpy() for k, name in enumerate(("a", "b"))}
    return {"centroid": CentroidRouter, "mlp": MlpRouter}[kind].fit(states)


@pytest.mark.parametrize("kind", ["centroid", "mlp", "arrow", "arrow, best one"])
def test_routed_experts_answer_as_on_the_cpu(adapters, kind):
    chosen = router(kind.partition(",")[0], adapters)

    def work(network, ids, mask):
        routed = RoutedModel(network, adapters, chosen, shared=adapters[0], top=1 if "best" in kind else None)
        p = routed.route(ids, mask)
        tokens = routed.generate(input_ids=ids, attention_mask=mask, max_new_tokens=4, do_sample=False)
        return [] if p is None else p, tokens, network(input_ids=ids, attention_mask=mask).logits.detach()

    (p, tokens, logits), (expected_p, expected_tokens, expected), _ = on_both(work)
    torch.testing.assert_close(p, expected_p, rtol=1e-5, atol=1e-7)
    assert torch.equal(tokens, expected_tokens)
    torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", ["centroid", "arrow", "arrow, best one"])
def test_a_routed_step_waits_and_copies_nothing(adapters, kind):
    """Once the prompts are routed: a decoding step is forwards alone."""
    chosen = router(kind.partition(",")[0], adapters)
    name = "model.layers.0.self_attn.q_proj"
    with Simulation() as seen:
        network = to_device(model())
        routed = RoutedModel(network, adapters, chosen, top=1 if "best" in kind else None)
        routed.route(IDS.to(simulated_device()))
        linear, x = network.get_submodule(name), torch.zeros(len(IDS), 1, 16, device=simulated_device())
        linear(x)
        seen.waits.clear()
        seen.copies.clear()
        for _ in range(3):
            linear(x)
    assert seen.waits == seen.copies == []


def test_gram_matrices_are_those_of_the_cpu():
    def work(network, ids, mask):
        modules = {name: network.get_submodule(name) for name in ("model.layers.0.mlp.down_proj", "lm_head")}
        grams = collect_grams(modules, [(lambda: network(input_ids=ids, attention_mask=mask), mask > 0)])
        return {name: G.to("cpu") for name, G in grams.items()}

    found, expected, _ = on_both(work)
    for name, G in expected.items():
        torch.testing.assert_close(found[name], G, rtol=1e-5, atol=1e-6)
