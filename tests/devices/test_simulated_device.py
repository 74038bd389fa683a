"""The simulated device itself: it refuses what CUDA refuses, counts what CUDA waits for, computes as the CPU."""

import copy

import pytest
import torch
from torch import nn

from tests.devices.simulated_device import DeviceMixture, DeviceTensor, Simulation, simulated_device, to_cpu, to_device

DEVICE = simulated_device()


@pytest.fixture
def seen():
    with Simulation() as simulation:
        yield simulation


def on_device(*shape, **options):
    return torch.zeros(*shape, device=DEVICE, **options)


MIXTURES = {
    "sum": lambda: on_device(3) + torch.ones(3),
    "sum in place": lambda: on_device(3).add_(torch.ones(3)),
    "product": lambda: on_device(2, 3) @ torch.ones(3, 2),
    "linear layer": lambda: nn.Linear(3, 2)(on_device(4, 3)),
    "cat": lambda: torch.cat([on_device(3), torch.ones(3)]),
    "stack of numbers": lambda: torch.stack([on_device(()), torch.ones(())]),
    "where": lambda: torch.where(torch.ones(3) > 0, on_device(3), 0.0),
    "embedding": lambda: nn.Embedding(5, 2)(on_device(3, dtype=torch.long)),
    "index of the device into the CPU": lambda: torch.ones(4)[on_device(3, dtype=torch.long)],
    "values of the CPU put into the device": lambda: on_device(4).__setitem__(
        slice(0, 3), torch.ones(3) + on_device(3)
    ),
    "values by index": lambda: on_device(4).index_put_((on_device(2, dtype=torch.long),), torch.ones(2)),
    "gather": lambda: on_device(2, 3).gather(1, torch.zeros(2, 1, dtype=torch.long)),
    "index_add": lambda: torch.zeros(3).index_add(0, on_device(2, dtype=torch.long), on_device(2)),
    "a CPU number in place": lambda: torch.zeros(()).add_(on_device(())),
    "cross-entropy": lambda: nn.functional.cross_entropy(on_device(2, 3), torch.zeros(2, dtype=torch.long)),
}


@pytest.mark.parametrize("planted", MIXTURES)
def test_a_planted_cpu_tensor_is_refused(seen, planted):
    with pytest.raises(DeviceMixture, match="CPU tensor"):
        MIXTURES[planted]()


