"""Sample weights: the paper's rules on five losses, focal by hand, groups, and what they must leave alone."""

from __future__ import annotations

import math

import pytest
import torch

from mtft.data.batching.batch import IGNORE
from mtft.losses.sample_weights import SampleWeights
from mtft.losses.task_reduction import coefficients, count
from tests.losses.test_task_reduction import golden_batch

FIVE = [(0, [0.5]), (0, [1.0]), (0, [1.5, 2.5]), (0, [2.5]), (0, [4.5])]  # sample means .5 1 2 2.5 4.5
# u / M of the three rules at sharpness .4: softmax(f / .4) by hand.
GOLDEN = {
    "linupper": (0.029626, 0.055349, 0.193186, 0.360919, 0.360919),
    "quadratic": (0.036247, 0.108215, 0.377707, 0.441584, 0.036247),
    "extremes": (0.360919, 0.193186, 0.055349, 0.029626, 0.360919),
}


def per_sample(weights, samples, num_tasks=3, step=1000):
    batch, nll_BT = golden_batch(samples)
    return weights.factors(step, nll_BT, batch, num_tasks)[
        :, 1
    ].double()  # position 1 is each row's first supervised one


@pytest.mark.parametrize("rule", GOLDEN)
@pytest.mark.parametrize("group", ["task", "all"])
def test_golden(rule, group):
    u_M = per_sample(SampleWeights(rule, group=group), FIVE)
    torch.testing.assert_close(u_M / 5, torch.tensor(GOLDEN[rule]).double(), atol=1e-6, rtol=0)


def test_focal():
    samples = [
        (0, [-math.log(0.5), -math.log(0.25)]),
        (0, [-math.log(0.8)]),
        (1, [-math.log(p) for p in (0.1, 0.2, 0.4)]),
    ]
    batch, nll_BT = golden_batch(samples)
    u_BT = SampleWeights("focal", burn_in=0).factors(1, nll_BT, batch, 2)
    assert u_BT[:, 1].tolist() == pytest.approx([0.390625, 0.04, 0.587778], abs=1e-6)
    c_BT = coefficients(batch, count(batch, 2), torch.ones(2), "task_sample")
    assert float((c_BT * u_BT * nll_BT).sum()) == pytest.approx(0.576763, abs=1e-6)


def test_groups_are_tasks():
    """Each task by itself: losses of another task don't matter, and every task keeps mean 1."""
    other = [(2, [7.0]), (2, [9.0]), (1, [])]
    alone_M = per_sample(SampleWeights("linupper"), FIVE)
    together_M = per_sample(SampleWeights("linupper"), FIVE + other)
    torch.testing.assert_close(together_M[:5], alone_M)
    assert float(together_M[5:7].mean()) == pytest.approx(1)
    assert not torch.allclose(per_sample(SampleWeights("linupper", group="all"), FIVE + other)[:5], alone_M)


@pytest.mark.parametrize("rule", GOLDEN)
def test_equal_losses_and_single_samples_count_1(rule):
    u_M = per_sample(SampleWeights(rule), [(0, [1.5]), (0, [1.0, 2.0]), (1, [3.0])])
    assert u_M.tolist() == [1, 1, 1]


def test_close_losses_far_from_zero():
    """Positions without a loss lie far outside of the range of the others, and must not overflow."""
    u_M = per_sample(SampleWeights("extremes", sharpness=0.01), [(0, [7.0]), (0, [7.001]), (0, [7.002])])
    assert u_M.tolist() == pytest.approx([1.5, 0, 1.5], abs=1e-6)


def test_burn_in_and_the_empty_batch():
    assert per_sample(SampleWeights("extremes", burn_in=500), FIVE, step=500).tolist() == [1] * 5
    batch, nll_BT = golden_batch([(0, [])])
    u_BT = SampleWeights("extremes").factors(1000, nll_BT, batch, 3)
    assert u_BT[batch.labels_BT == IGNORE].tolist() == [1] * 6


def test_no_gradient_flows_through_the_weights():
    batch, nll_BT = golden_batch(FIVE)
    assert not SampleWeights("extremes").factors(1000, nll_BT.requires_grad_(), batch, 3).requires_grad


def test_bad_options_are_refused():
    with pytest.raises(ValueError, match="sharpness is 0"):
        SampleWeights("extremes", sharpness=0)
    with pytest.raises(ValueError, match="rule is 'linear'"):
        SampleWeights("linear")
