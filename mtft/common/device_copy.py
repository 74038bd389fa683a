"""Copies to a GPU for which the host does not wait."""

from __future__ import annotations

import torch
from torch import Tensor


def to_device(x: Tensor, device: torch.device | str) -> Tensor:
    """`x` on `device`. From ordinary CPU memory it goes through pinned memory, which torch keeps until it is copied.

    A plain `.to` of ordinary memory waits until the GPU has done all that it was given before.
    """
    device = torch.device(device)
    if x.device.type == "cpu" and device.type not in ("cpu", "meta"):
        x = x.pin_memory()
    return x.to(device, non_blocking=True)
