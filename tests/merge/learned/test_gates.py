"""Gates: folding is the forward pass, gradients are right, objectives do what they say, the model is left alone."""

import json

import numpy as np
import pytest
import torch

from mtft.adapters.lora_factors import LoraFactors, read_adapter
from mtft.common.errors import MergeError
from mtft.merge.learned.gates import GATE_KINDS, Gates
from mtft.merge.learned.train_gates import GateBatch, fold_gates, objective, train_gates
from mtft.training.memory.activation_peak import LiveBytes
from tests.fuse import tiny
from tests.merge import golden as g

VOCABULARY = 7


class Tiny(torch.nn.Module):
    """Two blocks of one linear module and a frozen head, float64."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.layers = torch.nn.ModuleList(torch.nn.ModuleDict({"q": torch.nn.Linear(8, 8)}) for _ in range(2))
        self.head = torch.nn.Linear(8, VOCABULARY)
        self.double()

    def forward(self, x):
        for layer in self.layers:
            x = x + torch.tanh(layer["q"](x))
        return type("Output", (), {"logits": self.head(x)})


@pytest.fixture
def paths(tmp_path):
    rng = np.random.default_rng(0)
    make = lambda r: LoraFactors(rng.normal(size=(r, 8)), rng.normal(size=(8, r)), 0.5)  # noqa: E731
    made = {"a": {"layers.0.q": make(2), "layers.1.q": make(2)}, "b": {"layers.0.q": make(3), "layers.1.q": make(3)}}
    made["c"] = {"layers.1.q": make(1)}
    return [g.write(tmp_path / name, modules) for name, modules in made.items()]


def batch(task="a", seed=0, rows=16, role="target"):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(rows, 3, 8, generator=generator, dtype=torch.float64)
    labels = torch.randint(0, VOCABULARY, (rows, 3), generator=generator)
    labels[:, 0] = -100
    return GateBatch({"x": x}, labels, task, role)


def with_adapter(model, folder, x):
    """The model's output with the adapter added to its weights."""
    adapter = read_adapter(folder)
    copy = Tiny()
    copy.load_state_dict(model.state_dict())
    for name in adapter.modules:
        copy.get_submodule(name).weight.data += torch.tensor(g.delta(adapter.factors(name)))
    return copy(x).logits


