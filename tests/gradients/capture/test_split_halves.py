"""Halves of the tasks' examples: their inner products against gradients of each half alone, and what they are for."""

from dataclasses import replace

import pytest
import torch

from mtft.data.batching.batch import IGNORE
from mtft.gradients.capture.split_halves import SplitHalves, joined
from mtft.gradients.capture.task_gradients import TaskGradients
from mtft.gradients.gramian import gram
from mtft.losses.task_reduction import coefficients, step_counts, task_coefficients
from mtft.losses.token_nll import token_nll
from tests.gradients.tiny import WEIGHTS, K, batches, k_backwards, lora, trained

NORMALISATIONS = ("token", "sample", "task_token", "task_sample")


def measured(model, parts, normalise):
    """(G, its diagonal of halves, the halves' parts of the tasks' losses, the halves of all tokens)."""
    halves, counts = SplitHalves(K, by_samples=normalise.endswith("sample")), step_counts(parts, K)
    taps, ids = TaskGradients(model, 2 * K, isolated=True), []
    with taps:
        for batch in parts:
            ids.append(halves.deal(batch))
            taps.begin(ids[-1], batch.labels_BT != IGNORE)
            (coefficients(batch, counts, WEIGHTS, normalise) * token_nll(model, batch)).sum().backward()
    part_H = halves.parts()
    used_H = task_coefficients(counts, WEIGHTS, normalise).repeat_interleave(2) * part_H
    return *joined(taps.gram(used_H), part_H), part_H, ids


def gradients_of_halves(model, parts, ids, normalise):
    """J [2 K, P]: gradient of the mean loss over each half alone, one backward a half."""
    rows = []
    for half in range(2 * K):
        alone_K = torch.nn.functional.one_hot(torch.tensor(half // 2), K).double()
        of_half = [
            replace(batch, labels_BT=torch.where(ids_BT == half, batch.labels_BT, IGNORE))
            for batch, ids_BT in zip(parts, ids, strict=True)
        ]
        counts = step_counts(of_half, K)
        model.zero_grad()
        for batch in of_half:
            (coefficients(batch, counts, alone_K, normalise) * token_nll(model, batch)).sum().backward()
        rows.append(torch.cat([p.grad.flatten() for p in trained(model).values()]))
    return torch.stack(rows).double()


@pytest.mark.parametrize("normalise", NORMALISATIONS)
def test_equals_gradients_of_each_half_alone(normalise):
    model, parts = lora(), batches()
    G, own_K, part_H, ids = measured(model, parts, normalise)
    J = gradients_of_halves(model, parts, ids, normalise)
    plain = gram(k_backwards(model, parts, normalise=normalise))
    torch.testing.assert_close(G[:3, :3], plain[:3, :3], rtol=1e-5, atol=1e-8)
    torch.testing.assert_close(own_K[:3], (J[0::2] * J[1::2]).sum(dim=1)[:3], rtol=1e-4, atol=1e-8)
    assert G[3].isnan().all(), "task 3 is absent"
    assert own_K[3].isnan()
    torch.testing.assert_close(part_H.view(K, 2).sum(1), torch.tensor([1.0, 1.0, 1.0, 0.0]).double())


def test_examples_are_dealt_whole_and_in_turns():
    halves = SplitHalves(K, by_samples=True)
    seen = []
    for batch in batches():
        ids_BT = halves.deal(batch)
        assert torch.equal(torch.where(ids_BT >= 0, ids_BT // 2, -1), batch.task_ids_BT)
        for row, segments in zip(ids_BT, batch.segment_ids_BT, strict=True):
            seen += [set(row[segments == s].tolist()) for s in range(int(segments.max()) + 1)]
    assert [half for (half,) in seen] == [0, 2, 1, 4, 3, 2, 5, 0, 4]  # tasks 0 1 0 2 1 1 2 0 2
    halves.start()
    assert halves.parts().sum() == 0


def test_a_single_example_has_no_length_but_products():
    G, own_K, part_H, _ = measured(lora(), batches([[[(0, 9), (1, 7), (0, 5)]]]), "task_token")
    assert part_H.view(K, 2)[1].tolist() == [1, 0]
    assert own_K[1].isnan()
    assert G[:2, :2].isfinite().all()


def test_mean_over_steps_finds_the_true_cosine():
    """Gradients = truth + noise of twice its length: plain cosines shrink to a fifth, those of halves don't."""
    generator = torch.Generator().manual_seed(0)
    truth = torch.zeros(2, 16, dtype=torch.float64)
    truth[:, :2] = torch.tensor([[1.0, 0.0], [-0.8, 0.6]])
    half_H, total, own = torch.full((4,), 0.5, dtype=torch.float64), 0, 0
    for _ in range(4000):
        noise = torch.randn(4, 16, generator=generator, dtype=torch.float64) * 0.5**0.5
        J = truth.repeat_interleave(2, dim=0) + noise  # the mean of two halves has noise of squared length 4
        G, own_K = joined(J @ J.T, half_H)
        total, own = total + G, own + own_K
    cosines = [float(total[0, 1] / (square[0] * square[1]).sqrt()) for square in (own, total.diagonal())]
    assert cosines == pytest.approx([-0.8, -0.8 / 5], abs=0.05)
