"""Weights of single samples by their own loss; they go with any balancer, whose weights keep their meaning.

    l_s = mean token loss of sample s;  h_s = 2 (l_s - (max + min)/2) / (max - min)  over the group, in [-1, 1]
    linupper   f = min(h + 1, 1)     easy samples fade out
    quadratic  f = 1 - h^2           the middle counts
    extremes   f = |h|               the ends count
    u_s = M softmax_s(f_s / sharpness)  over the M samples of the group: mean 1
    focal      u_s = (1 - p_s)^gamma,  p_s = mean token probability of the sample: no group, no mean of 1

Sow et al., "Dynamic Loss-Based Sample Reweighting for Improved LLM Pretraining" (ICLR 2025). Focal:
MFTCoder (arXiv 2311.02303) after Lin et al. (arXiv 1708.02002), p averaged before the power, no gradient through it.
A sample's coefficients are multiplied by u (detached); the denominators stay what they are. Where tokens or rows have
weights of their own (task_reduction.py), means over a sample's tokens and over samples are weighted by them, so that a
row of weight 2 is the same row twice. A group is the samples of a
task (or all) in one micro-batch of all ranks, so the first three rules depend on how a step is cut into micro-batches;
focal does not.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
import torch.distributed as dist
from torch import Tensor

from mtft.data.batching.batch import IGNORE, Batch
from mtft.losses.task_reduction import group_sums, sample_sums, sample_tokens, token_parts

RULES: dict[str, Callable[[Tensor], Tensor]] = {
    "linupper": lambda h: torch.clamp(h + 1, max=1),
    "quadratic": lambda h: 1 - h**2,
    "extremes": torch.abs,
}


@dataclass(frozen=True)
class SampleWeights:
    """`sharpness`: of the softmax (the paper's r; small = hard). `burn_in`: steps with u = 1. `gamma`: of focal."""

    rule: Literal["linupper", "quadratic", "extremes", "focal"]
    sharpness: float = 0.4
    group: Literal["task", "all"] = "task"
    burn_in: int = 500
    gamma: float = 2.0

    def __post_init__(self) -> None:
        if self.rule not in (*RULES, "focal"):
            raise ValueError(f"rule is {self.rule!r}: must be one of {', '.join((*RULES, 'focal'))}")
        if self.group not in ("task", "all"):
            raise ValueError(f"group is {self.group!r}: must be task or all")
        if self.sharpness <= 0:
            raise ValueError(f"sharpness is {self.sharpness}: must be > 0 (the paper uses 0.4)")

    def factors(
        self, step: int, nll_BT: Tensor, batch: Batch, num_tasks: int, process_group: dist.ProcessGroup | None = None
    ) -> Tensor:
        """u of every token [B, T], fp32, detached; multiply it into the coefficients of the micro-batch.

        Collective but for focal: every rank must call it for the same micro-batch of the same step.
        """
        nll_BT = nll_BT.detach()
        if step <= self.burn_in:
            return torch.ones_like(nll_BT)
        if self.rule == "focal":
            return (1 - _sample_mean(torch.exp(-nll_BT), batch)).clamp(min=0).pow(self.gamma).float()
        loss_BT, real_BT = _sample_mean(nll_BT, batch), batch.labels_BT != IGNORE
        group_BT = batch.task_ids_BT.long().clamp(min=0) if self.group == "task" else torch.zeros_like(batch.labels_BT)
        groups = num_tasks if self.group == "task" else 1
        low_G, high_G = _range(loss_BT, real_BT, group_BT, groups, process_group)
        spread_BT = (high_G - low_G)[group_BT]
        h_BT = 2 * (loss_BT - ((high_G + low_G) / 2)[group_BT]) / spread_BT
        h_BT = torch.where(
            real_BT & (spread_BT > 0), h_BT, 0.0
        )  # padding lies far outside of [-1, 1]: exp would overflow
        e_BT = torch.exp(RULES[self.rule](h_BT) / self.sharpness)
        # One share per supervised token: over a sample they add up to 1, or to the weight of its row.
        share_BT = torch.where(real_BT, 1.0 / sample_tokens(batch).clamp(min=1), 0.0).double()
        if batch.token_weights_BT is not None:
            share_BT = token_parts(batch)
        if batch.row_weights_BT is not None:
            share_BT = share_BT * batch.row_weights_BT
        parts = (share_BT * e_BT, share_BT)
        sums = [group_sums(group_BT.flatten(), x_BT.flatten(), groups) for x_BT in parts]
        weighted = batch.token_weights_BT is not None or batch.row_weights_BT is not None
        totals_3G = torch.stack([*sums, torch.full_like(sums[0], float(weighted))])
        _all_reduce(totals_3G, process_group, dist.ReduceOp.SUM)
        least_G = torch.where(totals_3G[2] > 0, torch.finfo(torch.float64).tiny, 1.0)  # of samples, or of their weights
        mean_G = totals_3G[0] / totals_3G[1].clamp(min=least_G)
        return torch.where(real_BT, e_BT / mean_G[group_BT], 1.0).float()


def _sample_mean(x_BT: Tensor, batch: Batch) -> Tensor:
    """float64 [B, T]: mean of x over the supervised tokens of the position's sample; 0 where it has none."""
    x_BT = torch.where(batch.labels_BT != IGNORE, x_BT, 0.0).double()
    if batch.token_weights_BT is not None:
        return sample_sums(x_BT * token_parts(batch), batch)
    return sample_sums(x_BT, batch) / sample_tokens(batch).clamp(min=1)


def _range(loss_BT: Tensor, real_BT: Tensor, group_BT: Tensor, groups: int, process_group) -> tuple[Tensor, Tensor]:
    """Smallest and largest sample loss of each group over all ranks; (0, 0) for a group without samples."""
    ends_2G = loss_BT.new_full((2, groups), -torch.inf)  # maximum of -loss and of loss
    for end, value_BT in zip(ends_2G, (-loss_BT, loss_BT), strict=True):
        end.scatter_reduce_(0, group_BT.flatten(), value_BT.masked_fill(~real_BT, -torch.inf).flatten(), reduce="amax")
    _all_reduce(ends_2G, process_group, dist.ReduceOp.MAX)
    ends_2G = ends_2G.nan_to_num(neginf=0.0)
    return -ends_2G[0], ends_2G[1]


def _all_reduce(x: Tensor, process_group: dist.ProcessGroup | None, op) -> None:
    if dist.is_available() and dist.is_initialized():
        dist.all_reduce(x, op=op, group=process_group)
