"""Gram matrices of inputs: the right sums, one for each input, and none that stays on the device."""

import pytest
import torch
from torch import nn
from torch.utils._pytree import tree_map_only

from mtft.adapters.safetensors_io import TensorFile
from mtft.common.errors import MergeError
from mtft.merge.engine.input_grams import collect_grams, save_grams
from mtft.training.memory.activation_peak import LiveBytes


class Far(torch.Tensor):
    """A tensor on another device: it comes back by .cpu() alone. Counts the bytes that are there.

    It says that it is on `meta`: torch asks other devices for drivers that are not here.
    """

    now = peak = 0
    inner: torch.Tensor

    @staticmethod
    def __new__(cls, inner: torch.Tensor) -> "Far":
        far = torch.Tensor._make_wrapper_subclass(cls, inner.shape, dtype=inner.dtype, device="meta")
        far.inner = inner
        Far.now += inner.nbytes
        Far.peak = max(Far.peak, Far.now)
        return far

    def __del__(self) -> None:
        Far.now -= self.inner.nbytes

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        near = dict(kwargs or {})
        brings = func is torch.ops.aten._to_copy.default and str(near.get("device", "meta")) == "cpu"
        if "device" in near:
            near["device"] = torch.device("cpu")
        out = func(*tree_map_only(Far, lambda x: x.inner, args), **tree_map_only(Far, lambda x: x.inner, near))
        return out if brings else tree_map_only(torch.Tensor, Far, out)


class Block(nn.Module):
    """Attention and MLP as far as their linears go."""

    def __init__(self, width: int, inner: int) -> None:
        super().__init__()
        self.q, self.k, self.v, self.o = (nn.Linear(width, width, bias=False) for _ in range(4))
        self.gate, self.up = (nn.Linear(width, inner, bias=False) for _ in range(2))
        self.down = nn.Linear(inner, width, bias=False)

    def forward(self, x):
        a = torch.tanh(x)
        x = x + self.o(torch.sin(self.q(a)) * self.k(a) + self.v(a))
        b = torch.tanh(x)
        return x + self.down(self.gate(b) * self.up(b))


WIDTH, INNER, LAYERS, NAMES = 24, 40, 6, ("q", "k", "v", "o", "gate", "up", "down")


@pytest.fixture
def model():
    torch.manual_seed(0)
    return nn.Sequential(*(Block(WIDTH, INNER) for _ in range(LAYERS)))


def linears(model):
    return {f"{i}.{name}": model.get_submodule(f"{i}.{name}") for i in range(LAYERS) for name in NAMES}


def passes(model, wrap=lambda x: x):
    for seed in range(3):
        torch.manual_seed(seed)
        x, real = torch.randn(2, 9, WIDTH), torch.arange(9).expand(2, -1) < 9 - seed
        yield (lambda x=x: model(wrap(x))), wrap(real)


def by_hand(model):
    """Every module by itself: the sum over all passes of x^T x, in fp64."""
    sums, tokens = {}, 0
    for forward, real in passes(model):
        seen, handles = {}, []
        for name, module in linears(model).items():
            hook = lambda _, inputs, seen=seen, name=name: seen.__setitem__(name, inputs[0])  # noqa: E731
            handles.append(module.register_forward_pre_hook(hook))
        with torch.no_grad():
            forward()
        for handle in handles:
            handle.remove()
        for name, x in seen.items():
            x = x[real].double()
            sums[name] = sums.get(name, 0.0) + x.T @ x
        tokens += int(real.sum())
    return {name: total / tokens for name, total in sums.items()}


def test_sums_are_those_of_every_module_by_itself(model):
    found = collect_grams(linears(model), passes(model))
    for name, G in by_hand(model).items():
        assert torch.equal(found[name], G)


