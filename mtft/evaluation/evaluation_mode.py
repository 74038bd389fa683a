"""Evaluation mode that a model comes back from unchanged."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn


@contextmanager
def evaluation_mode(model: nn.Module) -> Iterator[None]:
    """`model.eval()` inside the block, then every module as it was.

    4-bit linears of bitsandbytes stay in training mode on the CPU. There, a forward in evaluation mode repacks their
    weights for a kernel that has no backward (0.50, CPUs with AVX512-BF16), and they stay so: training after it
    gets wrong gradients, with no more than a warning (tests/training/test_qlora.py). They hold no dropout, so nothing
    else depends on their mode.
    """
    before = {module: module.training for module in model.modules()}
    model.eval()
    for module in _repacking(model):
        module.training = True
    try:
        yield
    finally:
        for module, training in before.items():
            module.training = training


def _repacking(model: nn.Module) -> list[nn.Module]:
    parameter = next(model.parameters(), None)
    if parameter is None or parameter.device.type != "cpu":
        return []
    # By name: importing bitsandbytes to look takes a second, and a model that has none was made without it.
    return [module for module in model.modules() if any(kind.__name__ == "Linear4bit" for kind in type(module).__mro__)]
