"""Where captured gradients are added up: one block [K, *shape] a parameter."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
import torch.distributed as dist
from torch import Tensor, nn

from mtft.gradients.capture.token_order import TokenOrder
from mtft.gradients.gramian import BUCKET, block_gram, gram, ranks_of, sum_over_ranks


class GradientAccumulators:
    """The blocks of the weights of some linear layers, made when something is added.

    linears: the layers of each weight, all of the same shape. dtype: of the blocks.
    """

    def __init__(self, linears: Mapping[str, Sequence[nn.Linear]], num_tasks: int, dtype: torch.dtype) -> None:
        self.layers = {name: layers[0] for name, layers in linears.items()}
        self.num_tasks, self.dtype = num_tasks, dtype
        # Held with the wider side last: the contraction then runs along memory, several times faster for lora_B.
        self._wide_out = {name: layer.out_features > layer.in_features for name, layer in self.layers.items()}
        self.clear()

    def clear(self) -> None:
        self._blocks: dict[str, Tensor] = {}
        self._dropped: dict[str, Tensor] = {}  # inner products of blocks that are complete and gone
        self._summed = False

    def add(self, name: str, order: TokenOrder, delta: Tensor, x: Tensor) -> None:
        """Adds delta^T x of the tokens of every task; delta [..., out], x [..., in], their rows as `order` says."""
        delta_ND, x_ND = delta.reshape(-1, delta.shape[-1]), x.reshape(-1, x.shape[-1]).to(delta.dtype)
        if order.index_N is not None:
            delta_ND, x_ND = delta_ND[order.index_N], x_ND[order.index_N]
        left_ND, right_ND = (x_ND, delta_ND) if self._wide_out[name] else (delta_ND, x_ND)
        block = self._blocks.get(name)
        if block is None:
            if name in self._dropped:
                raise RuntimeError(f"{name} is used more often in this step than before: gram_only can't follow that")
            block = self._blocks[name] = self._empty(name)
        for k, start, end in order.parts:
            if left_ND.dtype == self.dtype:
                block[k].addmm_(left_ND[start:end].T, right_ND[start:end])
            else:
                block[k] += left_ND[start:end].T @ right_ND[start:end]

    def drop(self, name: str) -> None:
        """Contracts a block that is complete, and lets it go."""
        self._dropped[name] = block_gram(self._blocks.pop(name))

    def get(self, name: str) -> Tensor | None:
        """[K, out, in], or None where nothing was added."""
        block = self._blocks.get(name)
        return None if block is None else block.transpose(1, 2) if self._wide_out[name] else block

    def take(self, name: str) -> Tensor:
        """As `get`, and the block is handed over."""
        block = self.get(name)
        if block is None:
            raise ValueError("nothing was captured, or the gradients have been handed over")
        del self._blocks[name]
        return block

    def sum(self, group: dist.ProcessGroup | None) -> None:
        """Sums the blocks over ranks, once; each rank then has them all, in the same order."""
        if self._summed:
            return
        self._check_there()
        self._blocks = {name: self._blocks[name] if name in self._blocks else self._empty(name) for name in self.layers}
        if ranks_of(group) > 1:
            sum_over_ranks(self._blocks.values(), group)
        self._summed = True

    def gram(self, group: dist.ProcessGroup | None) -> Tensor:
        """Inner products of the blocks summed over ranks, float64 [K, K] on the CPU."""
        self.sum(group)
        return gram(self._blocks)

    def drain(self, group: dist.ProcessGroup | None) -> Tensor:
        """As `gram`, to the bit, but lets the blocks go, some at a time; with those that were dropped before."""
        self._check_there()
        part: dict[str, Tensor] = {}
        waiting = [name for name in self.layers if name not in self._dropped]
        for name in waiting:
            part[name] = self._blocks.pop(name) if name in self._blocks else self._empty(name)
            if name is not waiting[-1] and sum(block.numel() for block in part.values()) < BUCKET:
                continue
            if ranks_of(group) > 1:
                sum_over_ranks(part.values(), group)
            self._dropped |= {name: block_gram(block) for name, block in part.items()}
            part = {}
        total_KK = torch.zeros(self.num_tasks, self.num_tasks, dtype=torch.float64, device=self.device)
        for name in self.layers:  # in this order, whatever was dropped when
            total_KK += self._dropped[name]
        return total_KK.cpu()

    @property
    def device(self) -> torch.device:
        """Where the gradients are: where the weights are, also if these are shards."""
        return next(iter(self.layers.values())).weight.device

    def _check_there(self) -> None:
        if not self._blocks and not self._dropped:
            raise ValueError("nothing was captured, or the gradients have been handed over")

    def _empty(self, name: str) -> Tensor:
        sides = sorted((self.layers[name].in_features, self.layers[name].out_features))
        return torch.zeros(self.num_tasks, *sides, dtype=self.dtype, device=self.device)
