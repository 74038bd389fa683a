"""The Batch: the only thing that crosses from data to training.

B rows, T positions. A row holds one example (unpacked) or several, one after the other (packed).
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

IGNORE = -100  # label of a position that is not supervised
PADDING = -1  # segment and task of a position that holds no token


@dataclass(frozen=True)
class Batch:
    """One micro-batch of one rank, on one device.

    input_ids_BT     int64  packed tokens; padding holds the tokenizer's pad id
    position_ids_BT  int64  restarts at 0 for every example
    segment_ids_BT   int32  which example in the row, -1 = padding
    task_ids_BT      int32  task of the token, -1 = padding
    labels_BT        int64  the token to predict *from this position* (already shifted), -100 = not supervised
    """

    input_ids_BT: Tensor
    position_ids_BT: Tensor
    segment_ids_BT: Tensor
    task_ids_BT: Tensor
    labels_BT: Tensor

    @property
    def packed(self) -> bool:
        """True if any row holds more than one example."""
        return bool((self.segment_ids_BT > 0).any())

    def to(self, device: torch.device | str) -> Batch:
        return replace(self, **{name: value.to(device, non_blocking=True) for name, value in vars(self).items()})

    def pin_memory(self) -> Batch:
        return replace(self, **{name: value.pin_memory() for name, value in vars(self).items()})
