"""MFTCoder's four losses, from its own code run once on the same logits; ours are equal when the batch is not split.

Numbers: `loss_utils.py` of MFTCoder 0.4 (case1 to case4, and case3 with task weights) on the logits built below,
one micro-batch, one process. When the batch is split its numbers move, ours don't
(tests/losses/test_task_reduction.py).
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from mtft.data.batching.batch import IGNORE, Batch
from mtft.losses.task_reduction import coefficients, count, step_counts, task_losses, task_sums

TASKS, SUPERVISED = [0, 0, 1, 1, 2, 2], [8, 6, 5, 3, 2, 1]
CASES = [
    ("token", (1, 1, 1), 3.269833),  # case1
    ("sample", (1, 1, 1), 3.375494),  # case2
    ("task_token", (1, 1, 1), 3.355191),  # case3
    ("task_sample", (1, 1, 1), 3.375494),  # case4: as case2, because every task has two rows
    ("task_token", (1, 2, 3), 3.422105),
]


def mftcoder_batch():
    torch.manual_seed(0)
    logits, labels = torch.randn(6, 8, 11), torch.randint(0, 11, (6, 8))
    for row, supervised in enumerate(SUPERVISED):
        labels[row, : 8 - supervised] = IGNORE
    task_BT = torch.tensor(TASKS, dtype=torch.int32)[:, None].expand(6, 8)
    zeros = torch.zeros(6, 8, dtype=torch.int64)
    nll_BT = F.cross_entropy(logits.transpose(1, 2), labels, ignore_index=IGNORE, reduction="none")
    return Batch(zeros, zeros, zeros.int(), task_BT, labels), nll_BT


@pytest.mark.parametrize(("mode", "w", "theirs"), CASES)
def test_same_loss(mode, w, theirs):
    batch, nll_BT = mftcoder_batch()
    c_BT = coefficients(batch, count(batch, 3), torch.tensor(w, dtype=torch.float64), mode)
    assert float((c_BT * nll_BT).sum()) == pytest.approx(theirs, abs=1e-6)


def test_same_task_losses():
    batch, nll_BT = mftcoder_batch()
    loss_K = task_losses(task_sums(nll_BT, batch, 3), count(batch, 3), "task_token")
    assert loss_K.tolist() == pytest.approx([3.228682, 3.206721, 3.630169], abs=1e-6)


@pytest.mark.parametrize(("mode", "w", "theirs"), CASES)
def test_split_into_single_rows(mode, w, theirs):
    """One row a micro-batch, where MFTCoder's task weights cancel out: each batch holds one task."""
    batch, nll_BT = mftcoder_batch()
    rows = [batch.map(lambda x, i=i: x[i : i + 1]) for i in range(6)]
    counts, w_K = step_counts(rows, 3), torch.tensor(w, dtype=torch.float64)
    loss = sum(float((coefficients(row, counts, w_K, mode) * nll_BT[i]).sum()) for i, row in enumerate(rows))
    assert loss == pytest.approx(theirs, abs=1e-6)


def test_two_tasks_of_equal_size_stay_two_tasks():
    """MFTCoder's atorch branch tells tasks apart by unique(1 / count), so two tasks of the same size become one."""
    batch, nll_BT = mftcoder_batch()
    keep = torch.tensor([0, 3])  # a task with 8 supervised tokens and one with 3, then both with 3
    labels_BT = batch.labels_BT[keep].clone()
    labels_BT[0, :5] = IGNORE
    pair = replace(batch.map(lambda x: x[keep]), labels_BT=labels_BT)
    w_K = torch.tensor([1.0, 3.0])
    c_BT = coefficients(pair, count(pair, 2), w_K, "task_token")
    first, second = nll_BT[0, 5:].mean(), nll_BT[3, 5:].mean()
    assert float((c_BT * nll_BT[keep]).sum()) == pytest.approx(float((first + 3 * second) / 4), abs=1e-6)
