"""From per-token losses to one scalar: the same gradient for any split of a step over micro-batches, ranks and packs.

Every normalisation is linear in the token losses, and its coefficients are known from the labels alone:

    loss = sum_bt c_bt * nll_bt      over all micro-batches and ranks of one optimizer step

    normalise     c_bt                         loss                               MFTCoder
    token         w_k / sum_j w_j N_j          sum w S / sum w N                  case1 (w = 1)
    sample        w_k / (n_s sum_j w_j M_j)    weighted mean of sample means      case2
    task_token    w_k / (N_k W)                sum w_k (S_k / N_k) / W            case3
    task_sample   w_k / (M_k n_s W)            same, sample means inside a task   case4

k = task of the token, s = its sample, n_s = supervised tokens of s, S_k = sum of token losses, N_k = supervised tokens,
M_k = samples with n_s > 0, W = sum of w over the tasks that are present. In every mode the coefficients of a step add
up to 1, and an absent task (N_k = 0) has none: no NaN, no special case. MFTCoder (arXiv 2311.02303) divides by the
counts of a micro-batch on a rank instead, so that its objective moves with the batch layout.

Tokens and rows may have weights (Batch.token_weights_BT u_t, .row_weights_BT r_s; None = all 1). Then a task counts
N_k = sum r_s u_t tokens and M_k = sum r_s samples, S_k = sum r_s u_t nll_t, and a sample's mean is weighted by u:

    token         c = w_k r_s u_t / sum_j w_j N_j               task_token    c = w_k r_s u_t / (N_k W)
    sample        c = w_k r_s (u_t / U_s) / sum_j w_j M_j       task_sample   c = w_k r_s (u_t / U_s) / (M_k W)

U_s = sum of u over the sample. So a row of weight 2 counts as the same row twice in every mode, and a factor on all u
of a sample matters in the token modes alone.

One step:  counts = step_counts(batches, K, device=...)                     before the first backward, one all-reduce
           c_BT = coefficients(batch, counts, w_K, normalise)               per micro-batch
           (c_BT * nll_BT).sum() * R                                        R = ranks whose gradients are averaged
           sums = reduce_sums([task_sums(nll_BT, batch, K), ...])           after the last backward, one all-reduce
           loss_K = task_losses(sums, counts, normalise)                    what balancers and logs see
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Literal, NamedTuple, get_args

import torch
import torch.distributed as dist
from torch import Tensor

from mtft.common.device_copy import to_device
from mtft.data.batching.batch import IGNORE, Batch

Normalise = Literal["token", "sample", "task_token", "task_sample"]
NORMALISATIONS: tuple[str, ...] = get_args(Normalise)


class TaskCounts(NamedTuple):
    """What is supervised of each task, [K].

    tokens_K, samples_K                 tokens, and samples with at least one of them; int64
    token_weights_K, sample_weights_K   the sums of their weights, N and M of the module; float64
    """

    tokens_K: Tensor
    samples_K: Tensor
    token_weights_K: Tensor
    sample_weights_K: Tensor

    def units(self, normalise: str) -> Tensor:
        """What the mean inside a task runs over: tokens or samples, by their weights. float64 on the CPU."""
        by_tokens = normalise in ("token", "task_token")
        return (self.token_weights_K if by_tokens else self.sample_weights_K).cpu()


class TaskSums(NamedTuple):
    """Detached float64 [K] sums over supervised tokens of one or more batches; they add up over any split.

    nll_K          sum of token losses (nats)
    sample_nll_K   sum over samples of the mean token loss of the sample
    sample_prob_K  sum over samples of the mean token probability exp(-nll) of the sample
    Each by the weights of tokens and rows.
    """

    nll_K: Tensor
    sample_nll_K: Tensor
    sample_prob_K: Tensor


def sample_tokens(batch: Batch) -> Tensor:
    """int64 [B, T]: how many supervised tokens the sample of each position has. 0 on padding."""
    supervised_BT = (batch.labels_BT != IGNORE).long()
    segment_BT = batch.segment_ids_BT.long()
    slot_BT = torch.where(segment_BT >= 0, segment_BT, segment_BT.shape[1])  # padding goes to a slot of its own
    counts_BS = supervised_BT.new_zeros(segment_BT.shape[0], segment_BT.shape[1] + 1)
    counts_BS.scatter_add_(1, slot_BT, supervised_BT)
    return counts_BS.gather(1, slot_BT) * (segment_BT >= 0)


def token_parts(batch: Batch) -> Tensor:
    """float64 [B, T]: each supervised token's part of its sample, u_t / U_s; 0 elsewhere."""
    supervised_BT = batch.labels_BT != IGNORE
    if batch.token_weights_BT is None:
        return supervised_BT.double() / sample_tokens(batch).clamp(min=1)
    u_BT = torch.where(supervised_BT, batch.token_weights_BT, 0.0).double()
    return u_BT / sample_sums(u_BT, batch).clamp(min=torch.finfo(torch.float64).tiny)