def test_a_planted_cpu_tensor_in_a_backward_is_refused(seen):
    class Planted(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x * 2

        @staticmethod
        def backward(ctx, gradient):
            return gradient * torch.ones(3)

    x = on_device(3, requires_grad=True)
    with pytest.raises(DeviceMixture):
        Planted.apply(x).sum().backward()


def test_cpu_numbers_go_into_elementwise_operations(seen):
    x = on_device(3)
    assert (x + torch.tensor(2.0)).device == (torch.tensor(2.0) * x).device == DEVICE
    x.fill_(torch.tensor(1.5))
    x.mul_(torch.tensor(2.0))
    x[0] = 7.0
    assert x.tolist() == [7.0, 3.0, 3.0]
    assert [wait.what for wait in seen.waits] == ["a copy to the host"]  # of tolist


def pinned(*shape):
    return torch.ones(*shape).pin_memory()


WAITS = {
    "item": lambda: on_device(()).item(),
    "float": lambda: float(on_device(())),
    "bool": lambda: bool(on_device(()) > 0),
    "if": lambda: 1 if on_device(3).any() else 0,
    "tolist": lambda: on_device(3).tolist(),
    "cpu": lambda: on_device(3).cpu(),
    "to the CPU": lambda: on_device(3).to("cpu"),
    "copied into the CPU": lambda: torch.ones(3).copy_(on_device(3)),
    "equal": lambda: torch.equal(on_device(3), on_device(3)),
    "nonzero": lambda: on_device(3).nonzero(),
    "where of one argument": lambda: torch.where(on_device(3) > 0),
    "boolean index": lambda: on_device(3)[on_device(3) > 0],
    "put by a boolean index": lambda: on_device(3).__setitem__(on_device(3) > 0, 1.0),
    "masked_select": lambda: on_device(3).masked_select(on_device(3) > 0),
    "unique": lambda: on_device(3).unique(),
    "bincount": lambda: on_device(3, dtype=torch.long).bincount(),
    "a list to the device": lambda: torch.tensor([1, 2], device=DEVICE),
    "ordinary memory to the device": lambda: torch.ones(3).to(DEVICE),
    "ordinary memory, said not to block": lambda: torch.ones(3).to(DEVICE, non_blocking=True),
    "pinned memory, blocking": lambda: pinned(3).to(DEVICE),
    "copied in": lambda: on_device(3).copy_(torch.ones(3)),
    "index on the CPU": lambda: on_device(3)[torch.tensor([0, 1])],
}


@pytest.mark.parametrize("planted", WAITS)
def test_a_planted_wait_is_counted_with_its_place(seen, planted):
    WAITS[planted]()
    assert len(seen.waits) == 1
    assert seen.waits[0].where.startswith("tests/devices/test_simulated_device.py:")


UNORDERED = {
    "index_add": lambda: on_device(3).index_add(0, on_device(2, dtype=torch.long), on_device(2)),
    "scatter_add": lambda: on_device(3).scatter_add_(0, on_device(2, dtype=torch.long), on_device(2)),
    "bincount with weights": lambda: on_device(3, dtype=torch.long).bincount(on_device(3).double()),
    "cumsum": lambda: on_device(3).cumsum(0),
}


@pytest.mark.parametrize("planted", UNORDERED)
def test_a_planted_sum_in_any_order_is_noticed(seen, planted):
    UNORDERED[planted]()
    assert [x.where.partition(":")[0] for x in seen.unordered] == ["tests/devices/test_simulated_device.py"]


def test_sums_of_whole_numbers_and_largest_values_have_no_order(seen):
    at = on_device(2, dtype=torch.long)
    on_device(3, dtype=torch.long).scatter_add_(0, at, at)
    on_device(3).scatter_reduce_(0, at, on_device(2), reduce="amax")
    on_device(3, dtype=torch.long).cumsum(0)
    assert seen.unordered == []


def test_what_needs_no_wait_counts_none(seen):
    x = pinned(4).to(DEVICE, non_blocking=True)
    y = on_device(4).copy_(pinned(4), non_blocking=True)
    z = torch.where(x > 0, x, y).masked_fill(x > 2, 0.0).sum() + torch.arange(4, device=DEVICE).max()
    x[torch.arange(2, device=DEVICE)] = z
    assert pinned(4)[1:].is_pinned()
    assert not torch.ones(4).is_pinned()
    assert seen.waits == []
    assert len(seen.copies) == 2


def test_the_backward_of_a_boolean_mask_waits_too(seen):
    x, mask = on_device(3, requires_grad=True), on_device(3) == 0
    total = x.new_zeros(3).masked_scatter(mask, x).sum()
    assert seen.waits == []
    total.backward()
    assert [wait.what[:24] for wait in seen.waits] == ["masked_scatter_backward:"]


def test_views_in_place_operations_and_gradients_are_those_of_the_cpu():
    def work(device):
        x = torch.arange(12.0, device=device).reshape(3, 4).requires_grad_()
        y = x * 1
        y[0].mul_(3)
        y.T[2] += x.T[0]
        (y.softmax(-1) * y.detach().sort(-1).indices).sum().backward()
        return y.detach(), x.grad

    expected = work("cpu")
    with Simulation():
        found = work(DEVICE)
        assert all(isinstance(x, DeviceTensor) for x in found)
    for one, other in zip(to_cpu(found), expected, strict=True):
        assert torch.equal(one, other)


def test_random_numbers_are_those_of_the_cpu(seen):
    for device in ("cpu", DEVICE):
        torch.manual_seed(3)
        generator = torch.Generator(device=device).manual_seed(5)
        drawn = torch.rand(4, device=device), torch.rand(4, generator=generator, device=device)
        kept = drawn if device == "cpu" else to_cpu(drawn)
        if device == "cpu":
            expected = kept
    assert all(map(torch.equal, kept, expected))


def test_a_model_moves_whole_and_shared_weights_stay_shared(seen):
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed, self.head = nn.Embedding(5, 3), nn.Linear(3, 5, bias=False)
            self.head.weight = self.embed.weight
            self.register_buffer("scale", torch.ones(3))

    model = to_device(Tied())
    assert model.head.weight is model.embed.weight
    assert isinstance(model.head.weight, nn.Parameter)
    assert {x.device for x in (*model.parameters(), *model.buffers())} == {DEVICE}
    twin = copy.deepcopy(model)
    assert twin.head.weight is twin.embed.weight
    with torch.no_grad():
        twin.head.weight.zero_()
    assert bool(model.head.weight.any())


def test_outside_of_a_simulation_torch_has_no_such_device():
    assert not torch.accelerator.is_available()
    with Simulation():
        x = torch.ones(2, device=DEVICE)
    assert x.sum().item() == 2.0  # what was made there can still be read
    with pytest.raises(NotImplementedError):
        torch.ones(2, device=DEVICE)
