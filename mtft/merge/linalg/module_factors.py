"""Adapters on the modules of a model that runs: y += s B (A x) + s b, in the precision and place of the base weight.

Of a quantised base, whose weights are packed whole numbers: in the precision of the model's other weights.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from mtft.adapters.lora_factors import LoraAdapter
from mtft.common.errors import MergeError


class ModuleFactors(NamedTuple):
    """One adapter on one module; B and the bias are times the scale."""

    A_RN: Tensor
    B_MR: Tensor
    bias_M: Tensor | None


def module_factors(
    model: nn.Module, name: str, adapters: Sequence[LoraAdapter]
) -> tuple[nn.Module, list[ModuleFactors | None]]:
    """(the model's module `name`, what each adapter does to it). MergeError if it is not there, or an embedding."""
    try:
        module = model.get_submodule(name)
        to = {"dtype": _precision(model, module.weight), "device": module.weight.device}
    except AttributeError:
        raise MergeError(f"the model has no module {name!r}", where=name, do="give the adapters' own base") from None

    def load(adapter: LoraAdapter) -> ModuleFactors | None:
        factors = adapter.factors(name)
        if factors is None:
            return None
        if factors.kind != "linear":
            raise MergeError(
                "gates and routers work on linear modules only", where=name, do="leave embeddings out of target_modules"
            )
        bias_M = None if factors.bias_M is None else torch.tensor(factors.scale * factors.bias_M, **to)
        return ModuleFactors(torch.tensor(factors.A_RN, **to), torch.tensor(factors.scale * factors.B_MR, **to), bias_M)

    return module, [load(adapter) for adapter in adapters]


def _precision(model: nn.Module, weight: Any) -> torch.dtype:
    """That of a weight; of a packed one (whole numbers, 8-bit floats): that of the model's first plain weight."""
    plain = (x.dtype for x in (weight, *model.parameters()) if x.is_floating_point() and x.element_size() > 1)
    return next(plain, torch.float32)
