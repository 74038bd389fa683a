"""The two-task toy problem of Nash-MTL and FAMO (scripts/toy_balancers.py): where the sum is stuck, FAMO is not."""

from __future__ import annotations

import pytest
import torch

from scripts.toy_balancers import descend, famo, toy_losses


def test_losses_at_a_point():
    """By hand at (1, 2): tanh 2 = .964028, c1 = tanh 1 = .761594, c2 = 0; f1 = .1 c1 lg(-3.04), f2 = c1 lg(2.04)."""
    loss_12 = toy_losses(torch.tensor([[1.0, 2.0]], dtype=torch.float64))
    assert loss_12[0].tolist() == pytest.approx([0.541534, 5.111038], abs=1e-6)


@pytest.mark.slow
def test_the_plain_sum_is_stuck():
    end_12 = descend([(9.0, -1.0)], "uniform", 12_000)[-1]
    assert end_12[0].tolist() == pytest.approx([8.09, 0.0], abs=0.02)
    assert toy_losses(end_12)[0].tolist() == pytest.approx([0, 0], abs=1e-3)


@pytest.mark.slow
def test_famo_reaches_the_front():
    """From the start where the sum is stuck, and from two more; from the other two that the papers draw it does not."""
    end_S2 = famo([(9.0, -1.0), (0.0, 0.0), (-7.5, -0.5)], 20_000)[-1]
    assert end_S2[0].tolist() == pytest.approx([6.231, -8.417], abs=0.02)
    losses = toy_losses(end_S2).tolist()
    assert losses[0] == pytest.approx([-1.993, -2.491], abs=1e-2)
    assert losses[1] == pytest.approx([-0.248, -19.931], abs=1e-2)
    assert losses[2] == pytest.approx([-0.248, -19.931], abs=1e-2)
