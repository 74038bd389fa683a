"""What an estimate of memory says. How it is made: mtft.training.memory.estimate, which takes long to import."""

from __future__ import annotations

from dataclasses import asdict, dataclass

import torch


@dataclass(frozen=True)
class MemoryEstimate:
    """Bytes on each GPU (without one: of each process), and the parameters behind them. `activations` is None for a
    model that can't be counted."""

    parameters: int
    trainable: int
    weights: int
    training: int
    activations: int | None
    logits: int

    @property
    def total(self) -> int:
        """All that is known."""
        return self.weights + self.training + (self.activations or 0) + self.logits

    def as_dict(self) -> dict[str, int | None]:
        return {**asdict(self), "total": self.total}

    def text(self) -> str:
        share = f"{self.trainable:,} of {self.parameters:,} parameters are trained"
        parts = ", ".join(
            f"{name} {_size(getattr(self, name))}" for name in ("weights", "training", "activations", "logits")
        )
        place = "memory on each GPU" if torch.cuda.is_available() else "in memory, for each process"
        return f"{place}: about {_size(self.total)} ({parts}); {share}"


def _size(count: int | None) -> str:
    if count is None:
        return "unknown, not in the sum"
    return f"{count / 2**30:.1f} GiB" if count >= 2**30 // 10 else f"{count / 2**20:.1f} MiB"
