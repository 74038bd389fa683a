"""Optimizers that train at one point and are judged at another: schedule-free (Defazio et al. 2024, arXiv 2405.15682).

Gradients are taken at y, and the average x of the iterates is what generalises. The optimizer holds one of the two in
the parameters and can switch; switching back and forth rounds, so around an evaluation the weights are put aside and
put back, and a run is the same bit for bit however often it is evaluated.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from accelerate.optimizer import AcceleratedOptimizer


def begin_training(optimizer: Any) -> None:
    """Before the first step: the parameters become those to train (after a checkpoint was loaded they are already)."""
    if any("train_mode" in group for group in _groups(optimizer)):
        optimizer.train()


@contextmanager
def evaluation_weights(optimizer: Any) -> Iterator[None]:
    """Inside the block the parameters are those to evaluate and to keep; afterwards they are as before, bit for bit.

    Does nothing for optimizers without such a pair, or without an optimizer (None).
    """
    groups = _groups(optimizer)
    if not any(group.get("train_mode") for group in groups):
        yield
        return
    parameters = [parameter for group in groups for parameter in group["params"]]
    aside = [parameter.detach().clone() for parameter in parameters]
    optimizer.eval()
    try:
        yield
    finally:
        with torch.no_grad():
            for parameter, value in zip(parameters, aside, strict=True):
                parameter.copy_(value)
        for group in groups:
            group["train_mode"] = True


def settle(optimizer: Any) -> None:
    """The run is over: the parameters become those to keep."""
    if any(group.get("train_mode") for group in _groups(optimizer)):
        optimizer.eval()


def _groups(optimizer: Any) -> list[dict[str, Any]]:
    """The groups as the optimizer itself holds them."""
    inner = optimizer.optimizer if isinstance(optimizer, AcceleratedOptimizer) else optimizer
    return [] if inner is None else inner.param_groups
