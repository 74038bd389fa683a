"""Memory that is used again: fresh pages cost more than the arithmetic on them, a page fault for every 4 KiB."""

from __future__ import annotations

import torch
from torch import Tensor


class FusionBuffers:
    """Named buffers. A name's content lasts until the same name is asked for again."""

    def __init__(self) -> None:
        self._memory: dict[str, Tensor] = {}
        self._shaped: dict[str, Tensor] = {}

    def like(self, name: str, x: Tensor) -> Tensor:
        """An uninitialised contiguous tensor of the shape, dtype and device of `x`."""
        buffer = self._shaped.get(name)
        if buffer is not None and buffer.shape == x.shape and buffer.dtype == x.dtype and buffer.device == x.device:
            return buffer
        memory = self._memory.get(name)
        with torch.inference_mode(False):  # a tensor made in inference mode could not be written to outside of it
            if memory is None or memory.numel() < x.numel() or memory.dtype != x.dtype or memory.device != x.device:
                memory = self._memory[name] = torch.empty(x.numel(), dtype=x.dtype, device=x.device)
            shaped = self._shaped[name] = memory[: x.numel()].view(x.shape)
        return shaped
