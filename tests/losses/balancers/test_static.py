"""Weights that don't look at losses, focal, self-paced, GradNorm, VisATB: values by hand from their formulas."""

from __future__ import annotations

import math

import pytest
import torch

from mtft.common.errors import UserError
from mtft.losses.balancers import BALANCERS, BalancerContext, Observation, make_balancer
from mtft.losses.balancers.gradnorm import gradnorm_gradient
from mtft.losses.balancers.self_paced import SelfPaced, pace
from mtft.recipe.schema.loss import BalancerSection


def fp64(*values):
    return torch.tensor(values, dtype=torch.float64)


def close(got, expected, atol=1e-6):
    torch.testing.assert_close(got, torch.as_tensor(expected, dtype=torch.float64), atol=atol, rtol=0)


def test_uniform_leaves_the_users_weights():
    balancer = make_balancer(BalancerSection(), ["a", "b"], [1, 3])
    assert balancer.weights(1).tolist() == [0.5, 1.5]


def test_fixed():
    section = BalancerSection(name="fixed", values={"b": 1.5, "a": 0.5})
    assert make_balancer(section, ["a", "b"], [1, 1]).weights(1).tolist() == [0.5, 1.5]
    with pytest.raises(UserError, match="unknown task 'maht': did you mean 'math'"):
        make_balancer(BalancerSection(name="fixed", values={"maht": 1.0}), ["math"], [1])
    with pytest.raises(UserError, match="no value for b"):
        make_balancer(BalancerSection(name="fixed", values={"a": 1.0}), ["a", "b"], [1, 1])


def test_random_depends_on_seed_and_step_only():
    first, again, other = (BALANCERS["random"](BalancerContext(tuple("abc"), seed=seed)) for seed in (1, 1, 2))
    torch.randn(5)  # the global generator plays no part
    assert torch.equal(first.weights(3), again.weights(3))
    assert not torch.equal(first.weights(3), first.weights(4))
    assert not torch.equal(first.weights(3), other.weights(3))


def test_random_is_the_softmax_of_a_normal():
    """log w differs between two tasks by n_1 - n_2 ~ normal(0, 2)."""
    balancer = BALANCERS["random"](BalancerContext(tuple("ab")))
    gaps = torch.stack([balancer.weights(step).log() for step in range(4000)])
    gaps = gaps[:, 0] - gaps[:, 1]
    assert abs(float(gaps.mean())) < 0.1
    assert float(gaps.var()) == pytest.approx(2, rel=0.1)


@pytest.mark.parametrize(
    ("tau", "shares"),
    [
        (1.0, (0.900901, 0.090090, 0.009009)),
        (2.0, (0.706101, 0.223289, 0.070610)),
        (5.0, (0.492838, 0.310960, 0.196202)),
        (1e9, (1 / 3, 1 / 3, 1 / 3)),
    ],
)
def test_temperature(tau, shares):
    sizes = {"examples": [1000, 100, 10], "tokens": [4000, 400, 40]}
    section = BalancerSection(name="temperature", temperature=tau)
    for normalise in ("task_token", "task_sample"):
        close(make_balancer(section, tuple("abc"), [1, 1, 1], normalise=normalise, **sizes).weights(1) / 3, shares)
    for normalise in ("token", "sample"):  # weight x natural share = asked share
        w_K = make_balancer(section, tuple("abc"), [1, 1, 1], normalise=normalise, **sizes).weights(1)
        share_K = w_K * fp64(1000, 100, 10)
        close(share_K / share_K.sum(), shares)


def test_focal():
    """p of the tasks .5875 and .233333 (samples (.5, .25) and (.8); (.1, .2, .4)); factors (1 - p)^2."""
    focal = BALANCERS["focal"](BalancerContext(("a", "b")))
    close(focal.weights(1), (1, 1))
    prob_K = fp64((0.375 + 0.8) / 2, 0.7 / 3)
    focal.update(Observation(1, -prob_K.log(), train_prob_K=prob_K))
    factor_K = fp64(0.170156, 0.587778)
    close(focal.weights(2), factor_K / factor_K.mean(), atol=5e-6)
    weighted = (focal.weights(2) * fp64(0.631432, 1.609438)).sum() / 2
    assert float(weighted) == pytest.approx(1.38988, abs=5e-6)


