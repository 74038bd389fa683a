"""What RegMean needs to know of the data: the second moments of every module's input.

    G = X^T X / N over the N real tokens that pass through the module        [n, n]

The caller runs the model, with the adapter whose inputs are meant already on it; no labels are needed. Modules that are
given the same tensor (q, k, v; gate, up) share one G: it is multiplied once and held once. The sums are kept in main
memory, as fp64: at 7B they outgrow a GPU, which holds one product at a time.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from mtft.adapters.safetensors_io import TensorWriter
from mtft.common.errors import MergeError


@torch.no_grad()
def collect_grams(modules: Mapping[str, nn.Module], passes: Iterable[tuple[Callable[[], object], Tensor]]) -> dict:
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


def save_grams(grams: Mapping[str, Tensor], folder: Path, adapter: str) -> None:
    """Write them where `regmean` looks for them: `folder`/ADAPTER.safetensors, one at a time, as fp32."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{adapter}.safetensors"
    path.unlink(missing_ok=True)
    with TensorWriter(path, [(name, "F32", tuple(G.shape)) for name, G in grams.items()]) as file:
        for name, G in grams.items():
            file.write(name, G.cpu().numpy())
