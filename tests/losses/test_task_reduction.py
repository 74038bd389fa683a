"""The objective: golden values by hand, coefficients that add up to 1, the same gradient for any split of a step."""

from __future__ import annotations

import pytest
import torch

from mtft.data.batching.batch import IGNORE, PADDING, Batch
from mtft.losses.task_reduction import (
    NORMALISATIONS,
    TaskCounts,
    coefficients,
    count,
    reduce_sums,
    step_counts,
    task_coefficients,
    task_losses,
    task_probs,
    task_sums,
)
from mtft.losses.token_nll import token_nll
from tests.losses.builders import gradient, isolated_inputs, lay_out, random_samples, tiny_llama

# (task, losses of its supervised tokens); task 3 has none. S = 12, 8, 8, 0.
GOLDEN = [(0, [1, 2, 3, 4]), (0, [2]), (1, [0.5, 1.5]), (1, [3, 1, 2]), (2, [4, 4]), (3, [])]
# By hand from the table in the module; "naive" = mean over two micro-batches that each divide by their own counts.
EXPECTED = {
    (1, 1, 1, 1): {"token": 2.333333, "sample": 2.300000, "task_token": 2.666667, "task_sample": 2.583333},
    (1, 2, 3, 5): {"token": 2.476190, "sample": 2.500000, "task_token": 2.933333, "task_sample": 2.875000},
}
NAIVE = {
    (1, 1, 1, 1): {"token": 2.400000, "sample": 2.416667, "task_token": 2.350000, "task_sample": 2.312500},
    (1, 2, 3, 5): {"token": 2.388889, "sample": 2.412500, "task_token": 2.333333, "task_sample": 2.308333},
}
CASES = [(w, mode) for w in EXPECTED for mode in NORMALISATIONS]


def golden_batch(samples) -> tuple[Batch, torch.Tensor]:
    """One sample a row, after an unsupervised prompt token."""
    labels_BT, nll_BT = torch.full((len(samples), 6), IGNORE), torch.full((len(samples), 6), 99.0)
    segment_BT, task_BT = torch.full((len(samples), 6), PADDING), torch.full((len(samples), 6), PADDING)
    for row, (task, losses) in enumerate(samples):
        labels_BT[row, 1 : 1 + len(losses)], nll_BT[row, 1 : 1 + len(losses)] = 7, torch.tensor(losses).float()
        segment_BT[row, : 1 + len(losses)], task_BT[row, : 1 + len(losses)] = 0, task
    ids_BT = torch.zeros_like(labels_BT)
    return Batch(ids_BT, ids_BT, segment_BT.int(), task_BT.int(), labels_BT), nll_BT


def objective(parts, counts, w, mode) -> float:
    return sum(float((coefficients(batch, counts, w, mode) * nll_BT).sum()) for batch, nll_BT in parts)


@pytest.mark.parametrize(("w", "mode"), CASES)
def test_golden(w, mode):
    w_K, halves = torch.tensor(w, dtype=torch.float64), [golden_batch(GOLDEN[:3]), golden_batch(GOLDEN[3:])]
    counts = step_counts([batch for batch, _ in halves], 4)
    assert counts.tokens_K.tolist() == [5, 5, 2, 0]
    assert counts.samples_K.tolist() == [2, 2, 1, 0]
    for parts in ([golden_batch(GOLDEN)], halves, [golden_batch([sample]) for sample in GOLDEN]):
        assert objective(parts, counts, w_K, mode) == pytest.approx(EXPECTED[w][mode], abs=2e-6)
    naive = sum(objective([half], count(half[0], 4), w_K, mode) for half in halves) / 2
    assert naive == pytest.approx(NAIVE[w][mode], abs=2e-6)  # what dividing by a micro-batch's own counts would give


@pytest.mark.parametrize(("w", "mode"), CASES)
def test_coefficients_add_up_to_one(w, mode):
    w_K = torch.tensor(w, dtype=torch.float64)
    batch, _ = golden_batch(GOLDEN)
    counts = count(batch, 4)
    c_BT = coefficients(batch, counts, w_K, mode)
    assert float(c_BT.sum()) == pytest.approx(1, abs=1e-6)
    assert not c_BT[batch.labels_BT == IGNORE].any()
    share_K = task_coefficients(counts, w_K, mode)
    by_task_K = torch.stack([c_BT[batch.task_ids_BT == k].sum() for k in range(4)]).double()
    torch.testing.assert_close(share_K, by_task_K, atol=1e-6, rtol=0)
    torch.testing.assert_close(task_coefficients(counts, 7 * w_K, mode), share_K)


def test_task_sums_and_losses():
    parts = [golden_batch(GOLDEN[:3]), golden_batch(GOLDEN[3:])]
    counts = step_counts([batch for batch, _ in parts], 4)
    sums = reduce_sums([task_sums(nll_BT, batch, 4) for batch, nll_BT in parts], 4)
    assert sums.nll_K.tolist() == [12, 8, 8, 0]
    assert sums.sample_nll_K.tolist() == pytest.approx([4.5, 3, 4, 0])
    nan = torch.nan
    token_K, sample_K = torch.tensor([2.4, 1.6, 4, nan]), torch.tensor([2.25, 1.5, 4, nan])
    for mode in NORMALISATIONS:
        expected_K = token_K if mode.endswith("token") else sample_K
        torch.testing.assert_close(task_losses(sums, counts, mode), expected_K.double(), equal_nan=True)
    p0 = (torch.exp(-torch.tensor([1.0, 2, 3, 4])).mean() + torch.exp(torch.tensor(-2.0))) / 2
    torch.testing.assert_close(task_probs(sums, counts)[0], p0.double())


