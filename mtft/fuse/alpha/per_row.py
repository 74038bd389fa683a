"""Fuse positions that want different things: rows of a batch may have rules, constants and weights of their own."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from mtft.fuse.alpha.buffers import FusionBuffers
from mtft.fuse.alpha.fused_logits import fuse_logits
from mtft.fuse.alpha.spec import FusionOutput, FusionSpec
from mtft.fuse.tokenizers.token_map import TokenMap


def fuse_rows(
    strong_NV: Tensor,
    experts_TNV: Sequence[Tensor],
    base_NV: Tensor,
    specs: Sequence[FusionSpec],
    buffers: FusionBuffers | None = None,
    token_map: TokenMap | None = None,
) -> FusionOutput:
    """As alpha.fuse_logits, with a spec for each of the N positions. Specs that differ in user_weights only are solved
    together, as one."""
    if all(spec is specs[0] for spec in specs):
        return fuse_logits(strong_NV, experts_TNV, base_NV, specs[0], buffers=buffers, token_map=token_map)
    groups: dict[FusionSpec, list[int]] = {}
    for row, spec in enumerate(specs):
        key = replace(spec, weights="router", user_weights=None) if spec.weights == "user" else spec
        groups.setdefault(key, []).append(row)
    if len(groups) == 1:
        (spec,) = groups
        weights_NT = _row_weights(specs, base_NV.device)
        return fuse_logits(strong_NV, experts_TNV, base_NV, spec, weights_NT, buffers=buffers, token_map=token_map)
    parts, order = [], []
    for spec, rows in groups.items():
        some = strong_NV[rows], [expert[rows] for expert in experts_TNV], base_NV[rows]
        weights_NT = _row_weights([specs[row] for row in rows], base_NV.device)
        parts.append(fuse_logits(*some, spec, weights_NT, token_map=token_map))
        order += rows
    back = torch.tensor(order, device=strong_NV.device).argsort()
    names = [name for name in vars(parts[0]) if name != "evaluations"]
    joined = {name: torch.cat([getattr(part, name) for part in parts])[back] for name in names}
    return FusionOutput(**joined, evaluations=sum(part.evaluations for part in parts))


def _row_weights(specs: Sequence[FusionSpec], device: torch.device) -> Tensor | None:
    """The rows' own weights [N, T], if they have some."""
    rows = [spec.user_weights for spec in specs if spec.user_weights is not None]
    return torch.tensor(rows, dtype=torch.float64, device=device) if len(rows) == len(specs) else None
