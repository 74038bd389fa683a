"""What every engine shares, on one rank: parts of weights made whole and cut again, and a launch that did not shard."""

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from mtft.common.errors import UserError
from mtft.distributed.sharding import (
    check_sharded,
    elements,
    fsdp_settings,
    gathered,
    placed_moments,
    resting,
    sharding_of_launch,
    trainable,
)
from mtft.training.checkpoint.checkpoint_files import load_tree, save_tree


@pytest.fixture
def one_rank(tmp_path):
    dist.init_process_group("gloo", store=dist.FileStore(str(tmp_path / "store"), 1), rank=0, world_size=1)
    try:
        yield
    finally:
        dist.destroy_process_group()


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 5), nn.Linear(5, 2))


def stepped(model, optimizer):
    """Parameters, whole, after two steps."""
    for step in range(2):
        model(torch.full((4, 3), 1.0 + step)).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    return {name: value.clone() for name, value in gathered(trainable(resting(model)), keep=True).items()}


def test_an_optimizer_s_state_goes_through_a_file_and_back_onto_its_parts(one_rank, tmp_path):
    """Two steps, state out and in, two more steps: as without the break."""
    cut = network()
    fully_shard(cut)
    optimizer = torch.optim.AdamW(cut.parameters(), lr=0.1)
    half = stepped(cut, optimizer)
    saved = gathered(optimizer.state_dict(), keep=True)
    assert not any(isinstance(value, DTensor) for state in saved["state"].values() for value in state.values())
    assert gathered(optimizer.state_dict(), keep=False)["state"][0]["exp_avg"] is None
    save_tree(tmp_path, saved)

    again = network()
    again.load_state_dict(half)
    fully_shard(again)
    fresh = torch.optim.AdamW(again.parameters(), lr=0.1)
    fresh.load_state_dict(placed_moments(fresh, load_tree(tmp_path)))
    assert isinstance(fresh.state_dict()["state"][0]["exp_avg"], DTensor)
    expected, found = stepped(cut, optimizer), stepped(again, fresh)
    for name, value in expected.items():
        assert torch.equal(found[name], value)
        assert not torch.equal(half[name], value)


def test_fsdp_that_did_not_happen_is_refused(monkeypatch, one_rank):
    model = network()
    check_sharded(model)  # nobody asked
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    with pytest.raises(UserError, match="4 parameters are not sharded"):
        check_sharded(model)
    fully_shard(model)
    check_sharded(model)


def test_gradients_are_averaged_in_fp32():
    """accelerate's own policy averages them in the precision of the forward pass."""
    policy = fsdp_settings(torch.bfloat16)["mixed_precision_policy"]
    assert (policy.param_dtype, policy.reduce_dtype) == (torch.bfloat16, torch.float32)
    policy = fsdp_settings(torch.float32)["mixed_precision_policy"]
    assert (policy.param_dtype, policy.reduce_dtype) == (None, None)


def test_engine_of_the_launch(monkeypatch):
    assert sharding_of_launch() == {"name": "ddp", "processes": 1}
    monkeypatch.setenv("WORLD_SIZE", "4")
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    assert sharding_of_launch() == {"name": "fsdp", "processes": 4}
    monkeypatch.delenv("ACCELERATE_USE_FSDP")
    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
    monkeypatch.setenv("ACCELERATE_DEEPSPEED_ZERO_STAGE", "3")
    assert sharding_of_launch() == {"name": "zero3", "processes": 4}


def test_all_numbers_of_a_parameter_are_counted():
    """Where ZeRO-3 has taken them away (ds_numel, as DeepSpeed names it), and where nf4 packs two in a byte."""
    import bitsandbytes as bnb

    whole, taken = nn.Parameter(torch.zeros(3, 5)), nn.Parameter(torch.zeros(0))
    taken.ds_numel = 15
    packed = bnb.nn.Params4bit(torch.randn(64, 64), requires_grad=False, quant_type="nf4").to("cpu")
    assert packed.numel() == 64 * 64 // 2
    assert [elements(parameter) for parameter in (whole, taken, packed)] == [15, 15, 64 * 64]
