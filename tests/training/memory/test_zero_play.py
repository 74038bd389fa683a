"""What ZeRO-3 holds beside activations, by hand and against DeepSpeed's own linear."""

import copy

import pytest
import torch
from torch import nn

from mtft.distributed.launch import LaunchConfig
from mtft.training.memory.activation_peak import LiveBytes
from mtft.training.memory.zero_play import GatherPlay, live_parameters


class Whole(nn.Sequential):
    @property
    def base_model(self):
        return self


class Chain(nn.Module):
    """Linears of 100 numbers, and an input embedding of 200 of them."""

    def __init__(self, layers):
        super().__init__()
        self.embedding = nn.Embedding(20, 10)
        self.layers = nn.ModuleList(nn.Linear(10, 10, bias=False) for _ in range(layers))

    @property
    def base_model(self):
        return self

    def forward(self, ids):
        hidden = self.embedding(ids)
        for layer in self.layers:
            hidden = layer(hidden)
        return hidden


def held(model, **settings):
    """(bytes when a pass begins, after its forward, after its backward), and without the activations."""
    model.requires_grad_(False)
    with LiveBytes(model.parameters()) as live:
        play = GatherPlay(model, launch=LaunchConfig(zero=3, ranks=2, **settings))
        play.begin()
        begun = live.now
        out = model(torch.zeros(1, dtype=torch.long))
        del out
        forward = live.now
        play.finish()
        return begun, forward, live.now


def test_weights_are_gathered_and_a_group_once_more_until_its_last_weight_is_there():
    assert held(Chain(8)) == (2 * 4000, 4000, 0)  # fp32: 200 + 8 * 100 numbers
    assert held(Chain(8).bfloat16()) == (2 * 2000, 2000, 0)
    assert held(Chain(8), prefetch_bucket=300) == (4000 + 1200, 4000, 0)


def test_a_model_that_is_larger_than_what_is_kept_has_a_group_on_its_way_all_the_time():
    assert held(Chain(8), prefetch_bucket=300, live_parameters=500, reuse_distance=0) == (3200, 3200, 0)
    # without prefetching only weights that come again soon, and always the largest module's
    assert held(Chain(8), prefetch_bucket=0, live_parameters=500, reuse_distance=800) == (1600, 1600, 0)
    assert held(Chain(8), prefetch_bucket=0, live_parameters=500, reuse_distance=0) == (800, 800, 0)


def test_no_more_than_deepspeeds_live_parameters_by_default():
    assert live_parameters(LaunchConfig(zero=3, ranks=4)) == 10**9


def saved(model, inputs, bf16):
    """Bytes that a forward pass keeps for the backward, its inputs and weights aside; the output and the gradients."""
    kept = {}

    def keep(tensor):
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    hooks = torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor)
    with hooks, torch.autocast("cpu", dtype=torch.bfloat16, enabled=bf16):
        out = model(inputs)
    out.float().square().sum().backward()
    for tensor in (inputs, *model.parameters()):
        kept.pop(tensor.untyped_storage().data_ptr(), None)
    return sum(kept.values()), out, [parameter.grad for parameter in model.parameters()]


@pytest.mark.parametrize("bf16", [False, True])
@pytest.mark.parametrize("bias", [False, True])
def test_linears_are_deepspeeds(bf16, bias):
    deepspeed = pytest.importorskip("deepspeed.runtime.zero.linear")
    torch.manual_seed(0)
    ours, inputs = Whole(nn.Linear(64, 64, bias=bias)), torch.randn(2, 3, 64, requires_grad=True)
    theirs = copy.deepcopy(ours)
    theirs[0].forward = lambda x: deepspeed.zero3_linear_wrap(x, theirs[0].weight, theirs[0].bias)
    GatherPlay(ours, launch=LaunchConfig(zero=3, ranks=2))
    (own_bytes, own, own_gradients), (bytes_, out, gradients) = (saved(model, inputs, bf16) for model in (ours, theirs))
    assert own_bytes == bytes_ == 0  # not the copies in bf16, of which torch's own linear keeps two
    torch.testing.assert_close((own, own_gradients), (out, gradients), rtol=0, atol=0)
