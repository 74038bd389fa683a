"""CoBa. Golden 1 by hand from the formulas; golden 2 (both variants) from the authors' code run on the same curves."""

from __future__ import annotations

import math

import pytest
import torch

from mtft.common.errors import UserError
from mtft.losses.balancers import BalancerContext, Observation
from mtft.losses.balancers.coba import CoBa
from mtft.losses.balancers.ols_slope import slopes

NOTHING = torch.full((9,), torch.nan, dtype=torch.float64)


def observed(step, ratios):
    valid_K = torch.tensor(ratios, dtype=torch.float64)
    return Observation(step, NOTHING[: len(ratios)], valid_loss_K=valid_K)


def coba(num_tasks, variant="paper", valid_every=1, **options):
    balancer = CoBa(
        BalancerContext(tuple("abcdefghi"[:num_tasks])), variant=variant, valid_every=valid_every, **options
    )
    balancer.update(observed(0, [1.0] * num_tasks))
    return balancer


def simplex(balancer, step):
    return balancer.weights(step) / balancer.K


RATIOS = [(0.95, 0.99), (0.90, 0.97), (0.84, 0.96), (0.80, 0.96), (0.77, 0.97), (0.75, 0.99)]
GOLDEN = {  # step: slopes, slope of the worst, DF, paper, mftcoder
    3: ((-0.05, -0.02), -0.02, 1.0, (0.297937, 0.702063), (0.308263, 0.691737)),
    4: ((-0.055, -0.015), -0.015, 0.386643, (0.429287, 0.570713), (0.429755, 0.570245)),
    5: ((-0.051, -0.01), -0.01, 0.087397, (0.545455, 0.454545), (0.511314, 0.488686)),
    6: ((-0.043, 0.0), 0.0, 0.000492, (0.703275, 0.296725), (0.701579, 0.298421)),
}


@pytest.mark.parametrize(("variant", "column"), [("paper", 3), ("mftcoder", 4)])
def test_golden_of_two_tasks(variant, column):
    balancer = coba(2, variant, warmup=3, window=4)
    for step, ratios in enumerate(RATIOS, start=1):
        w_K = simplex(balancer, step)
        if step < 3:
            assert w_K.tolist() == [0.5, 0.5]
        else:
            assert balancer.slope_UK[-1].tolist() == pytest.approx(GOLDEN[step][0], abs=1e-12)
            assert float(balancer.worst_slope_U[-1]) == pytest.approx(GOLDEN[step][1], abs=1e-12)
            assert float(balancer.factor) == pytest.approx(GOLDEN[step][2], abs=1e-6)
            assert w_K.tolist() == pytest.approx(GOLDEN[step][column], abs=1e-6)
        balancer.update(observed(step, ratios))


def converging(t):
    return math.exp(-t / 10), math.exp(-t / 60), math.exp(-t / 30)


def diverging(t):
    third = math.exp(-t / 10) if t <= 25 else max(math.exp(-t / 10), 0.2 + 0.03 * (t - 25))
    return math.exp(-t / 10), math.exp(-t / 60), third


TRACES = {  # curve, step: DF clamped, paper, mftcoder
    (converging, 10): (1, (0.1360, 0.5106, 0.3534), (0.1668, 0.5131, 0.3202)),
    (converging, 24): (0.6680, (0.2421, 0.4325, 0.3254), (0.2492, 0.4342, 0.3166)),
    (converging, 38): (0.3203, (0.3065, 0.3763, 0.3172), (0.3251, 0.3596, 0.3153)),
    (converging, 59): (0.1037, (0.2814, 0.3807, 0.3379), (0.3077, 0.3578, 0.3346)),
    (diverging, 31): (0.4605, (0.2328, 0.3500, 0.4172), (0.2534, 0.3355, 0.4111)),
    (diverging, 38): (0.2870, (0.2721, 0.4333, 0.2947), (0.3068, 0.4288, 0.2644)),
    (diverging, 59): (0.0000, (0.3387, 0.5700, 0.0913), (0.3336, 0.5323, 0.1342)),
}


