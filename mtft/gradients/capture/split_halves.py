"""Inner products of task gradients without the noise of a single step: each task's examples are taken in two halves.

A step's gradient is the task's true one plus noise, so <g_k, g_k> is too large by the noise's own square, which can be
many times the true one, and every cosine comes out too near to 0. The noises of two halves of the examples are
independent:

    E <g_ka, g_kb> = |E g_k|^2          a, b: the task's examples in turns, g_ka the gradient of the mean over half a
    G_kk = <g_ka, g_kb>                 G_jk = <g_j, g_k> as ever: two tasks have no example in common

One measure of that is no Gram matrix (G_kk can be negative): it is for the means over measures that show the affinity
of tasks. Balancers get the plain G, which the halves give too. To the capture (mtft.gradients.capture.task_gradients)
a half is a task
of its own, so twice as many numbers are held.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

from mtft.data.batching.batch import IGNORE, PADDING, Batch
from mtft.gradients.gramian import ranks_of, sum_over_ranks


class SplitHalves:
    """Deals the examples of a step to the halves 2 k and 2 k + 1 of their task, and adds their inner products up again.

    by_samples  a task's loss is the mean over its samples' means; otherwise over its tokens
    """

    def __init__(self, num_tasks: int, *, by_samples: bool) -> None:
        self.num_tasks, self.by_samples = num_tasks, by_samples
        self.start()

    def start(self) -> None:
        """Before the first micro-batch of a step."""
        rank = dist.get_rank() if ranks_of() > 1 else 0
        self._turn = [rank % 2] * self.num_tasks  # the half that the next example of each task goes to
        self._size_H = torch.zeros(2 * self.num_tasks, dtype=torch.float64)

    def deal(self, batch: Batch) -> Tensor:
        """int [B, T] on the CPU: the half of every token, -1 = padding. An example lies in one half."""
        batch = batch.host
        segment_BT, task_BT = batch.segment_ids_BT, batch.task_ids_BT
        first_BT = torch.ones_like(segment_BT, dtype=torch.bool)
        first_BT[:, 1:] = segment_BT[:, 1:] != segment_BT[:, :-1]
        example_N = first_BT.flatten().cumsum(0) - 1
        learnt_N = example_N[(batch.labels_BT != IGNORE).flatten()]
        learnt = torch.bincount(learnt_N, minlength=int(first_BT.sum())).tolist()
        sizes = self._sizes(batch, example_N, first_BT, learnt)
        half_of = []
        for task, tokens, size in zip(task_BT[first_BT].tolist(), learnt, sizes, strict=True):
            half_of.append(PADDING if task == PADDING else 2 * task + self._turn[task])
            if task != PADDING and tokens:
                self._size_H[half_of[-1]] += size
                self._turn[task] = 1 - self._turn[task]
        return torch.tensor(half_of)[example_N].view(task_BT.shape).to(batch.task_ids_BT)

    def _sizes(self, batch: Batch, example_N: Tensor, first_BT: Tensor, learnt: list[int]) -> list[float]:
        """How much each example counts in its task's mean: 1 or its tokens, by the weights of tokens and rows."""
        size_E = torch.ones(len(learnt), dtype=torch.float64)
        if not self.by_samples:
            u_BT = batch.token_weights_BT
            size_E = torch.tensor(learnt, dtype=torch.float64)
            size_E = size_E if u_BT is None else torch.bincount(example_N, u_BT.flatten().double(), len(learnt))
        return (size_E if batch.row_weights_BT is None else size_E * batch.row_weights_BT[first_BT]).tolist()

    def parts(self, device: torch.device | str = "cpu", group: dist.ProcessGroup | None = None) -> Tensor:
        """float64 [2 K]: each half's part of its task's loss, over all ranks; 0 where nothing is. A collective call."""
        size_H = self._size_H.to(device)
        if ranks_of(group) > 1:
            sum_over_ranks([size_H], group)
        size_K2 = size_H.cpu().view(-1, 2)
        size_K1 = size_K2.sum(dim=1, keepdim=True)
        return (size_K2 / torch.where(size_K1 > 0, size_K1, 1.0)).flatten()


def joined(gram_HH: Tensor, part_H: Tensor) -> tuple[Tensor, Tensor]:
    """(the tasks' G [K, K], its diagonal without noise [K]), of the halves' inner products [2 K, 2 K] (NaN: not there)
    and their parts of the tasks' losses. NaN: an absent task; in the diagonal also one without a second example.
    """
    K = len(part_H) // 2
    whole_KH = torch.block_diag(*part_H.view(K, 1, 2))
    absent_K = part_H.view(K, 2).sum(dim=1) == 0
    gram_KK = whole_KH @ torch.where(gram_HH.isnan(), 0.0, gram_HH) @ whole_KH.T
    gram_KK = gram_KK.masked_fill(absent_K[:, None] | absent_K[None, :], torch.nan)
    return gram_KK, gram_HH[0::2, 1::2].diagonal()