def test_modules_with_one_input_share_one_matrix(model):
    with LiveBytes(model.parameters()) as live:
        found = collect_grams(linears(model), passes(model))
    assert found["0.q"] is found["0.k"] is found["0.v"]
    assert found["0.gate"] is found["0.up"]
    distinct = {id(G) for G in found.values()}
    assert len(distinct) == 4 * LAYERS  # q with k and v, o, gate with up, down
    held = sum(8 * n * n for n in (WIDTH, WIDTH, WIDTH, INNER)) * LAYERS
    assert held <= live.now <= 1.01 * held + sum(x.nbytes for x in [torch.zeros(2, 9, WIDTH)] * 4)
    assert not any(module._forward_pre_hooks for module in model.modules())


def move_far(model):
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            module._parameters[name] = nn.Parameter(Far(parameter.data), requires_grad=False)


def test_the_device_holds_one_product_at_a_time(model):
    expected = by_hand(model)
    move_far(model)
    Far.peak = before = Far.now
    found = collect_grams(linears(model), passes(model, Far))
    assert all(G.device.type == "cpu" and not isinstance(G, Far) for G in found.values())
    for name, G in found.items():
        torch.testing.assert_close(G, expected[name], rtol=1e-12, atol=1e-12)
    largest = 8 * INNER * INNER
    assert Far.peak - before < 4 * largest  # of all modules: 6 * (6 * 24^2 + 40^2) * 8, twenty times the largest
    assert sum(8 * G.numel() for G in found.values()) > 15 * largest


def test_an_input_that_is_written_over_is_another(model):
    class Overwriting(nn.Module):
        def __init__(self):
            super().__init__()
            self.one, self.two = nn.Linear(4, 4, bias=False), nn.Linear(4, 4, bias=False)

        def forward(self, x):
            return self.one(x) + self.two(x.mul_(2))

    net = Overwriting()
    x = torch.randn(1, 5, 4)
    found = collect_grams({"one": net.one, "two": net.two}, [(lambda: net(x), torch.ones(1, 5, dtype=torch.bool))])
    torch.testing.assert_close(found["two"], 4 * found["one"])


def test_inputs_that_are_shared_now_and_then_are_refused():
    one, two = nn.Linear(4, 4), nn.Linear(4, 4)
    x, y = torch.randn(1, 5, 4), torch.randn(1, 5, 4)
    real = torch.ones(1, 5, dtype=torch.bool)
    turns = [(lambda: (one(x), two(x)), real), (lambda: (one(x), two(y)), real)]
    with pytest.raises(MergeError, match="the same input in some passes"):
        collect_grams({"one": one, "two": two}, turns)


def test_a_module_that_no_token_reaches_is_named():
    one, two = nn.Linear(4, 4), nn.Linear(4, 4)
    turn = (lambda: one(torch.randn(1, 5, 4)), torch.ones(1, 5, dtype=torch.bool))
    with pytest.raises(MergeError, match="passes through two"):
        collect_grams({"one": one, "two": two}, [turn])


def test_files_hold_a_matrix_for_each_module(model, tmp_path):
    found = collect_grams(linears(model), passes(model))
    for _ in range(2):  # another run writes over it
        save_grams(linears(model), lambda: passes(model), tmp_path / "grams", "a")
    file = TensorFile(tmp_path / "grams" / "a.safetensors")
    assert list(file.entries) == list(found)
    for name, G in found.items():
        assert (file.read(name) == G.float().double().numpy()).all()


LAYER = 8 * (6 * WIDTH * WIDTH + INNER * INNER)  # bytes of a block's matrices, each module counted


@pytest.mark.parametrize(("held", "turns"), [(0, 7 * LAYERS), (2 * LAYER, LAYERS // 2), (10**9, 1)])
def test_sums_of_some_modules_are_held_at_a_time(model, tmp_path, held, turns):
    counted = []

    def again():
        counted.append(0)
        return passes(model)

    save_grams(linears(model), lambda: passes(model), tmp_path, "whole", held_bytes=10**9)
    with LiveBytes(model.parameters()) as live:  # 189 kB where all are held
        save_grams(linears(model), again, tmp_path, "parts", held_bytes=held)
    assert len(counted) == turns
    assert live.peak < held + 5 * 8 * INNER * INNER  # one that is alone, its product, what is written, the pass itself
    assert (tmp_path / "parts.safetensors").read_bytes() == (tmp_path / "whole.safetensors").read_bytes()
