"""One copy of the small base serves all its rows: base rows and the rows of every LoRA expert, in one pass.

A batch is group-major: [expert_0 x B, ..., expert_T-1 x B, base x B]. Each targeted nn.Linear computes x W^T once for
all rows; then one bmm pair adds (x A_t^T)(s_t B_t)^T to the contiguous slice of expert t. PEFT's `adapter_names` gives
the same numbers by gathering rows by index per layer and adapter, at about twice the cost (huggingface/peft#2283).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from mtft.adapters.lora_factors import LoraAdapter, LoraFactors
from mtft.fuse.alpha.spec import FusionError

BASE = -1  # the group that has no adapter


class MultiLoraLayout:
    """What the rows of the current batch are: `groups` in order, `size` rows each. One per model, shared.

    Until `set` is called all rows are base rows. adapted: the groups that have an adapter; index: of these in the
    factors, None if they are all experts in order, so that there is nothing to pick.
    """

    def __init__(self, experts: int) -> None:
        self.experts = experts
        self.groups: tuple[int, ...] = (BASE,)
        self.size = 0
        self.adapted: tuple[int, ...] = ()
        self.index: slice | list[int] | None = None

    def set(self, groups: Sequence[int], size: int) -> None:
        """Expert groups first (any experts, each once), then BASE or not."""
        groups = tuple(groups)
        adapted = tuple(group for group in groups if group != BASE)
        if not groups or size < 1 or len(set(groups)) != len(groups) or BASE in groups[:-1]:
            raise ValueError(f"groups {groups} of {size} rows: want different experts, then BASE or not")
        if any(not 0 <= group < self.experts for group in adapted):
            raise ValueError(f"groups {groups}: there are {self.experts} experts")
        self.groups, self.size, self.adapted = groups, size, adapted
        self.index = list(adapted)
        if adapted == tuple(range(self.experts)):
            self.index = None
        elif adapted and adapted == tuple(range(adapted[0], adapted[-1] + 1)):
            self.index = slice(adapted[0], adapted[-1] + 1)  # which copies nothing


class MultiLoraLinear(nn.Module):
    """`linear` for all rows plus each expert's low-rank update on its own rows. Inference only.

    factors: one LoraFactors or None (module untouched) per expert; smaller ranks are padded with zeros.
    """

    A_TNR: Tensor
    B_TRM: Tensor

    def __init__(self, linear: nn.Linear, factors: Sequence[LoraFactors | None], layout: MultiLoraLayout) -> None:
        super().__init__()
        self.linear, self.layout = linear, layout
        rank = max(factor.rank for factor in factors if factor is not None)
        A_TNR = np.zeros((len(factors), linear.in_features, rank), np.float32)
        B_TRM = np.zeros((len(factors), rank, linear.out_features), np.float32)
        for t, factor in enumerate(factors):
            if factor is not None:
                A_TNR[t, :, : factor.rank] = factor.A_RN.T
                B_TRM[t, : factor.rank] = factor.scale * factor.B_MR.T
        # a quantised weight is no floating dtype: its input, and so the factors, are in the model's compute dtype
        dtype = linear.weight.dtype if linear.weight.dtype.is_floating_point else torch.get_default_dtype()
        self.register_buffer("A_TNR", torch.from_numpy(A_TNR).to(linear.weight.device, dtype), persistent=False)
        self.register_buffer("B_TRM", torch.from_numpy(B_TRM).to(linear.weight.device, dtype), persistent=False)

    @property
    def weight(self) -> Tensor:
        """Of the base: what asks an output layer for its width needs it."""
        return self.linear.weight

    def forward(self, x: Tensor) -> Tensor:
        """x [rows, ..., in] -> [rows, ..., out], rows = len(groups) * size (or a multiple, if the model flattens)."""
        layout = self.layout
        count, rows, expected = len(layout.adapted), x.shape[0], len(layout.groups) * layout.size
        if expected and rows != expected and (x.dim() > 2 or rows % expected):
            raise ValueError(f"{rows} rows for {len(layout.groups)} groups of {layout.size}")
        y = self.linear(x)
        if not count:
            return y
        A_TNR, B_TRM = self.A_TNR, self.B_TRM
        if layout.index is not None:
            A_TNR, B_TRM = A_TNR[layout.index], B_TRM[layout.index]
        rows = count * (rows // len(layout.groups))
        adapted_x, adapted_y = x[:rows].reshape(count, -1, x.shape[-1]), y[:rows].view(count, -1, y.shape[-1])
        low_TLR = torch.bmm(adapted_x.to(A_TNR.dtype), A_TNR)
        if adapted_y.dtype == low_TLR.dtype:
            adapted_y.baddbmm_(low_TLR, B_TRM)
        else:  # a quantised base may answer in another precision than its factors have
            adapted_y.add_(torch.bmm(low_TLR, B_TRM))
        return y


def attach_multi_lora(model: nn.Module, adapters: Sequence[LoraAdapter]) -> MultiLoraLayout:
    """Put MultiLoraLinear in the place of every linear that any adapter touches. Returns the layout that they share."""
    layout = MultiLoraLayout(len(adapters))
    for name in sorted({module for adapter in adapters for module in adapter.modules}):
        linear: Any = model.get_submodule(name)
        factors = [adapter.factors(name, np.float32) for adapter in adapters]
        model.set_submodule(name, MultiLoraLinear(linear, factors, layout))
    return layout


def multi_lora_refusal(adapter: LoraAdapter, model: nn.Module) -> str | None:
    """Why this adapter can't run as rows of the shared base, or None. FusionError if it belongs to another base."""
    if adapter.saved:
        return f"it replaces whole tensors ({adapter.saved[0]}, ...)"
    do = "give the base that this adapter was trained on"
    for name, shape in adapter.modules.items():
        if shape.kind != "linear" or shape.has_bias:
            return f"{name} is adapted in its {'bias' if shape.has_bias else 'embedding'}"
        try:
            module = model.get_submodule(name)
        except AttributeError:
            raise FusionError(f"the base has no module {name}", where=str(adapter.path), do=do) from None
        if not isinstance(module, nn.Linear):
            return f"{name} is a {type(module).__name__}"
        if (shape.m, shape.n) != (module.out_features, module.in_features):
            raise FusionError(
                f"{name} is {module.out_features} x {module.in_features} in the base, "
                f"{shape.m} x {shape.n} in the adapter",
                where=str(adapter.path),
                do=do,
            )
    return None
