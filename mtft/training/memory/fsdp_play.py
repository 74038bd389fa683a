"""What FSDP2 holds beside activations, played along with a step on tensors without data (activation_peak).

Weights are gathered a unit at a time: a layer; the embeddings; the head, with the embeddings where they are tied, which
stays gathered from its forward to the end of the backward (accelerate's fsdp2_prepare_model). As torch 2.13 does it:

    gather     a buffer of the whole unit, from which the weights are copied. In the forward pass the buffer stays until
               the next unit's; in the backward pass the next unit's is there ahead of time.
    reduce     gradients of a unit come whole, are copied into a buffer in the precision of the sum, and a rank keeps
               its part. The buffer stays until the next unit's.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

NF4_BYTES = 0.5  # its scales are not cut


class _Unit:
    def __init__(self, modules: list[nn.Module], *, width: int, nf4: bool, head: nn.Module, reshards: bool) -> None:
        self.modules, self.reshards = modules, reshards
        self.gathered, seen = 0, set()
        self.trained: list[Any] = []
        for part in (part for module in modules for part in module.modules()):
            for parameter in part._parameters.values():
                if parameter is None or id(parameter) in seen:
                    continue
                seen.add(id(parameter))
                packed = nf4 and isinstance(part, nn.Linear) and part is not head and not parameter.requires_grad
                self.gathered += round(parameter.numel() * (NF4_BYTES if packed else width))
                self.trained += [parameter] * parameter.requires_grad
        self.buffer: Tensor | None = None
        self.whole: Tensor | None = None
        self.part: Tensor | None = None


class FsdpPlay:
    """Hooks on a model that allocate and free what FSDP2 would.

    ranks: that hold a part each; dtype: of gathered weights; nf4: frozen linears are packed;
    accumulates: gradients of an earlier micro-batch are there already.
    """

    def __init__(self, model: Any, *, ranks: int, dtype: torch.dtype, nf4: bool, accumulates: bool) -> None:
        self._ranks = ranks
        self._units: list[_Unit] = []
        self._order: list[_Unit] = []  # as their forwards ended
        self._last: Tensor | None = None  # the buffer of the unit before
        self._reduced: Tensor | None = None
        self._backward = False
        kinds = set(model._no_split_modules or ())
        embeddings, head = model.get_input_embeddings(), model.get_output_embeddings()
        options = {"width": dtype.itemsize, "nf4": nf4, "head": head}
        for layer in (part for part in model.modules() if type(part).__name__ in kinds):
            self._add(_Unit([layer], **options, reshards=True))
        if embeddings.weight is head.weight:
            self._add(_Unit([embeddings, head], **options, reshards=False))
        else:
            self._add(_Unit([embeddings], **options, reshards=True))
            self._add(_Unit([head], **options, reshards=False))
        self._accumulates = accumulates
        for parameter in model.parameters():  # so gathered, autocast casts no weight
            parameter.data = parameter.data.to(dtype)

    def begin(self) -> None:
        """Gradients of an earlier micro-batch."""
        for unit in self._units if self._accumulates else ():
            unit.part = self._cut(unit)

    def finish(self) -> None:
        """The end of the backward pass: units whose input needs no gradient end only here."""
        for unit in self._units:
            self._post_backward(unit)
        self._reduced = None

    def _add(self, unit: _Unit) -> None:
        self._units.append(unit)
        for module in unit.modules:
            module.register_forward_pre_hook(
                lambda _, args, kwargs: self._pre_forward(unit, args, kwargs), with_kwargs=True
            )
            module.register_forward_hook(lambda _m, _a, out: self._post_forward(unit, out))

    def _pre_forward(self, unit: _Unit, args: Any, kwargs: Any) -> Any:
        if self._backward:  # recomputed
            return None
        if unit.whole is None:
            buffer = _bytes(unit.gathered)
            self._last = None
            unit.whole = _bytes(unit.gathered)
            self._last = buffer

        def seen(value: Any) -> Any:
            if not isinstance(value, Tensor) or not value.requires_grad:
                return value
            value = value.view_as(value)
            value.register_hook(lambda _: self._post_backward(unit))
            return value

        return tree_map(seen, (args, kwargs))

    def _post_forward(self, unit: _Unit, out: Any) -> None:
        if self._backward:
            return
        if unit.reshards:
            unit.whole = None
        self._order.append(unit)
        for value in tree_leaves(out):
            if isinstance(value, Tensor) and value.requires_grad:
                value.register_hook(lambda _: self._pre_backward(unit))

    def _pre_backward(self, unit: _Unit) -> None:
        self._backward, self._last = True, None
        if unit.whole is None:
            unit.buffer = _bytes(unit.gathered) if unit.buffer is None else unit.buffer
            unit.whole = _bytes(unit.gathered)
            unit.buffer = None
        index = self._order.index(unit)
        ahead = self._order[index - 1] if index else unit
        if ahead.whole is None and ahead.buffer is None:
            ahead.buffer = _bytes(ahead.gathered)

    def _post_backward(self, unit: _Unit) -> None:
        unit.whole = unit.buffer = None
        if any(parameter.grad is not None for parameter in unit.trained):
            self._reduced = None
            self._reduced = _bytes(sum(4 * parameter.numel() for parameter in unit.trained))
            for parameter in unit.trained:
                parameter.grad = None
            part = self._cut(unit)
            unit.part = part if unit.part is None else unit.part

    def _cut(self, unit: _Unit) -> Tensor:
        return _bytes(sum(4 * -(-parameter.numel() // self._ranks) for parameter in unit.trained))


def _bytes(count: int) -> Tensor:
    return torch.empty(count, dtype=torch.uint8)
