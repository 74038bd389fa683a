"""Lagged: weights that give the aggregator's direction, whatever the normalisation; EMA, floor, preference."""

from __future__ import annotations

import pytest
import torch

from mtft.common.errors import UserError
from mtft.gradients.aggregators import AGGREGATORS, make_aggregator
from mtft.losses.balancers import BALANCERS, BalancerContext, Observation, make_balancer
from mtft.losses.balancers.lagged_gradients import FLOOR, nearest_gram
from mtft.recipe.schema.loss import BalancerSection
from tests.properties.aggregators import jacobian

TASKS = ("a", "b", "c", "d")
NAN = torch.nan


def lagged(user=None, tasks=TASKS, **options):
    user_K = None if user is None else torch.tensor(user, dtype=torch.float64)
    return BALANCERS["lagged"](BalancerContext(tasks, user_K), **options)


def seen(step, G, share=None):
    loss_K = torch.where(G.diagonal().isnan(), NAN, 1.0).double()
    return Observation(step, loss_K, gram_KK=G, share_K=None if share is None else torch.tensor(share).double())


@pytest.mark.parametrize("name", AGGREGATORS)
@pytest.mark.parametrize("share", [None, [0.1, 0.2, 0.3, 0.4]])
@pytest.mark.parametrize("user", [None, [1.0, 2.0, 0.5, 3.0]])
def test_direction_is_the_aggregators(name, share, user):
    """sum_k w_k share_k g_k, which is what the objective follows, points along J^T alpha: cosine 1 - 1e-6."""
    J = jacobian(4, 30, 1, shift=-0.3)
    balancer = lagged(user, aggregator=name, gram_every=1)
    balancer.update(seen(1, J @ J.T, share))
    assert int(balancer.clamped) == 0
    share_K = torch.tensor(share or [1.0] * 4, dtype=torch.float64)
    followed = J.T @ (balancer.weights(2) * share_K)
    p_K = share_K * torch.tensor(user or [1.0] * 4, dtype=torch.float64)
    asked = J.T @ make_aggregator(name).weights(J @ J.T, p_K, step=1)
    assert torch.cosine_similarity(followed, asked, dim=0) > 1 - 1e-9
    if name in ("upgrad", "mgda"):
        assert torch.cosine_similarity(J.T @ p_K, asked, dim=0) < 1 - 1e-3  # and it is not the plain direction


def test_without_conflict_upgrad_leaves_the_users_weights():
    balancer = lagged([1.0, 2.0, 3.0, 2.0])
    balancer.update(seen(20, torch.eye(4, dtype=torch.float64), [0.7, 0.1, 0.1, 0.1]))
    torch.testing.assert_close(balancer.weights(21), torch.tensor([0.5, 1.0, 1.5, 1.0], dtype=torch.float64))


def test_holds_between_measures_and_smooths():
    """G = 1/2 old + 1/2 new; the weights stay until the next measure."""
    one, two = (jacobian(4, 9, seed, shift=-0.6) for seed in (1, 2))
    balancer = lagged(aggregator="mgda")
    assert balancer.needs.gram_every == 20
    assert torch.equal(balancer.weights(1), torch.ones(4, dtype=torch.float64))
    balancer.update(seen(20, one @ one.T))
    first = balancer.weights(21)
    balancer.update(Observation(21, torch.ones(4, dtype=torch.float64)))
    assert torch.equal(balancer.weights(22), first)
    balancer.update(seen(40, two @ two.T))
    mean = (one @ one.T + two @ two.T) / 2
    alpha = make_aggregator("mgda").weights(mean).clamp(min=FLOOR / 4)
    torch.testing.assert_close(balancer.weights(41), alpha / alpha.mean(), rtol=1e-9, atol=1e-9)


def test_clamps_are_counted():
    """IMTL-G gives the third task, which lies between the others, a negative alpha: the floor, one clamp."""
    J = torch.tensor([[1, 0, 0], [0, 1, 0], [1, 1, 0.1]], dtype=torch.float64)
    alpha = make_aggregator("imtl_g").weights(J @ J.T)
    assert (alpha < 0).sum() >= 1
    balancer = lagged(tasks=TASKS[:3], aggregator="imtl_g")
    balancer.update(seen(1, J @ J.T))
    assert balancer.figures() == {"measures": 1, "clamped": int((alpha <= 0).sum())}
    w_K = balancer.weights(2)
    assert float(w_K.min()) == pytest.approx(FLOOR, rel=1e-3)  # of a mean of 1


def test_tasks_that_were_not_there():
    """Absent from a measure: the mean keeps its entries. Never measured: the mean weight. Alone: nothing changes."""
    J = jacobian(4, 9, 5, shift=-0.6)
    G = J @ J.T
    part = G.clone()
    part[3], part[:, 3] = NAN, NAN
    balancer = lagged(aggregator="mgda")
    balancer.update(seen(1, part))
    assert float(balancer.weights(2)[3]) == pytest.approx(1.0)
    balancer.update(seen(2, G))
    balancer.update(seen(3, part))
    torch.testing.assert_close(balancer.gram_KK, G)
    balancer.update(seen(4, torch.full((4, 4), NAN, dtype=torch.float64)))
    torch.testing.assert_close(balancer.gram_KK, G)


def test_a_patchwork_of_means_becomes_a_gram_matrix():
    bad = torch.tensor([[1, 0.9, NAN], [0.9, 1, -0.9], [NAN, -0.9, 1]], dtype=torch.float64)
    good = nearest_gram(bad)
    assert torch.linalg.eigvalsh(good).min() > -1e-12
    patched = torch.tensor([[1, 0.9, 0], [0.9, 1, -0.9], [0, -0.9, 1]], dtype=torch.float64)
    value, vector = torch.linalg.eigh(patched)
    torch.testing.assert_close(good, vector * value.clamp(min=0) @ vector.T)


def test_groups_see_the_gram_of_their_mean_gradients():
    J = jacobian(4, 30, 6, shift=-0.9)
    section = BalancerSection(name="lagged", aggregator="mgda", gram_every=1, groups={"x": ["a", "b"], "y": ["c", "d"]})
    grouped = make_balancer(section, TASKS, [1.0] * 4)
    grouped.update(seen(1, J @ J.T, [0.25] * 4))
    means = torch.stack([J[:2].mean(dim=0), J[2:].mean(dim=0)])
    alpha_G = make_aggregator("mgda").weights(means @ means.T)
    torch.testing.assert_close(grouped.weights(2), 2 * alpha_G.repeat_interleave(2))
    assert grouped.figures()["measures"] == 1


def test_errors_for_people():
    with pytest.raises(UserError, match="unknown aggregator 'upgrat'") as caught:
        lagged(aggregator="upgrat")
    assert caught.value.where == "loss.balancer.aggregator"
    with pytest.raises(UserError, match="has no option 'x'"):
        lagged(options={"x": 1.0})
