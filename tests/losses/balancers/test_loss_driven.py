"""Golden values from the papers' rules, each also against torchjd's scalarizer on the same numbers."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torchjd import scalarization

from mtft.common.errors import UserError
from mtft.losses.balancers import BALANCERS, BalancerContext, Observation
from mtft.losses.balancers.uncertainty import imtl_l_gradient, uw_gradient

L0, L1, L2 = (torch.tensor(x, dtype=torch.float64) for x in ([2, 1, 0.5], [1.8, 0.95, 0.3], [1.7, 0.97, 0.25]))
INVERSE = (0.428571, 0.857143, 1.714286)  # 3 (1/L0) / sum 1/L0


def make(name, **options):
    return BALANCERS[name](BalancerContext(("a", "b", "c")), **options)


def close(got: Tensor, expected, atol=1e-6) -> None:
    torch.testing.assert_close(got, torch.as_tensor(expected, dtype=torch.float64), atol=atol, rtol=0)


def direction(scalarizer, loss_K) -> Tensor:
    """Gradient of torchjd's scalar in the losses, scaled to mean 1: its task weights."""
    loss_K = loss_K.clone().requires_grad_()
    (gradient_K,) = torch.autograd.grad(scalarizer(loss_K), loss_K)
    return (gradient_K / gradient_K.mean()).double()


def test_famo():
    """Golden of three steps; the losses after a step are given as a second forward, and as the next step's losses."""
    theirs = scalarization.FAMO(3).double()
    exact, reuse = make("famo", after="exact", step_loss="exact"), make("famo", after="reuse", smoothing=0.0)
    expected = {
        1: (L0, (0.142857, 0.285714, 0.571429), (0.0, 0.0, 0.0)),
        2: (L1, (0.116251, 0.220264, 0.663485), (0.0249999936, 0.0249999956, -0.0249999974)),
        3: (L2, (0.111493, 0.196333, 0.692174), (0.043852, 0.048615, -0.047197)),
    }
    reuse.update(Observation(0, L0))
    for step, (loss_K, w_K, xi_K) in expected.items():
        after_K = expected[step + 1][0] if step < 3 else L2
        close(exact.value_K, xi_K, atol=1e-6)
        close(exact.weights(step, loss_K) / 3, w_K)
        close(reuse.weights(step) / 3, w_K)
        close(direction(theirs, loss_K), exact.weights(step, loss_K), atol=1e-9)
        theirs.update(after_K)
        exact.update(Observation(step, loss_K, after_loss_K=after_K))
        reuse.update(Observation(step, after_K))
        close(theirs._w.detach(), exact.value_K, atol=1e-12)
        close(reuse.value_K, exact.value_K, atol=1e-12)


def test_famo_from_validation_losses():
    exact, valid = make("famo", after="exact"), make("famo", after="valid")
    exact.update(Observation(1, L0, after_loss_K=L1))
    valid.update(Observation(0, L0 * torch.nan, valid_loss_K=L0))
    valid.update(Observation(1, L0, valid_loss_K=L1))
    assert torch.equal(valid.value_K, exact.value_K)
    assert valid.needs.valid_every == 10


def test_famo_absent_task_gains_nothing():
    """delta = 0 for it, not NaN and not its whole loss."""
    famo, other = make("famo", after="exact"), make("famo", after="exact")
    gone_K = torch.tensor([2.0, torch.nan, 0.5], dtype=torch.float64)
    famo.update(Observation(1, gone_K, after_loss_K=L1))
    other.update(Observation(1, L0, after_loss_K=torch.stack([L1[0], L0[1], L1[2]])))
    close(famo.value_K, other.value_K, atol=1e-12)


def test_famo_at_its_bound(caplog):
    famo = make("famo", step_loss="exact", lower_bounds={"b": 1.5})
    assert famo.weights(1, L0).isfinite().all()
    assert int(famo.clamped) == 1
    assert "the loss of b is at its lower bound" in caplog.text


def test_dwa():
    ours, theirs = make("dwa", window=1), scalarization.DWA()
    for step, loss_K in enumerate((L0, L1), start=1):
        close(ours.weights(step), (1, 1, 1))
        theirs(loss_K)
        theirs.step()
        ours.update(Observation(step, loss_K))
    close(ours.weights(3), (1.039493, 1.065808, 0.894700))
    close(ours.weights(3), direction(theirs, L2), atol=1e-9)


