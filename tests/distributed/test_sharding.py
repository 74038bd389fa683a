"""What every engine shares, on one rank: parts of weights made whole and cut again, and a launch that did not shard."""

import copy
from contextlib import contextmanager
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from accelerate import Accelerator
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from mtft.common.errors import UserError
from mtft.data.batching.batch import Batch
from mtft.distributed.sharding import (
    check_sharded,
    elements,
    fsdp_settings,
    gathered,
    placed_moments,
    resting,
    set_deepspeed_precision,
    sharding_of_launch,
    trainable,
)
from mtft.losses.task_reduction import step_counts
from mtft.training.checkpoint.checkpoint_files import load_tree, save_tree
from mtft.training.step.objective import Objective, StepContext, forward_backward


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


@pytest.mark.parametrize("full", [False, True])
def test_bf16_under_deepspeed_is_autocast_and_what_is_trained_stays_fp32(full):
    """Its own bf16 mode casts an adapter to bf16, and sums and averages gradients in it."""
    plugin = SimpleNamespace(deepspeed_config={"bf16": {"enabled": "auto"}}, dschf=SimpleNamespace(config={}))
    set_deepspeed_precision(plugin, torch.bfloat16, full=full)
    autocast = plugin.deepspeed_config["torch_autocast"]
    assert autocast == {"enabled": True, "dtype": "bfloat16", "lower_precision_safe_modules": []}
    assert plugin.dschf.config["bf16"]["enabled"] is not full  # ZeRO-3 shards a frozen base in bf16, as it is loaded
    set_deepspeed_precision(plugin, torch.float32, full=full)
    assert not plugin.deepspeed_config["torch_autocast"]["enabled"]
    assert not plugin.dschf.config["bf16"]["enabled"]


@pytest.mark.parametrize(
    ("name", "dtype"), [("bf16", torch.bfloat16), ("bf16", torch.float32), ("fp16", torch.float32)]
)
def test_a_precision_in_deepspeed_s_own_file_is_refused(name, dtype):
    config = {name: {"enabled": True}}
    plugin = SimpleNamespace(deepspeed_config=config, dschf=SimpleNamespace(config={}))
    with pytest.raises(UserError, match=f"fixes {name}") as caught:
        set_deepspeed_precision(plugin, dtype, full=False)
    assert caught.value.where == f"{name}.enabled in DeepSpeed's configuration"


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


class LetterLoss(Objective):
    """A loss of every token, of a model that is no language model."""

    def nll(self, model, batch):
        return model(batch.input_ids_BT).square().mean(dim=-1)


def letter_model():
    torch.manual_seed(0)
    return nn.Sequential(nn.Embedding(7, 4), nn.Linear(4, 5))


def letters():
    """Three micro-batches of a step."""
    parts = []
    for ids in ([[1, 2, 3]], [[4, 5, 6]], [[0, 0, 2]]):
        ids_BT = torch.tensor(ids)
        zeros_BT = torch.zeros_like(ids_BT)
        parts.append(Batch(ids_BT, ids_BT, zeros_BT, zeros_BT, ids_BT))
    return parts


def counts_of(parts):
    return step_counts(parts, 1, device=torch.device("cpu"))


def context_of(network, accelerator, told=None):
    objective, device = LetterLoss("task_token", "gather", "sdpa"), torch.device("cpu")
    return StepContext(network, network, objective, accelerator, ("only",), device, None, 0, False, told)


class OneRank:
    """What forward_backward uses of accelerate's Accelerator, without its state of the whole process."""

    num_processes, use_distributed, no_sync = 1, False, Accelerator.no_sync
    gradient_state = SimpleNamespace(_set_sync_gradients=lambda last: None)

    def __init__(self, *, fsdp):
        self.is_fsdp2 = fsdp

    def backward(self, loss):
        loss.backward()


@pytest.mark.parametrize(("fsdp", "expected"), [(False, [True, True, False]), (True, [False, False, False])])
def test_ranks_wait_for_one_another_once_a_step(fsdp, expected):
    """DDP averages gradients in every backward pass that is not told to leave it."""
    inside, seen = [], []

    class Counted(OneRank):
        @contextmanager
        def no_sync(self, model):
            inside.append(model)
            yield
            inside.pop()

        def backward(self, loss):
            seen.append(bool(inside))
            loss.backward()

    model, parts = letter_model(), letters()
    forward_backward(context_of(model, Counted(fsdp=fsdp)), model, parts, counts_of(parts), torch.ones(1), 1)
    assert seen == expected


def test_accumulation_under_fsdp_keeps_a_part_of_the_gradients_a_rank(one_rank):
    """accelerate's no_sync would keep whole fp32 gradients on every rank until the last micro-batch of a step."""
    model, parts = letter_model(), letters()
    whole = copy.deepcopy(model)
    for module in (*model, model):
        fully_shard(module)
    found = []

    def hold(done, of):
        found.append([type(parameter.grad) for parameter in model.parameters()])

    for network, accelerator, told in ((model, OneRank(fsdp=True), hold), (whole, OneRank(fsdp=False), None)):
        forward_backward(context_of(network, accelerator, told), network, parts, counts_of(parts), torch.ones(1), 1)
    assert found == [[DTensor] * 3] * 3
    for sharded, parameter in zip(model.parameters(), whole.parameters(), strict=True):
        torch.testing.assert_close(sharded.grad.full_tensor(), parameter.grad)
