"""A whole run under every balancer and normalisation does not depend on how its steps are split.

Five optimizer steps on a tiny GPT-2 in float64 throughout, so that what differs is the objective and not rounding
(slopes divide small differences of losses by each other: fp32 noise would grow by loss / slope). One packed row against
one micro-batch per example, and against two gloo ranks with packed rows of their own. Gradients, weights and trained
parameters must agree, with all that a balancer asks for measured from the split batches.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import product

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import torch.nn.functional as F
from torch import Tensor

from mtft.data.batching.batch import IGNORE, Batch
from mtft.losses.balancers import BALANCERS, Observation, make_balancer
from mtft.losses.task_reduction import (
    NORMALISATIONS,
    TaskCounts,
    coefficients,
    reduce_sums,
    step_counts,
    task_coefficients,
    task_losses,
    task_probs,
    task_sums,
)
from mtft.recipe.schema.loss import BalancerSection
from tests.losses.builders import Sample, isolated_inputs, lay_out, random_samples

K, STEPS = 3, 5
TASKS = ("a", "b", "c")
SHAPE = [(0, 9, 5), (0, 4, 2), (1, 7, 6), (2, 5, 4), (1, 6, 2)]
OPTIONS = {
    "fixed": {"values": {"a": 1.0, "b": 2.0, "c": 0.5}},
    "visatb": {name: {"a": 0.1, "b": 0.2, "c": 0.4} for name in ("given", "received", "alone")},
    "coba": {"warmup": 2, "window": 4, "valid_every": 1},
    "self_paced": {"window": 2, "valid_every": 1},
    "dwa": {"window": 1},
    "gradnorm": {"gram_every": 1},
    "lagged": {"gram_every": 1, "aggregator": "nash_mtl"},
    "famo": {"after": "exact", "step_loss": "exact"},
}
MOVING = ("coba", "famo", "dwa", "uw", "imtl_l", "gradnorm", "gls", "stch", "lagged", "focal", "self_paced")
# Also: a balancer over groups of tasks, and the methods' other rules.
VARIANTS = {
    "coba of groups": ("coba", {**OPTIONS["coba"], "groups": {"ab": ["a", "b"]}}),
    "coba as in MFTCoder": ("coba", {**OPTIONS["coba"], "variant": "mftcoder"}),
    "famo of the next step": ("famo", {"after": "reuse", "step_loss": "exact"}),
}
METHODS = {**{name: (name, OPTIONS.get(name, {})) for name in BALANCERS}, **VARIANTS}

Split = Callable[[Sequence[Sample]], list[Batch]]


def packed(samples: Sequence[Sample]) -> list[Batch]:
    return [lay_out([samples])]


def one_by_one(samples: Sequence[Sample]) -> list[Batch]:
    return [lay_out([[sample]]) for sample in samples]


def of_this_rank(samples: Sequence[Sample]) -> list[Batch]:
    """The first rank has two thirds of the examples; the second lacks a task."""
    cut = 2 * len(samples) // 3
    return packed(samples[:cut] if dist.get_rank() == 0 else samples[cut:])


def tiny_gpt2() -> torch.nn.Module:
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    sizes = {"vocab_size": 61, "n_positions": 64, "n_embd": 16, "n_layer": 1, "n_head": 2, "initializer_range": 0.2}
    config = GPT2Config(**sizes, attn_implementation="eager", resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0)
    return GPT2LMHeadModel(config).double()


def nll(model: torch.nn.Module, batch: Batch) -> Tensor:
    logits_BTV = model(**isolated_inputs(batch)).logits
    flat_N = F.cross_entropy(logits_BTV.flatten(0, 1), batch.labels_BT.flatten(), reduction="none", ignore_index=IGNORE)
    return flat_N.view_as(batch.labels_BT)


def over_ranks(x: Tensor) -> Tensor:
    if dist.is_initialized():
        dist.all_reduce(x)
    return x


def losses(model: torch.nn.Module, batches: list[Batch], mode: str) -> tuple[Tensor, Tensor, TaskCounts]:
    """(loss of each task, probability of each task, counts), all of the whole step."""
    counts = step_counts(batches, K)
    with torch.no_grad():
        total = reduce_sums([task_sums(nll(model, batch), batch, K) for batch in batches], K)
    return task_losses(total, counts, mode), task_probs(total, counts), counts


def gradient(model: torch.nn.Module, batches: list[Batch], counts: TaskCounts, w_K: Tensor, mode: str) -> Tensor:
    """[P], of the whole step: the ranks' gradients added up."""
    parameters = list(model.parameters())
    flat_P = torch.zeros(sum(p.numel() for p in parameters), dtype=torch.float64)
    for batch in batches:
        loss = (coefficients(batch, counts, w_K, mode) * nll(model, batch)).sum()
        flat_P += torch.cat([g.flatten() for g in torch.autograd.grad(loss, parameters)])
    return over_ranks(flat_P)


