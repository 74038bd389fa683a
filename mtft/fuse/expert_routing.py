"""`weights: router`: every prompt's own weights of the experts, from a router that `mtft merge` has fitted.

The router reads the base's state at the prompt's last token and says how likely the prompt belongs to each task
(Twin-Merging, Lu et al., NeurIPS 2024, 2406.15479; nearest centroid or a network of two layers, mtft/merge). These
weights hold for the whole answer; what they mean is in alpha/fused_logits.py.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from mtft.adapters.mlp_router import load_router
from mtft.adapters.routers import ArrowRouter
from mtft.common.own_files import read_own
from mtft.fuse.alpha.spec import FusionError, FusionSpec
from mtft.fuse.decoding.multi_lora import BASE
from mtft.models.hidden_states import last_token_states

if TYPE_CHECKING:
    from mtft.fuse.load_models import WeakModel


class PromptRouter:
    """A router's file, and which of its names each expert has: a part of the expert's path is that name.

    experts: folders in the order of the fusion; they may stand in another order than the router's names. Raises
    FusionError where an expert has no name or the names are not all there, MergeError where the file is no router.
    """

    def __init__(self, path: str | Path, experts: Sequence[str | Path]) -> None:
        router = load_router(path)
        if isinstance(router, ArrowRouter):
            raise FusionError(
                "an Arrow router weighs experts for each token and module, not for a prompt",
                where=str(path),
                do="take the router of merge.experts.kind: twin, or weights: active",
            )
        self.router = router
        self.order = [_router_index(Path(expert), router.names) for expert in experts]
        if sorted(self.order) != list(range(len(router.names))):
            raise FusionError(
                f"the router knows {', '.join(router.names)}; the experts are {', '.join(map(str, experts))}",
                where=str(path),
                do="give one expert for each name",
            )
        _refuse_residuals(Path(path).parent, [Path(expert) for expert in experts])

    @torch.no_grad()
    def weights(self, weak: WeakModel, prompt_L: Tensor) -> tuple[float, ...]:
        """One weight per expert, >= 0, adding up to 1, for the ids of one prompt."""
        weak.layout.set((BASE,), 1)
        state_1D = last_token_states(weak.model, prompt_L[None].to(weak.model.device)).double().cpu().numpy()
        p_K = self.router.probabilities(state_1D)[0]
        return tuple(float(p_K[k]) for k in self.order)

    def specs(
        self, weak: WeakModel, ids_BL: Tensor, mask_BL: Tensor | None, specs: Sequence[FusionSpec]
    ) -> list[FusionSpec]:
        """The specs with weights in the place of `router`. Each prompt is read by itself: no padding, no neighbours."""
        routed_specs = []
        for row, spec in enumerate(specs):
            prompt_L = ids_BL[row] if mask_BL is None else ids_BL[row][mask_BL[row].bool()]
            if spec.weights == "router" and len(prompt_L):  # a row of padding has nothing to fuse
                spec = replace(spec, weights="user", user_weights=self.weights(weak, prompt_L))
            routed_specs.append(spec)
        return routed_specs


def _router_index(expert: Path, names: Sequence[str]) -> int:
    """Which name the expert has: its folder's, or that of a folder above; `expert_NAME`, as merges write it, counts."""
    for part in reversed(expert.parts):
        for name in (part.removeprefix("expert_"), part):
            if name in names:
                return names.index(name)
    raise FusionError(
        f"which of the router's experts is it? No part of its path is one of {', '.join(names)}",
        where=str(expert),
        do="name the folder after the router's task",
    )


def _refuse_residuals(folder: Path, experts: Sequence[Path]) -> None:
    """Residuals of a twin merge are no experts by themselves."""
    metadata = folder / "twin.json"
    if not os.path.lexists(metadata):
        return
    if read_own(metadata, {"with_shared": bool}, do="merge again: mtft merge RECIPE --overwrite")["with_shared"]:
        return
    if any(expert.resolve().parent == folder.resolve() for expert in experts):
        raise FusionError(
            "these experts are residuals, which say nothing without the shared adapter",
            where=str(folder),
            do="merge again with experts.with_shared: true, or give the adapters of the single tasks",
        )