def sample_sums(x_BT: Tensor, batch: Batch) -> Tensor:
    """float64 [B, T]: sum of x over the positions of the sample that each position is of. x: 0 on padding."""
    slot_BT = batch.segment_ids_BT.long().clamp(min=0)
    x_BT = x_BT.double()
    if x_BT.device.type == "cpu":
        sum_BS = torch.zeros_like(x_BT).scatter_add_(1, slot_BT, x_BT)
    else:  # in the same order at each call: see group_sums
        samples_S = torch.arange(max(1, int(batch.host.segment_ids_BT.max()) + 1), device=x_BT.device)
        sum_BS = torch.where(slot_BT[:, None] == samples_S[:, None], x_BT[:, None], 0.0).sum(dim=2)
    return sum_BS.gather(1, slot_BT)


def count(batch: Batch, num_tasks: int) -> TaskCounts:
    """Counts of one micro-batch, from its labels and weights only. On the batch's device."""
    plain = replace(batch, token_weights_BT=None, row_weights_BT=None)
    tokens_K, samples_K = (x.round().long() for x in _sums(plain, num_tasks, samples_of=None))
    if batch.token_weights_BT is None and batch.row_weights_BT is None:
        return TaskCounts(tokens_K, samples_K, tokens_K.double(), samples_K.double())
    return TaskCounts(tokens_K, samples_K, *_sums(batch, num_tasks, samples_of=None))


def step_counts(
    batches: Sequence[Batch],
    num_tasks: int,
    group: dist.ProcessGroup | None = None,
    device: torch.device | str = "cpu",
) -> TaskCounts:
    """Counts of a whole optimizer step: over this rank's micro-batches, then ONE all-reduce of float64[4K].

    `batches` may be empty or hold nothing but padding; every rank must call this once a step all the same.
    `device`: where the collective runs ("cuda" for nccl). The result is on the CPU. Without torch.distributed: local.
    """
    total = torch.zeros(4, num_tasks, dtype=torch.float64)
    for batch in batches:
        on_cpu = batch if batch.labels_BT.device.type == "cpu" else batch.host
        total += torch.stack([x.double() for x in count(on_cpu, num_tasks)])
    tokens_K, samples_K, *weights = _all_reduce(total, group, device)
    return TaskCounts(tokens_K.long(), samples_K.long(), *weights)


def task_coefficients(counts: TaskCounts, w_K: Tensor, normalise: str) -> Tensor:
    """float64 [K]: sum of c over the supervised tokens of each task = the task's share of the loss; they add up to 1.

    `w_K`: task weights, finite, >= 0, one of them > 0; only their ratio matters. All zeros come out if no task with a
    positive weight is present.
    """
    if normalise not in NORMALISATIONS:
        raise ValueError(f"normalise is {normalise!r}: must be one of {', '.join(NORMALISATIONS)}")
    units_K = counts.units(normalise)
    w_K = w_K.detach().double().cpu()
    if w_K.shape != units_K.shape:
        raise ValueError(f"weights have shape {tuple(w_K.shape)}, but there are {len(units_K)} tasks")
    if not bool((w_K.isfinite() & (w_K >= 0)).all()) or not bool((w_K > 0).any()):
        raise ValueError(f"task weights must be finite, >= 0 and not all 0, got {w_K.tolist()}")
    share_K = w_K * units_K if normalise in ("token", "sample") else w_K * (units_K > 0)
    total = share_K.sum()
    return share_K / total if total > 0 else share_K


