"""Every aggregator against the shared properties, and each against what its paper promises."""

from __future__ import annotations

import inspect

import pytest
import torch

from mtft.common.errors import UserError
from mtft.gradients.aggregators import AGGREGATORS, make_aggregator
from tests.properties import aggregators as properties
from tests.properties.aggregators import direction, jacobian, jacobians

CASES = {name: {} for name in AGGREGATORS}
CASES |= {"aligned_mtl, median": {"scale": "median"}, "aligned_mtl, rmse": {"scale": "rmse"}}
CASES |= {"cagrad, c = 1": {"c": 1.0}, "sam_gs, gamma": {"gamma": 0.6}}
CASES |= {"upgrad, exact": {"epsilon": 1e-10}, "dualproj, exact": {"epsilon": 1e-10}}


def maker(case):
    return lambda: make_aggregator(case.split(",")[0], CASES[case], seed=5)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize(
    "prop", [f for name, f in inspect.getmembers(properties, inspect.isfunction) if name.startswith("assert_")]
)
def test_property(prop, case):
    if case == "pcgrad" and prop is properties.assert_permutes_with_the_tasks:
        pytest.skip("the order of projections is drawn by place")
    prop(maker(case))


@pytest.mark.parametrize("case", ["upgrad", "dualproj", "upgrad, exact", "dualproj, exact", "mgda", "cagrad, c = 1"])
def test_no_task_is_hurt(case):
    """J d >= 0, up to what the regularisation of the Gram matrix lets through: 1e-4 trace(G) alpha."""
    hurt_by_mean = 0
    for J in jacobians():
        G = J @ J.T
        alpha_K = maker(case)().weights(G)
        allowed = 1.0001e-4 * G.trace() * alpha_K.max() if case in ("upgrad", "dualproj") else 1e-7 * G.trace()
        assert (G @ alpha_K).min() >= -allowed, G @ alpha_K
        hurt_by_mean += int((J @ J.mean(dim=0)).min() < 0)
    assert hurt_by_mean >= 3  # the mean gradient does hurt some task in several of these


def test_upgrad_is_linear_in_each_gradients_length():
    """A(diag(c) J) is linear in c; exact without the regularisation of the Gram matrix."""
    J = jacobian(5, 30, 0, shift=-0.6)
    make = lambda: make_aggregator("upgrad", {"epsilon": 1e-12})  # noqa: E731
    a, b = torch.tensor([[1, 2, 0.5, 3, 1.5], [2, 0.3, 1, 1, 4]], dtype=torch.float64)
    both = direction(make, (2 * a + 3 * b)[:, None] * J)
    parts = 2 * direction(make, a[:, None] * J) + 3 * direction(make, b[:, None] * J)
    torch.testing.assert_close(both, parts, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("name", ["upgrad", "dualproj", "mgda", "cagrad"])
def test_without_conflict_nothing_is_hurt_and_projections_are_the_mean(name):
    J = jacobian(4, 6, 1).abs()
    d = direction(maker(name), J)
    assert (J @ d).min() > 0
    if name in ("upgrad", "dualproj"):
        torch.testing.assert_close(d, J.mean(dim=0))


@pytest.mark.parametrize("name", ["nash_mtl", "imtl_g"])
def test_a_tasks_scale_does_not_matter(name):
    J = jacobian(4, 20, 2, shift=-0.2)
    scaled = torch.tensor([1e-3, 1.0, 50.0, 7.0], dtype=torch.float64)[:, None] * J
    assert torch.cosine_similarity(direction(maker(name), J), direction(maker(name), scaled), dim=0) > 1 - 1e-9


def test_pcgrad_order_comes_from_seed_and_step():
    J = jacobian(6, 7, 3, shift=-0.9)
    G = J @ J.T
    torch.manual_seed(0)
    first = make_aggregator("pcgrad", seed=1).weights(G, step=1)
    torch.manual_seed(1)
    assert torch.equal(make_aggregator("pcgrad", seed=1).weights(G, step=1), first)
    assert not torch.equal(make_aggregator("pcgrad", seed=1).weights(G, step=2), first)
    assert not torch.equal(make_aggregator("pcgrad", seed=2).weights(G, step=1), first)


def test_errors_for_people():
    with pytest.raises(UserError, match="did you mean 'upgrad'"):
        make_aggregator("ubgrad")
    with pytest.raises(UserError, match="an instruction example has one task"):
        make_aggregator("rep_mtl")
    with pytest.raises(UserError, match="has no option 'd'"):
        make_aggregator("cagrad", {"d": 1})
    with pytest.raises(UserError, match="greater than or equal to 0"):
        make_aggregator("cagrad", {"c": -1.0})
    with pytest.raises(UserError, match="written with aggregator mgda"):
        make_aggregator("upgrad").load_state_dict(make_aggregator("mgda").state_dict())
    with pytest.raises(ValueError, match="expected"):
        make_aggregator("upgrad").weights(torch.zeros(3, 4))
