"""SAM-GS with its second branch, against the formula written out on dense matrices, and what must hold for it."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from mtft.common.errors import UserError
from mtft.gradients.aggregators import make_aggregator
from mtft.gradients.aggregators.sam_gs import similarity
from mtft.losses.balancers import make_balancer
from mtft.recipe.schema.loss import BalancerSection
from tests.properties.aggregators import jacobian

GAMMA, P = 0.7, torch.tensor([0.5, 0.2, 0.3], dtype=torch.float64)
ALIKE, UNLIKE = torch.tensor([1.0, 1.3, 0.8]), torch.tensor([1.0, 20.0, 0.1])


def matrices(steps=12):
    """J [3, 7] step by step; lengths like and unlike in turns."""
    for step in range(steps):
        J = jacobian(3, 7, seed=step)
        yield (UNLIKE if step % 3 == 2 else ALIKE).double()[:, None] * J / J.norm(dim=1, keepdim=True)


def follow(method, J, p_K=P, absent=None):
    """d [7] of J, cut into two parameters. absent: a task whose products are NaN and whose row is not to be read."""
    G = J @ J.T
    if absent is not None:
        G[absent], G[:, absent], J[absent] = torch.nan, torch.nan, 7e9
    parts = {"a": J[:, :3].reshape(len(J), 3, 1), "b": J[:, 3:].reshape(len(J), 2, 2)}
    d, alpha_K = method.direction(parts, G, p_K)
    return torch.cat([d["a"].flatten(), d["b"].flatten()]), alpha_K


def test_equals_the_formula():
    method = make_aggregator("sam_gs", {"gamma": GAMMA})
    m, v, branches = torch.zeros(3, 7, dtype=torch.float64), 0.0, []
    for t, J in enumerate(matrices(), start=1):
        n = J.norm(dim=1)
        pairs = [float(2 * n[i] * n[j] / (n[i] ** 2 + n[j] ** 2)) for i in range(3) for j in range(i)]
        psi = sum(pairs) / 3
        m = 0.9 * m + 0.1 * J
        v = 0.99 * v + 0.01 * (1 - psi) ** 2 + 1e-8  # as the authors add it: 1e-6 once the start is corrected for
        if psi < GAMMA:
            expected = (P[:, None] * n.mean() / n[:, None] * J).sum(0)
        else:
            expected = (P[:, None] * J * (m / (1 - 0.9**t)).abs() / math.sqrt(v / (1 - 0.99**t))).sum(0)
        d, alpha_K = follow(method, J)
        torch.testing.assert_close(d, expected, rtol=1e-6, atol=1e-9)
        assert bool(alpha_K.isnan().all()) == (psi >= GAMMA), "alpha is NaN where d is not J^T alpha"
        branches.append(psi >= GAMMA)
    assert 0 < sum(branches) < len(branches)


def test_default_is_the_first_branch_alone_and_keeps_nothing():
    method = make_aggregator("sam_gs")
    for J in matrices(4):
        d, alpha_K = follow(method, J)
        torch.testing.assert_close(d, J.T @ alpha_K)
        n = J.norm(dim=1)
        torch.testing.assert_close(alpha_K, P * n.mean() / n)
    assert method.from_gram
    assert not method.state_dict()["momentum"]


def test_permutes_with_the_tasks():
    one, two = (make_aggregator("sam_gs", {"gamma": GAMMA}) for _ in range(2))
    order = torch.tensor([2, 0, 1])
    for J in matrices():
        torch.testing.assert_close(follow(two, J[order], P[order])[0], follow(one, J)[0])


def test_state_continues_to_the_bit():
    whole, first, second = (make_aggregator("sam_gs", {"gamma": GAMMA}) for _ in range(3))
    for step, J in enumerate(matrices()):
        expected, _ = follow(whole, J)
        if step == 5:
            second.load_state_dict(first.state_dict())
        found, _ = follow(first if step < 5 else second, J)
        assert torch.equal(found, expected)


def test_absent_task_keeps_its_momentum():
    """A step without task 1 is a step of the two others, and task 1 goes on from where it was."""
    method, others = (make_aggregator("sam_gs", {"gamma": GAMMA}) for _ in range(2))
    here = [0, 2]
    for step, J in enumerate(matrices(6)):
        before = method.momentum["a"][1].clone() if step else None
        follow(others, J[here], P[here])
        d, _ = follow(method, J, absent=1 if step == 3 else None)
        assert torch.equal(method.momentum["a"][1], before) if step == 3 else d.isfinite().all()
        assert d.abs().max() < 1e3
    assert method.seen_K.tolist() == [6, 5, 6]
    torch.testing.assert_close(method.momentum["b"][here], others.momentum["b"])


@pytest.mark.parametrize("n", [[], [2.0]])
def test_fewer_than_two_lengths_are_not_compared(n):
    assert similarity(np.array(n)) is None
    assert similarity(np.zeros(2)) == 1


def test_lagged_refuses_what_needs_gradients():
    section = BalancerSection.model_validate({"name": "lagged", "aggregator": "sam_gs", "options": {"gamma": 0.7}})
    with pytest.raises(UserError, match="gradients of every step") as caught:
        make_balancer(section, ("a", "b"), (1.0, 1.0))
    assert caught.value.where == "loss.balancer.options"
