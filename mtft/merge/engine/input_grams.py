"""What RegMean needs to know of the data: the second moments of every module's input.

    G = X^T X / N over the N real tokens that pass through the module        [n, n]

The caller runs the model, with the adapter whose inputs are meant already on it; no labels are needed. Modules that are
given the same tensor (q, k, v; gate, up) share one G: it is multiplied once and held once. The sums are kept in main
memory, as fp64: at 7B they outgrow a GPU, which holds one product at a time. Where they outgrow main memory too, some
modules are summed at a time, in several passes over the rows.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import psutil
import torch
from torch import Tensor, nn

from mtft.adapters.safetensors_io import TensorWriter
from mtft.common.errors import MergeError

Passes = Iterable[tuple[Callable[[], object], Tensor]]


@torch.no_grad()
def collect_grams(modules: Mapping[str, nn.Module], passes: Passes) -> dict:
    """{module: G [n, n] fp64} of `modules` (name in the base -> the module, as it stands in the model), on the CPU.

    passes: (forward, real_BT) for each batch: `forward()` runs the model, real_BT [B, T] tells tokens from padding.
    Modules that always have the same input have the same tensor; MergeError where they have it in some passes only.
    """
    sums: dict[str, Tensor] = {}
    shared: dict[str, str] = {}  # module -> the one in whose sum it is
    real: list[Tensor] = []
    last: list[tuple[Tensor, int, str]] = []  # the input that came last (kept, so that it is no other), version, whose
    tokens = 0

    def hook(name: str):
        def add(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            x_BTN = inputs[0]
            again = bool(last) and last[0][0] is x_BTN and last[0][1] == x_BTN._version
            owner = last[0][2] if again else name
            if shared.setdefault(name, owner) != owner:
                raise MergeError(
                    f"{name} and {shared[name]} have the same input in some passes and not in others", where="grams"
                )
            if again:
                return
            last[:] = [(x_BTN, x_BTN._version, owner)]
            x_PN = x_BTN[real[0]].double()
            gram_NN = (x_PN.T @ x_PN).cpu()
            sums[owner] = sums[owner].add_(gram_NN) if owner in sums else gram_NN

        return add

    handles = [module.register_forward_pre_hook(hook(name)) for name, module in modules.items()]
    try:
        for forward, real_BT in passes:
            real[:] = [real_BT]
            forward()
            tokens += int(real_BT.sum())
    finally:
        last.clear()
        for handle in handles:
            handle.remove()
    if not tokens:
        raise MergeError("no tokens to measure the inputs on", where="grams", do="give some rows of the task")
    if unseen := [name for name in modules if name not in shared]:
        raise MergeError(f"no token of these rows passes through {unseen[0]}", where="grams", do="give more rows")
    for total_NN in sums.values():
        total_NN.div_(tokens)
    return {name: sums[shared[name]] for name in modules}


def save_grams(
    modules: Mapping[str, Any],
    passes: Callable[[], Passes],
    folder: Path,
    adapter: str,
    *,
    held_bytes: int | None = None,
) -> None:
    """Collect them, and write them where `regmean` looks for them: `folder`/ADAPTER.safetensors, as fp32.

    held_bytes: of sums that are held at a time; the passes are made anew for each part of the modules (`passes()`).
    None: half of the main memory that is free.
    """
    held = psutil.virtual_memory().available // 2 if held_bytes is None else held_bytes
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{adapter}.safetensors"
    path.unlink(missing_ok=True)
    entries = [(name, "F32", (module.in_features, module.in_features)) for name, module in modules.items()]
    with TensorWriter(path, entries) as file:
        for part in _parts(modules, held):
            for name, G in collect_grams(part, passes()).items():
                file.write(name, G.cpu().numpy())


def _parts(modules: Mapping[str, Any], held_bytes: int) -> Iterator[dict[str, Any]]:
    """Neighbours whose sums have room together, or one alone. As if none shared its sum: that shows in the passes."""
    part: dict[str, Any] = {}
    size = 0
    for name, module in modules.items():
        more = 8 * module.in_features**2
        if part and size + more > held_bytes:
            yield part
            part, size = {}, 0
        part[name], size = module, size + more
    yield part
