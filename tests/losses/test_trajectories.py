"""A whole run under each balancer and each normalisation does not depend on how its steps are split.

Five optimizer steps on a tiny Llama in float64 (norms and softmax stay fp32 in it); one packed micro-batch against one
micro-batch per example. Weights and trained parameters must agree, with everything that a balancer asks for
measured from the split batches.
"""

from __future__ import annotations

import pytest
import torch

from mtft.losses.balancers import BALANCERS, Context, Observation
from mtft.losses.nll import token_nll
from mtft.losses.reduce import (
    NORMALISATIONS,
    coefficients,
    reduce_sums,
    step_counts,
    task_coefficients,
    task_losses,
    task_probs,
    task_sums,
)
from tests.losses.builders import isolated_inputs, lay_out, new_llama, random_samples

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
CASES = [(name, "task_token") for name in BALANCERS] + [("famo", mode) for mode in NORMALISATIONS[:2]]
CASES += [("coba", "task_sample"), ("lagged", "token")]


def packed(samples):
    return [lay_out([samples])]


def one_by_one(samples):
    return [lay_out([[sample]]) for sample in samples]


def losses(model, batches, mode):
    """(loss of each task, probability of each task, counts)."""
    counts, sums = step_counts(batches, K), []
    with torch.no_grad():
        for batch in batches:
            sums.append(task_sums(token_nll(model, batch, inputs=isolated_inputs(batch)), batch, K))
    total = reduce_sums(sums, K)
    return task_losses(total, counts, mode), task_probs(total, counts), counts


def gram(model, batches, counts, mode):
    rows = []
    for k in range(K):
        alone_K = torch.eye(K, dtype=torch.float64)[k]
        flat = torch.zeros((), dtype=torch.float64)
        for batch in batches:
            nll_BT = token_nll(model, batch, inputs=isolated_inputs(batch))
            loss = (coefficients(batch, counts, alone_K, mode) * nll_BT).sum()
            flat = flat + torch.cat([g.flatten() for g in torch.autograd.grad(loss, list(model.parameters()))])
        rows.append(flat)
    jacobian_KP = torch.stack(rows)
    return jacobian_KP @ jacobian_KP.T


def train(name, mode, split):
    model = new_llama().double()
    sizes_K = torch.tensor([30, 20, 10])
    balancer = BALANCERS[name](
        Context(TASKS, normalise=mode, examples_K=sizes_K, tokens_K=sizes_K), **OPTIONS.get(name, {})
    )
    needs, held_out = balancer.needs, split(random_samples(SHAPE, 61, seed=99))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    nothing_K = torch.full((K,), torch.nan, dtype=torch.float64)
    if needs.valid_every:
        balancer.update(Observation(0, nothing_K, losses(model, held_out, mode)[0]))
    weights = []
    for step in range(1, STEPS + 1):
        shape = SHAPE if step != 3 else SHAPE[:3]  # task 2 is absent from one step
        batches = split(random_samples(shape, 61, seed=step))
        loss_K, prob_K, counts = losses(model, batches, mode)
        w_K = balancer.weights(step, loss_K if needs.step_loss else None)
        weights.append(w_K)
        gram_KK = gram(model, batches, counts, mode) if needs.gram_every else None
        optimizer.zero_grad()
        for batch in batches:
            nll_BT = token_nll(model, batch, inputs=isolated_inputs(batch))
            (coefficients(batch, counts, w_K, mode) * nll_BT).sum().backward()
        optimizer.step()
        after_K = losses(model, batches, mode)[0] if needs.after_step else None
        valid_K = losses(model, held_out, mode)[0] if needs.valid_every else None
        share_K = task_coefficients(counts, torch.ones_like(w_K), mode) if needs.gram_every else None
        seen_prob_K = prob_K if needs.token_probs else None
        balancer.update(Observation(step, loss_K, valid_K, gram_KK, after_K, seen_prob_K, share_K))
    return torch.stack(weights), torch.cat([p.detach().flatten() for p in model.parameters()])


@pytest.mark.slow
@pytest.mark.parametrize(("name", "mode"), CASES)
def test_split_does_not_change_the_run(name, mode):
    weights_SK, parameters = train(name, mode, packed)
    split_SK, split_parameters = train(name, mode, one_by_one)
    # Slopes are small differences of losses, divided by each other: fp32 rounding grows by loss / slope.
    tolerance = 2e-5 if name in ("coba", "self_paced") else 1e-6
    torch.testing.assert_close(split_SK, weights_SK, rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(split_parameters, parameters, rtol=1e-6, atol=2e-6)
    if name in ("coba", "famo", "dwa", "uw", "gradnorm", "gls", "lagged"):
        assert (weights_SK[-1] - weights_SK[0]).abs().max() > 1e-3  # the weights did move