def train(method: str, mode: str, split: Split) -> tuple[Tensor, Tensor, Tensor]:
    """(weights [S, K], gradients [S, P], trained parameters [P])."""
    model, sizes = tiny_gpt2(), [30, 20, 10]
    name, options = METHODS[method]
    section = BalancerSection(name=name, **options)
    balancer = make_balancer(section, TASKS, [1.0] * K, normalise=mode, examples=sizes, tokens=sizes)
    needs, held_out = balancer.needs, split(random_samples(SHAPE, 61, seed=99))
    nothing_K = torch.full((K,), torch.nan, dtype=torch.float64)
    if needs.valid_every:
        balancer.update(Observation(0, nothing_K, losses(model, held_out, mode)[0]))
    weights, gradients = [], []
    for step in range(1, STEPS + 1):
        shape = SHAPE if step != 3 else SHAPE[:3]  # task 2 is absent from one step
        batches = split(random_samples(shape, 61, seed=step))
        loss_K, prob_K, counts = losses(model, batches, mode)
        w_K = balancer.weights(step, loss_K if needs.step_loss else None)
        gram_KK = None
        if needs.gram_every:
            jacobian_KP = torch.stack([gradient(model, batches, counts, e_K, mode) for e_K in torch.eye(K).double()])
            gram_KK = jacobian_KP @ jacobian_KP.T
        weights.append(w_K)
        gradients.append(gradient(model, batches, counts, w_K, mode))
        with torch.no_grad():
            for p, g in zip(
                model.parameters(), gradients[-1].split([p.numel() for p in model.parameters()]), strict=True
            ):
                p -= 0.1 * g.view_as(p)
        after_K = losses(model, batches, mode)[0] if needs.after_step else None
        valid_K = losses(model, held_out, mode)[0] if needs.valid_every else None
        share_K = task_coefficients(counts, torch.ones_like(w_K), mode) if needs.gram_every else None
        seen_prob_K = prob_K if needs.token_probs else None
        balancer.update(Observation(step, loss_K, valid_K, gram_KK, after_K, seen_prob_K, share_K))
    return torch.stack(weights), torch.stack(gradients), torch.cat([p.detach().flatten() for p in model.parameters()])


CASES = [(method, mode) for method, mode in product(METHODS, NORMALISATIONS)]


@pytest.mark.slow
@pytest.mark.parametrize(("method", "mode"), CASES)
def test_micro_batches_and_packing_do_not_change_the_run(method, mode):
    whole, split = train(method, mode, packed), train(method, mode, one_by_one)
    for of_split, of_whole in zip(split, whole, strict=True):
        torch.testing.assert_close(of_split, of_whole, rtol=1e-9, atol=1e-9)
    weights_SK = whole[0]
    if METHODS[method][0] in MOVING:
        assert (weights_SK - weights_SK[0]).abs().max() > 1e-3  # the weights did move


def both_ranks(rank: int, store: str, expected: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    for (method, mode), of_one in torch.load(expected, weights_only=True).items():
        for of_two, one in zip(train(method, mode, of_this_rank), of_one, strict=True):
            torch.testing.assert_close(of_two, one, rtol=1e-9, atol=1e-9, msg=lambda text: f"{method} {mode}: {text}")  # noqa: B023
    dist.destroy_process_group()


@pytest.mark.slow
def test_ranks_do_not_change_the_run(tmp_path):
    torch.save({case: train(*case, packed) for case in CASES}, tmp_path / "one.pt")
    mp.spawn(both_ranks, args=(str(tmp_path / "store"), str(tmp_path / "one.pt")), nprocs=2)