def test_self_paced():
    close(pace(fp64(-0.05, -0.02, 0.01)), (0.167473, 0.832527, 0.0))
    close(pace(fp64(0, 0, 0)), (1 / 3, 1 / 3, 1 / 3))
    balancer = SelfPaced(BalancerContext(tuple("abc")), window=4, valid_every=1)
    for t in range(1, 9):
        w_K = balancer.weights(t)
        close(w_K / 3, (1 / 3, 1 / 3, 1 / 3) if t <= 4 else (0.167473, 0.832527, 0.0))
        balancer.update(Observation(t, fp64(1, 1, 1), valid_loss_K=fp64(3 - 0.05 * t, 2 - 0.02 * t, 1 + 0.01 * t)))


def test_self_paced_peaks_at_average_speed():
    """-n e^n is largest at n = -1: the task of average speed wins, not the fastest and not the slowest."""
    w_K = pace(fp64(-0.03, -0.02, -0.01))
    assert int(w_K.argmax()) == 1


def test_gradnorm():
    value, dv_K = gradnorm_gradient(fp64(0, 0, 0), fp64(2, 1, 0.5), fp64(1, 0.8, 0.3) / fp64(2, 1, 0.5), 1.5)
    assert float(value) == pytest.approx(2.413685, abs=1e-6)
    close(dv_K, (1.833333, -1.166667, -0.666667))
    close(3 * torch.softmax(-0.025 * dv_K, dim=0), (0.954691, 1.029046, 1.016263))


def test_gradnorm_learns_from_the_gram_matrix():
    balancer = BALANCERS["gradnorm"](BalancerContext(tuple("abc")))
    balancer.update(Observation(1, fp64(2, 1, 0.5)))
    close(balancer.weights(2), (1, 1, 1))
    balancer.update(Observation(2, fp64(1, 0.8, 0.3), gram_KK=torch.diag(fp64(4, 1, 0.25))))
    close(balancer.value_K, (-0.025, 0.025, 0.025))  # the first step of Adam is lr * sign
    gram_KK = torch.diag(fp64(4, 1, torch.nan))
    balancer.update(Observation(3, fp64(1, 0.8, torch.nan), gram_KK=gram_KK))
    assert float(balancer.value_K[2]) == pytest.approx(0.025)  # absent: unchanged


def test_visatb():
    tasks = tuple("abcdefg")
    o = (0.1637, 0.1903, 0.1952, 0.1433, 0.0768, 0.1316, 0.1582)
    i = (0.1634, 0.2179, 0.1326, 0.1775, 0.1674, 0.0783, 0.1219)
    d = (0.7597, 0.5313, 0.8852, 0.7979, 0.5511, 0.8680, 0.1904)
    options = {name: dict(zip(tasks, x, strict=True)) for name, x in (("given", o), ("received", i), ("alone", d))}
    balancer = BALANCERS["visatb"](BalancerContext(tasks), **options)
    close(balancer.weights(1), (0.8585, 1.0557, 0.8107, 0.8151, 1.0020, 0.8177, 1.6403), atol=6e-5)


def test_make_balancer_says_what_is_wrong():
    with pytest.raises(UserError, match="unknown balancer 'cobra': did you mean 'coba'"):
        make_balancer(BalancerSection(name="cobra"), ["a"], [1])
    with pytest.raises(UserError, match=r"no option 'windo': did you mean 'window'(.|\n)*loss.balancer.windo"):
        make_balancer(BalancerSection(name="coba", windo=3), ["a"], [1])
    with pytest.raises(UserError, match="user weight of task b is -1"):
        make_balancer(BalancerSection(), ["a", "b"], [1, -1])
    with pytest.raises(UserError, match="every user weight is 0"):
        make_balancer(BalancerSection(), ["a", "b"], [0, 0])
    with pytest.raises(UserError, match="user weight of task a is nan"):
        make_balancer(BalancerSection(), ["a", "b"], [math.nan, 1])
