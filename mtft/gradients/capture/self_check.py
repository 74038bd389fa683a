"""The start-up check of the capture: what was captured adds up to the gradients that autograd itself computed.

On each rank by itself, before anything is averaged or sharded, so it needs to know nothing about the engine. It finds
weights that are used outside of their layer's forward, and (where .grad is whole) beside a forward that never runs. It
can't find attention that crosses examples: the sum is right then too.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from functools import partial

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from mtft.common.errors import UserError

EXACT, ROUGH = 1e-4, 1e-2  # float32; 16 bit, or TF32


class SelfCheck:
    """Collects the local weight gradients of some layers during a step's backwards.

    worst: after `compare`, the largest relative difference of a parameter.
    """

    def __init__(self, linears: Mapping[str, list[nn.Linear]]) -> None:
        self.linears = linears
        self.worst = 0.0
        self._sums: dict[str, Tensor] = {}
        self._seen: dict[int, Tensor] = {}  # kept alive, or an id could come again
        self._hooks: list[RemovableHandle] = []
        self._rough = False

    def attach(self, name: str, module: nn.Linear) -> None:
        """Watches the weight that the layer multiplies with just now (FSDP makes it anew from its shards)."""
        weight = module.weight
        if id(weight) not in self._seen:
            self._seen[id(weight)] = weight
            self._hooks.append(weight.register_hook(partial(self._note, name)))
        kind = weight.device.type
        low = torch.is_autocast_enabled(kind) or weight.dtype in (torch.bfloat16, torch.float16)
        tf32 = kind == "cuda" and bool(torch.backends.cuda.matmul.allow_tf32)
        self._rough = self._rough or low or tf32

    def _note(self, name: str, gradient: Tensor) -> None:
        gradient = gradient.detach().float()
        self._sums[name] = gradient.clone() if name not in self._sums else self._sums[name] + gradient

    def compare(self, captured: Mapping[str, Tensor | None]) -> bool:
        """UserError if sum_k J_k of a parameter is not its gradient. captured: {name: [K, *shape] or None}.

        False: a step that is not finite, which tells nothing.
        """
        for hook in self._hooks:
            hook.remove()
        most = EXACT if not self._rough else ROUGH
        sizes = {name: float(gradient.norm()) for name, gradient in self._sums.items()}
        floor = 1e-3 * max(sizes.values(), default=0.0)  # a gradient that is next to nothing is rounding
        errors = {}
        for name, block in captured.items():
            gradient = self._sums.get(name)
            if gradient is None and block is None:  # its layer never ran, so nothing watched it
                gradient = _own(self.linears[name][0].weight)
                sizes[name] = 0.0 if gradient is None else float(gradient.norm())
            if block is None and gradient is None:
                continue
            total = 0 if block is None else block.float().sum(dim=0)
            expected = torch.zeros_like(total) if gradient is None and isinstance(total, Tensor) else gradient
            tasks = 0.0 if block is None else float(block.float().flatten(1).norm(dim=1).max())
            size = max(sizes.get(name, 0.0), tasks, floor)
            errors[name] = float((total - expected).norm()) / size if size > 0 else 0.0  # pyright: ignore
        self._sums, self._seen, self._hooks = {}, {}, []
        self.worst = max(errors.values(), default=0.0)
        if not all(math.isfinite(error) for error in errors.values()):
            return False
        wrong = [name for name, error in errors.items() if error > most]
        if wrong:
            raise UserError(
                f"the captured task gradients of {len(wrong)} parameters do not add up to their gradient (relative "
                f"error {self.worst:.1e}), {wrong[0]} first: is the weight used outside of its layer's forward?",
                do="take these layers out of lora.targets, or train without loss.gradients",
            )
        return True


def _own(weight: Tensor) -> Tensor | None:
    """This step's gradient of a weight, where it is kept whole; None if it has none."""
    gradient = weight.grad
    return gradient.detach().float() if type(gradient) is Tensor and bool(gradient.any()) else None
