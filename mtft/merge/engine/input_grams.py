"""What RegMean needs to know of the data: the second moments of every module's input.

    G = X^T X / N over the N real tokens that pass through the module        [n, n]

The caller runs the model, with the adapter whose inputs are meant already on it; no labels are needed. Modules with the
same input (q, k, v; gate, up) get the same G.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from mtft.common.errors import MergeError


@torch.no_grad()
def collect_grams(modules: Mapping[str, nn.Module], passes: Iterable[tuple[Callable[[], object], Tensor]]) -> dict:
    """{module: G [n, n] fp64} of `modules` (name in the base -> the module, as it stands in the model).

    passes: (forward, real_BT) for each batch: `forward()` runs the model, real_BT [B, T] tells tokens from padding.
    """
    sums: dict[str, Tensor | float] = dict.fromkeys(modules, 0.0)
    real: list[Tensor] = []
    tokens = 0

    def hook(name: str):
        def add(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            x = inputs[0][real[0]].double()
            sums[name] = sums[name] + x.T @ x

        return add

    handles = [module.register_forward_pre_hook(hook(name)) for name, module in modules.items()]
    try:
        for forward, real_BT in passes:
            real[:] = [real_BT]
            forward()
            tokens += int(real_BT.sum())
    finally:
        for handle in handles:
            handle.remove()
    if not tokens:
        raise MergeError("no tokens to measure the inputs on", where="grams", do="give some rows of the task")
    return {name: total / tokens for name, total in sums.items()}


def save_grams(grams: Mapping[str, Tensor], folder: Path, adapter: str) -> None:
    """Write them where `regmean` looks for them: `folder`/ADAPTER.safetensors."""
    folder.mkdir(parents=True, exist_ok=True)
    save_file({name: G.float().cpu().contiguous() for name, G in grams.items()}, folder / f"{adapter}.safetensors")