def test_dwa_windows_average_the_steps_where_a_task_is_present():
    ours, plain = make("dwa", window=2), make("dwa", window=1)
    gap_K = torch.tensor([torch.nan, 0.95, 0.3], dtype=torch.float64)
    for step, loss_K in enumerate((L0, L0, L1, torch.where(gap_K.isnan(), gap_K, L1)), start=1):
        ours.update(Observation(step, loss_K))
    for step, loss_K in enumerate((L0, L1), start=1):
        plain.update(Observation(step, loss_K))
    close(ours.weights(5), plain.weights(3), atol=1e-12)


@pytest.mark.parametrize(
    ("name", "theirs", "gradient", "value", "golden"),
    [
        ("uw", scalarization.UW, uw_gradient, 1.75, (-0.5, 0, 0.25)),
        ("imtl_l", scalarization.IMTLL, imtl_l_gradient, 3.5, (1, 0, -0.5)),
    ],
)
def test_learned(name, theirs, gradient, value, golden):
    """Value and gradient at s = 0, then 30 steps of both with torch's Adam on torchjd's parameters."""
    ours, scalarizer = make(name), theirs(3).double()
    (s_K,) = scalarizer.parameters()
    adam = torch.optim.Adam([s_K], lr=0.025)
    assert float(scalarizer(L0)) == pytest.approx(value)
    close(gradient(torch.zeros(3, dtype=torch.float64), L0), golden)
    for step in range(1, 31):
        loss_K = (L0, L1, L2)[step % 3]
        close(ours.weights(step), direction(scalarizer, L0), atol=1e-9)
        adam.zero_grad()
        scalarizer(loss_K).backward()
        adam.step()
        ours.update(Observation(step, loss_K))
    close(ours.value_K, s_K.detach(), atol=1e-9)


def test_learned_number_of_an_absent_task_stays():
    for name in ("uw", "imtl_l"):
        ours = make(name)
        ours.update(Observation(1, L0))
        before_K = ours.value_K.clone()
        ours.update(Observation(2, torch.tensor([1.0, torch.nan, 1.0], dtype=torch.float64)))
        assert ours.value_K[1] == before_K[1]
        assert (ours.value_K != before_K).tolist() == [True, False, True]


def test_geometric_mean_and_smooth_tchebycheff():
    gls, stch = make("gls", step_loss="exact"), make("stch", step_loss="exact")
    close(gls.weights(1, L0), direction(scalarization.GeometricMean(), L0), atol=1e-9)
    close(stch.weights(1, L0) / 9, (0.177183, 0.090969, 0.065182))  # the gradient sums to p = 1/3
    close(stch.weights(1, L0), direction(scalarization.STCH(0.5), L0), atol=1e-9)
    ideal_K = torch.tensor([1.0, 0, 0], dtype=torch.float64)
    shifted = make("stch", step_loss="exact", mu=0.1, ideal={"a": 1.0})
    close(shifted.weights(1, L0), direction(scalarization.STCH(0.1, reference=ideal_K), L0), atol=1e-9)


def test_lagged_losses_are_a_running_mean():
    ours = make("gls")
    close(ours.weights(1), (1, 1, 1))
    ours.update(Observation(1, L0))
    ours.update(Observation(2, torch.tensor([1.8, torch.nan, 0.3], dtype=torch.float64)))
    mean_K = torch.tensor([1.98, 1.0, 0.48], dtype=torch.float64)
    close(ours.weights(3), (1 / mean_K) / (1 / mean_K).mean(), atol=1e-12)


@pytest.mark.parametrize(("name", "steps"), [("uw", 2000), ("imtl_l", 2000), ("gls", 2), ("famo", 2)])
def test_constant_losses_give_weights_of_one_over_loss(name, steps):
    ours = make(name)
    for step in range(1, steps):
        ours.update(Observation(step, L0))
    close(ours.weights(steps), INVERSE, atol=1e-5)


def test_options_are_checked():
    with pytest.raises(UserError, match=r"greater than 0(.|\n)*where: loss.balancer.temperature"):
        make("dwa", temperature=0.0)
    with pytest.raises(UserError, match=r"unknown task 'd'(.|\n)*loss.balancer.lower_bounds"):
        make("famo", lower_bounds={"d": 1.0})
    with pytest.raises(UserError, match="'lagged' or 'exact'"):
        make("gls", step_loss="now")