def coefficients(
    batch: Batch, counts: TaskCounts, w_K: Tensor, normalise: str, dtype: torch.dtype = torch.float32
) -> Tensor:
    """[B, T]: c of every token of one micro-batch, 0 where not supervised. `counts` are those of the whole step.

    The arithmetic is float64; only the result is rounded.
    """
    units_K = counts.units(normalise)
    per_unit_K = task_coefficients(counts, w_K, normalise) / torch.where(units_K > 0, units_K, 1.0)
    device = batch.labels_BT.device
    supervised_BT = batch.labels_BT != IGNORE
    per_unit_K = per_unit_K if per_unit_K.device == device else to_device(per_unit_K, device)
    c_BT = per_unit_K[batch.task_ids_BT.long().clamp(min=0)]
    by_samples = normalise in ("sample", "task_sample")
    if batch.token_weights_BT is not None:
        c_BT = c_BT * (token_parts(batch) if by_samples else batch.token_weights_BT)
    elif by_samples:
        c_BT = c_BT / sample_tokens(batch).clamp(min=1)
    if batch.row_weights_BT is not None:
        c_BT = c_BT * batch.row_weights_BT
    return torch.where(supervised_BT, c_BT, 0.0).to(dtype)


def task_sums(nll_BT: Tensor, batch: Batch, num_tasks: int) -> TaskSums:
    """Sums of one micro-batch for logs and balancers; detached, on the device of `nll_BT`."""
    nll_BT = nll_BT.detach()
    nll_K, sample_nll_K = _sums(batch, num_tasks, samples_of=nll_BT)
    _, sample_prob_K = _sums(batch, num_tasks, samples_of=torch.exp(-nll_BT))
    return TaskSums(nll_K, sample_nll_K, sample_prob_K)


def reduce_sums(
    parts: Sequence[TaskSums],
    num_tasks: int,
    group: dist.ProcessGroup | None = None,
    device: torch.device | str = "cpu",
) -> TaskSums:
    """Sums of a whole step: over this rank's micro-batches, then ONE all-reduce of float64[3K]. On the CPU."""
    total = torch.zeros(3, num_tasks, dtype=torch.float64)
    if parts:
        total += torch.stack([torch.stack(part) for part in parts]).sum(dim=0).cpu()
    return TaskSums(*_all_reduce(total, group, device))


def task_losses(sums: TaskSums, counts: TaskCounts, normalise: str) -> Tensor:
    """float64 [K]: loss of each task as the mode averages it (token or sample mean); NaN = absent from the step."""
    total_K = sums.nll_K if normalise in ("token", "task_token") else sums.sample_nll_K
    return total_K.cpu() / counts.units(normalise)  # 0/0 = NaN


def task_probs(sums: TaskSums, counts: TaskCounts) -> Tensor:
    """float64 [K]: mean over samples of the sample's mean token probability; NaN = absent."""
    return sums.sample_prob_K.cpu() / counts.units("sample")


def _sums(batch: Batch, num_tasks: int, samples_of: Tensor | None) -> tuple[Tensor, Tensor]:
    """float64 [K] of x (None: x = 1): its sum over supervised tokens, and the sum over samples of its mean."""
    supervised_BT = batch.labels_BT != IGNORE
    # Not boolean indexing: on a GPU that would wait for the size.
    x_BT = supervised_BT.double() if samples_of is None else torch.where(supervised_BT, samples_of, 0.0).double()
    task_N = batch.task_ids_BT.long().clamp(min=0).flatten()
    if batch.row_weights_BT is not None:
        x_BT = x_BT * batch.row_weights_BT
    if batch.token_weights_BT is None:
        mean_BT = x_BT / sample_tokens(batch).clamp(min=1)
    else:
        mean_BT = x_BT * token_parts(batch)
        x_BT = x_BT * batch.token_weights_BT
    return group_sums(task_N, x_BT.flatten(), num_tasks), group_sums(task_N, mean_BT.flatten(), num_tasks)


def group_sums(group_N: Tensor, x_N: Tensor, groups: int) -> Tensor:
    """[G]: sum of x over the positions of each group, 0, 1, ...

    `index_add` adds in the order of the positions on the CPU, and in another one at each call on a GPU: the last bits
    of what balancers see would be chance. There each group is one sum over all positions, 0 outside of the group.
    """
    if x_N.device.type == "cpu":
        return x_N.new_zeros(groups).index_add(0, group_N, x_N)
    member_GN = group_N == torch.arange(groups, device=x_N.device)[:, None]
    return torch.where(member_GN, x_N, 0.0).sum(dim=1)


def _all_reduce(total: Tensor, group: dist.ProcessGroup | None, device: torch.device | str) -> Tensor:
    if not (dist.is_available() and dist.is_initialized()):
        return total
    moved = total.to(device)
    dist.all_reduce(moved, group=group)
    return moved.cpu()
