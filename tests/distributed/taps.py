"""Runs on every rank of test_gradients.py: torchrun taps.py FOLDER. One launch, all engines one after the other."""

import hashlib
import sys
from pathlib import Path

import deepspeed
import torch
import torch.distributed as dist
from safetensors.torch import save_file
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from mtft.data.batching.batch import IGNORE
from mtft.gradients.capture.split_halves import SplitHalves, joined
from mtft.gradients.capture.task_gradients import TaskGradients
from mtft.losses.task_reduction import coefficients, step_counts, task_coefficients
from mtft.losses.token_nll import token_nll
from tests.gradients.tiny import ROWS, WEIGHTS, K, batches, lora, trained

# Its first use would compile it, for 90 CPU-seconds.
deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False

# Two micro-batches a rank. The second rank lacks a task in one, and has nothing at all in the other.
DEALT = [[[ROWS[0][0]], [ROWS[0][1]]], [ROWS[1], []]]


def ddp(model):
    wrapped = DistributedDataParallel(model)

    def backward(loss, last):
        wrapped.require_backward_grad_sync = last
        loss.backward()

    return wrapped, backward


def fsdp2(model):
    for layer in model.base_model.model.model.layers:
        fully_shard(layer)
    fully_shard(model)
    assert all(isinstance(parameter, DTensor) for parameter in trained(model).values())
    return model, lambda loss, last: loss.backward()


def zero(stage):
    def wrap(model):
        config = {
            "train_micro_batch_size_per_gpu": 1,
            "gradient_accumulation_steps": 2,
            "zero_optimization": {"stage": stage},
            "zero_allow_untested_optimizer": True,
        }
        optimizer = torch.optim.SGD(list(trained(model).values()), lr=0.0)
        wrapped, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=config)

        def backward(loss, last):
            wrapped.set_gradient_accumulation_boundary(last)
            wrapped.backward(loss)  # divides by the 2 micro-batches, which is for the taps to find out

        return wrapped, backward

    return wrap


ENGINES = {"ddp": ddp, "fsdp2": fsdp2, "zero1": zero(1), "zero2": zero(2), "zero3": zero(3)}


def step(wrapped, backward, parts, taps, halves=None):
    counts = step_counts(parts, K)
    with taps:
        for index, batch in enumerate(parts):
            last = index == len(parts) - 1
            if isinstance(taps, TaskGradients):
                ids_BT = batch.task_ids_BT if halves is None else halves.deal(batch)
                taps.begin(ids_BT, batch.labels_BT != IGNORE, last=last)
            c_BT = coefficients(batch, counts, WEIGHTS, "task_token")
            loss = (c_BT * token_nll(wrapped, batch)).sum() * dist.get_world_size()
            if isinstance(taps, TaskGradients):
                taps.watch(loss)
            backward(loss, last)
    return task_coefficients(counts, WEIGHTS, "task_token")


class Nothing:
    def __enter__(self): ...
    def __exit__(self, *_): ...


def same_everywhere(tensors):
    """To the bit."""
    every, content = [None] * dist.get_world_size(), b"".join(tensor.numpy().tobytes() for tensor in tensors)
    dist.all_gather_object(every, hashlib.sha256(content).hexdigest())
    return len(set(every)) == 1


def main(folder):
    deepspeed.init_distributed(dist_backend="gloo", auto_mpi_discovery=False, verbose=False)
    rank, out = dist.get_rank(), {}
    parts = [part for rows in DEALT[rank] for part in batches([rows])]
    for name, wrap in ENGINES.items():
        model = lora()
        wrapped, backward = wrap(model)
        taps = TaskGradients(model, K, isolated=True)
        check = taps.self_check()
        coef_K = step(wrapped, backward, parts, taps)
        assert taps.check(), f"{name}: the check saw nothing"
        assert check.worst < 1e-5, f"{name}: {check.worst}"
        assert taps.factor == (0.5 if "zero" in name else 1.0)
        out[f"{name} gram"] = taps.gram(coef_K)
        J = {key: value.contiguous() for key, value in taps.jacobian(coef_K).items()}
        assert same_everywhere([out[f"{name} gram"], *J.values()]), f"{name}: ranks differ"
        out |= {f"{name} {key}": value for key, value in J.items()}
        if "zero" in name:
            continue
        watched = {key: parameter.grad for key, parameter in trained(model).items()}
        model.zero_grad()
        step(wrapped, backward, parts, Nothing())
        for key, parameter in trained(model).items():
            left, right = watched[key], parameter.grad
            if isinstance(left, DTensor):
                left, right = left.to_local(), right.to_local()
            assert torch.equal(left, right), f"{name}: measuring changed the gradient of {key}"
        lean = TaskGradients(model, K, isolated=True, gram_only=True)
        step(wrapped, backward, parts, lean)
        assert torch.equal(lean.gram(coef_K).nan_to_num(), out[f"{name} gram"].nan_to_num())
        halves, doubled = SplitHalves(K, by_samples=False), TaskGradients(model, 2 * K, isolated=True, gram_only=True)
        step(wrapped, backward, parts, doubled, halves)
        part_H = halves.parts()
        G, own_K = joined(doubled.gram(coef_K.repeat_interleave(2) * part_H), part_H)
        assert same_everywhere([part_H, G, own_K]), f"{name}: ranks differ in halves"
        torch.testing.assert_close(G, out[f"{name} gram"], rtol=1e-5, atol=1e-8, equal_nan=True)
    if rank == 0:
        save_file(out, Path(folder) / "found.safetensors")
    dist.barrier()


if __name__ == "__main__":
    main(sys.argv[1])