@pytest.mark.parametrize("variant", ["paper", "mftcoder"])
@pytest.mark.parametrize("trace", [converging, diverging])
def test_golden_traces(trace, variant):
    balancer = coba(3, variant, warmup=10, window=20)
    for t in range(1, 60):
        w_K = simplex(balancer, t)
        if (trace, t) in TRACES:
            factor, paper, mftcoder = TRACES[trace, t]
            assert min(1.0, float(balancer.factor)) == pytest.approx(factor, abs=6e-5)
            assert w_K.tolist() == pytest.approx(paper if variant == "paper" else mftcoder, abs=6e-5)
        balancer.update(observed(t, trace(t)))


def test_time_axis_scales():
    """All step numbers times 7: the same weights."""
    plain, slow = coba(3, warmup=10, window=20), coba(3, warmup=70, window=140, valid_every=7)
    for t in range(1, 40):
        torch.testing.assert_close(slow.weights(7 * t), plain.weights(t), rtol=1e-9, atol=1e-9)
        plain.update(observed(t, diverging(t)))
        slow.update(observed(7 * t, diverging(t)))


def test_missing_points_don_t_bend_a_straight_line():
    steps_N = torch.arange(1, 31)
    values_NK = torch.stack([1 - 0.02 * steps_N, 2 - 0.01 * steps_N, torch.full((30,), torch.nan)], dim=1).double()
    values_NK[torch.rand(30, generator=torch.Generator().manual_seed(0)) < 0.5, 0] = torch.nan
    values_NK[1:, 1] = torch.nan
    assert 2 < values_NK[:, 0].isfinite().sum() < 30
    assert slopes(steps_N, values_NK).tolist() == pytest.approx([-0.02, 0, 0], abs=1e-9)
    assert float(slopes(steps_N[:3], torch.tensor([[3.0], [torch.nan], [1.0]]).double())) == pytest.approx(-1.0)


def test_a_loss_of_zero_is_a_loss():
    balancer = coba(2, warmup=3, window=9)
    for t in (1, 2, 3):
        balancer.update(observed(t, (1 - 0.5 * (t - 1), 0.9)))  # 1, .5, 0
    balancer.weights(4)
    assert balancer.slope_UK[-1].tolist() == pytest.approx([-0.5, 0.0])


def test_uniform_when_nothing_moves():
    balancer = coba(2, warmup=2, window=9)
    for t in range(1, 5):
        balancer.update(observed(t, (1.0, 1.0)))
        assert balancer.weights(t + 1).tolist() == [1, 1]
    assert float(balancer.factor) == 1


def test_weights_renew_every_valid_every_steps():
    balancer = coba(2, warmup=4, window=20, valid_every=4)
    seen = []
    for t in range(1, 20):
        seen.append(tuple(balancer.weights(t).tolist()))
        if t % 4 == 0:
            balancer.update(observed(t, (math.exp(-t / 5), math.exp(-t / 50))))
    assert balancer.updates_U.tolist() == [4, 8, 12, 16]
    assert len(set(seen)) == 3  # uniform until two points are there, then new ones at 12 and 16


@pytest.mark.parametrize("loss", [0.0, torch.nan, -1.0])
def test_the_first_losses_must_be_there(loss):
    balancer = CoBa(BalancerContext(("code", "sql")))
    with pytest.raises(UserError, match=r"task sql has validation loss .* before training"):
        balancer.update(observed(0, (1.0, loss)))


def test_impossible_windows_are_refused():
    with pytest.raises(UserError, match="window >= warmup"):
        coba(2, "mftcoder", warmup=9, window=5)
    with pytest.raises(UserError, match="greater than or equal to 2"):
        coba(2, warmup=1)
