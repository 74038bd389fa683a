"""The Batch: the only thing that crosses from data to training.

B rows, T positions. A row holds one example (unpacked) or several, one after the other (packed).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from functools import cached_property

import torch
from torch import Tensor

from mtft.common.device_copy import to_device

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
    token_weights_BT float32  weight of the label's token, > 0 where supervised, else 0; None = 1 each
    row_weights_BT   float32  weight of the row that the token's example is of, > 0; 0 on padding; None = 1 each

    What depends on values is asked of `host` and `supervised_N`: on a GPU each look at a value would wait for it.
    """

    input_ids_BT: Tensor
    position_ids_BT: Tensor
    segment_ids_BT: Tensor
    task_ids_BT: Tensor
    labels_BT: Tensor
    token_weights_BT: Tensor | None = None
    row_weights_BT: Tensor | None = None

    @property
    def packed(self) -> bool:
        """True if any row holds more than one example."""
        return bool((self.host.segment_ids_BT > 0).any())

    @property
    def host(self) -> Batch:
        """The same in the CPU's memory: of a batch that `to` made, the one it was made of."""
        if self.labels_BT.device.type == "cpu":
            return self
        if "_host" not in vars(self):
            vars(self)["_host"] = self.map(Tensor.cpu)
        return vars(self)["_host"]

    @cached_property
    def supervised_N(self) -> Tensor:
        """int64 [n]: the supervised positions b * T + t, ascending, on the batch's device; `to` brings them along."""
        return (self.labels_BT != IGNORE).flatten().nonzero().squeeze(-1)

    def map(self, change: Callable[[Tensor], Tensor]) -> Batch:
        """A batch of the changed tensors."""
        tensors = ((field.name, getattr(self, field.name)) for field in fields(self))
        return replace(self, **{name: None if x is None else change(x) for name, x in tensors})

    def to(self, device: torch.device | str) -> Batch:
        """On `device`, without waiting for it."""
        if torch.device(device) == self.labels_BT.device:
            return self
        moved = self.map(lambda x: to_device(x, device))
        vars(moved).update(_host=self.host, supervised_N=to_device(self.host.supervised_N, device))
        return moved

    def pin_memory(self) -> Batch:
        pinned = self.map(Tensor.pin_memory)
        vars(pinned)["supervised_N"] = self.supervised_N.pin_memory()
        return pinned