@pytest.mark.parametrize("kind", GATE_KINDS)
def test_fold_is_the_forward_pass(tmp_path, paths, kind):
    model, one = Tiny(), batch()
    gates = Gates(model, [read_adapter(path) for path in paths], kind)
    for value in gates.values.values():
        value.data = torch.randn(value.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    gates.eval()
    expected = model(**one.inputs).logits
    gates.remove()
    assert not torch.allclose(model(**one.inputs).logits, expected)
    fold_gates(paths, gates, tmp_path / "out", rank="lossless", dtype="fp64")
    assert json.loads((tmp_path / "out" / "merge.json").read_text())["method"] == "gated"
    torch.testing.assert_close(with_adapter(model, tmp_path / "out", **one.inputs), expected, atol=1e-9, rtol=0)


@pytest.mark.parametrize("kind", GATE_KINDS)
def test_gradients(paths, kind):
    """Numerical gradients of the objective in every gate, with the step's random draw held fixed."""
    model, one = Tiny(), batch()
    gates = Gates(model, [read_adapter(path) for path in paths], kind)
    value = next(iter(gates.values.values()))
    value.data += 0.1 * torch.randn(value.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(2))

    def loss(v):
        with torch.no_grad():
            kept = value.data.clone()
        value.data = v
        found = objective(model(**one.inputs).logits, one, GATE_KINDS[kind].entropy)
        value.data = kept
        return found

    found = objective(model(**one.inputs).logits, one, GATE_KINDS[kind].entropy)
    (gradient,) = torch.autograd.grad(found, value)
    for index in np.ndindex(*value.shape):
        step = torch.zeros_like(value)
        step[index] = 1e-6
        slope = (loss(value.data + step) - loss(value.data - step)).item() / 2e-6
        assert gradient[index].item() == pytest.approx(slope, abs=1e-6)
    gates.remove()


@pytest.mark.parametrize("kind", GATE_KINDS)
def test_training_lowers_the_objective_and_leaves_the_model(paths, kind):
    model, one = Tiny().train(), batch()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    steps = 60
    result = train_gates(
        model, paths, [one], kind, steps=steps, learning_rate=0.5 if kind == "self_positioning" else 0.02
    )
    if kind in ("scalearn", "concrete"):  # dropout and masks make single steps noisy
        assert np.mean(result.history[-15:]) < np.mean(result.history[:15])
    else:
        assert result.history[-1] < result.history[0]
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert model.training
    assert all(p.requires_grad and p.grad is None for p in model.parameters())
    assert not any(layer["q"]._forward_hooks for layer in model.layers)


@pytest.mark.parametrize(("kind", "expected"), [("scalearn", [0.1, 0.075, 0.05, 0.025]), ("cat_gates", [0.1] * 4)])
def test_the_rate_falls_to_zero_where_a_kind_says_so(paths, kind, expected, monkeypatch):
    rates = []
    step = torch.optim.Adam.step
    monkeypatch.setattr(
        torch.optim.Adam, "step", lambda self: (rates.append(self.param_groups[0]["lr"]), step(self))[1]
    )
    assert train_gates(Tiny(), paths, [batch()], kind, steps=0, learning_rate=0.1).history == []
    train_gates(Tiny(), paths, [batch()], kind, steps=4, learning_rate=0.1)
    assert rates == pytest.approx(expected)


def test_one_expert_on_its_own_data_gets_its_weight_back(paths):
    """Labels drawn from expert a's own argmax: labelled gates move towards a."""
    model, one = Tiny(), batch(rows=64)
    labels = with_adapter(model, paths[0], **one.inputs).argmax(-1)
    own = GateBatch(one.inputs, labels, "a")
    result = train_gates(model, paths[:2], [own], "atlas", steps=150, learning_rate=0.05)
    for name in ("layers.0.q", "layers.1.q"):
        gate = result.gates.of(name).detach()
        assert gate[0] > gate[1] + 0.3


def test_adamerging_stays_in_bounds_and_layers_have_their_own(paths):
    model = Tiny()
    result = train_gates(model, paths, [batch()], "adamerging_layer", steps=40, learning_rate=0.2)
    values = torch.stack([result.gates.of(name).detach() for name in ("layers.0.q", "layers.1.q")])
    assert values.min() >= 0
    assert values.max() <= 1
    assert not torch.equal(values[0], values[1])


def test_entropy_collapse_is_stopped(paths):
    """Outputs that become certain while the gates train: the experts' entropy, measured before, is the yardstick."""
    calls = []

    def sharper(model, batch):
        calls.append(1)
        return model(**batch.inputs).logits * (50.0 if len(calls) > len(paths) + 3 else 1.0)

    result = train_gates(Tiny(), paths, [batch()], "adamerging_task", steps=20, logits=sharper)
    assert len(result.history) == 3
    assert "half of the experts' own at step 3" in result.warnings[-1]


def test_negation_unlearns(paths):
    model, one = Tiny(), batch(rows=32)
    target, control = (GateBatch(one.inputs, one.labels_BT, "a", role) for role in ("negate", "control"))
    gone = train_gates(model, paths[:1], [target], "atlas", steps=40, learning_rate=0.05)
    assert gone.history[-1] < gone.history[0] <= 0
    assert objective(torch.zeros(32, 3, VOCABULARY), control, False) == pytest.approx(np.log(VOCABULARY))


def test_few_examples_warn(paths):
    result = train_gates(Tiny(), paths, [batch("a", rows=4), batch("b", rows=20)], "cat_gates", steps=1)
    assert any("'a'" in text and "'b'" not in text for text in result.warnings)


def test_mistakes(tmp_path, paths):
    with pytest.raises(MergeError, match="unknown gates"):
        Gates(Tiny(), [read_adapter(paths[0])], "magic")
    other = g.write(tmp_path / "d", {"layers.9.q": g.factors()[0]})
    with pytest.raises(MergeError, match=r"no module 'layers.9.q'"):
        Gates(Tiny(), [read_adapter(other)], "atlas")
    with pytest.raises(MergeError, match="no batches"):
        train_gates(Tiny(), paths, [], "atlas")


@pytest.mark.parametrize(("kind", "weight"), [("adamerging_layer", 0.3), ("concrete", 0.3), ("cat_gates", 1 / 3)])
def test_untrained_gates_are_a_scaled_sum(paths, kind, weight):
    model, one = Tiny(), batch()
    gates = Gates(model, [read_adapter(path) for path in paths], kind).eval()
    found = model(**one.inputs).logits
    gates.remove()
    for adapter in map(read_adapter, paths):
        for name in adapter.modules:
            model.get_submodule(name).weight.data += weight * torch.tensor(g.delta(adapter.factors(name)))
    torch.testing.assert_close(found, model(**one.inputs).logits, atol=1e-9, rtol=0)


def test_logits_are_made_for_the_labels_alone(tmp_path):
    """As with all of them, but for rounding; counted: no buffer of a whole batch's logits is ever there."""
    width, length = 4096, 64
    base = tiny.base(tmp_path / "base", vocab_size=width)
    experts = [tiny.adapter(tmp_path / name, base, seed) for seed, name in enumerate("ab")]
    model = tiny.model(1, width=16, dtype=torch.float32, vocab_size=width)
    ids = torch.arange(length)[None] + 3
    labels = torch.full_like(ids, -100)
    labels[:, :4] = ids[:, 1:5]
    one = GateBatch({"input_ids": ids, "use_cache": False}, labels, "a")
    every = {}
    for name, logits in {"all": lambda net, b: net(**b.inputs).logits, "labels": None}.items():
        with LiveBytes(model.parameters()) as live:
            result = train_gates(model, experts, [one], "cat_gates", steps=3, logits=logits)
        every[name] = (result.history, live.peak)
    assert every["labels"][0] == pytest.approx(every["all"][0], rel=1e-5)
    assert every["all"][1] > length * width * 4
    assert every["labels"][1] < length * width * 4