def test_a_batch_with_nothing_in_it():
    batch, _ = golden_batch([(3, [])])
    counts = step_counts([batch], 4)
    for mode in NORMALISATIONS:
        assert not coefficients(batch, counts, torch.ones(4), mode).any()
    assert step_counts([], 4).tokens_K.tolist() == [0, 0, 0, 0]
    assert task_losses(reduce_sums([], 4), counts, "token").isnan().all()


@pytest.mark.parametrize("w", [[1, -1, 1, 1], [1, torch.nan, 1, 1], [0, 0, 0, 0], [1, 1, 1]])
def test_bad_weights_are_refused(w):
    batch, _ = golden_batch(GOLDEN)
    with pytest.raises(ValueError, match=r"weights"):
        coefficients(batch, count(batch, 4), torch.tensor(w, dtype=torch.float64), "token")


def test_two_tasks_of_equal_weight_are_one_task_in_mode_token():
    batch, nll_BT = golden_batch(GOLDEN)
    merged, _ = golden_batch([(min(task, 1), losses) for task, losses in GOLDEN])
    apart = objective([(batch, nll_BT)], count(batch, 4), torch.tensor([1.0, 2, 2, 2]), "token")
    together = objective([(merged, nll_BT)], count(merged, 2), torch.tensor([1.0, 2]), "token")
    assert apart == pytest.approx(together)


# With a model. (task, tokens, supervised): uneven, task 3 absent, task 2 in one sample only, one sample without labels.
SHAPE = [(0, 9, 5), (0, 4, 2), (1, 7, 6), (1, 12, 3), (2, 5, 4), (0, 6, 0)]
W_K = torch.tensor([1.0, 2.0, 3.0, 5.0], dtype=torch.float64)


def step_gradient(splits, mode, ranks=1) -> tuple[torch.Tensor, torch.Tensor]:
    """Gradient and task losses of one step; splits[rank] = its micro-batches. Ranks are averaged, as DDP does."""
    model = tiny_llama()
    counts = TaskCounts(*(sum(parts) for parts in zip(*(step_counts(own, 4) for own in splits), strict=True)))
    flat, sums = torch.zeros(()), []
    for batch in (batch for own in splits for batch in own):
        nll_BT = token_nll(model, batch, inputs=isolated_inputs(batch))
        flat = flat + gradient(model, (coefficients(batch, counts, W_K, mode) * nll_BT).sum() * ranks) / ranks
        sums.append(task_sums(nll_BT, batch, 4))
    return flat, task_losses(reduce_sums(sums, 4), counts, mode)


@pytest.mark.parametrize("mode", NORMALISATIONS)
def test_gradient_does_not_depend_on_the_split(mode):
    samples = random_samples(SHAPE, vocabulary=61)
    rows = [[sample] for sample in samples]
    whole, losses_K = step_gradient([[lay_out(rows)]], mode)
    splits = {
        "rows permuted": ([[lay_out(rows[::-1])]], 1),
        "2 micro-batches": ([[lay_out(rows[:4]), lay_out(rows[4:])]], 1),
        "6 micro-batches": ([[lay_out([row]) for row in rows]], 1),
        "packed": ([[lay_out([samples[:3], samples[3:]])]], 1),
        "packed in one row": ([[lay_out([samples], width=50)]], 1),
        "2 ranks": ([[lay_out(rows[:2])], [lay_out(rows[2:])]], 2),
        "2 ranks, one without labels": ([[lay_out(rows[:5])], [lay_out(rows[5:])]], 2),
        "a micro-batch of padding": ([[lay_out(rows), lay_out([[]], width=3)]], 1),
    }
    for name, (split, ranks) in splits.items():
        flat, split_K = step_gradient(split, mode, ranks)
        error = float((flat - whole).norm() / whole.norm())
        assert error < 2e-6, f"{name}: {error}"
        torch.testing.assert_close(split_K, losses_K, atol=1e-6, rtol=1e-6, equal_nan=True, msg=name)


def test_one_task_in_mode_token_is_the_loss_of_transformers():
    samples = random_samples([(0, 9, 5), (0, 4, 2), (0, 7, 6)], vocabulary=61)
    batch, model = lay_out([[sample] for sample in samples]), tiny_llama()
    nll_BT = token_nll(model, batch, inputs=isolated_inputs(batch))
    ours = (coefficients(batch, count(batch, 1), torch.ones(1), "token") * nll_BT).sum()
    labels = {"labels": batch.labels_BT, "shift_labels": batch.labels_BT, "num_items_in_batch": 13}
    theirs = model(**isolated_inputs(batch), **labels)
    torch.testing.assert_close(ours, theirs.loss, atol=1e-6, rtol=0)
